"""Combination: from what the clients of a round send to one update, by a mean or a robust rule.

    clip each update -> lift it to a sum, or stack it -> lower the sum, or vote -> add noise

Only the middle is always there. A sum needs the memory of one model, a stack that of C.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedlp_jax.aggregation import privacy as private
from fedlp_jax.aggregation.means import Aggregator
from fedlp_jax.aggregation.privacy import Bounded, Privacy
from fedlp_jax.aggregation.robust import Robust, combine
from fedlp_jax.execution.map_clients import Plan
from fedlp_jax.pruning.layers import LayerTable
from fedlp_jax.pruning.submodels import Submodel
from fedlp_jax.types import Array, Cohort, PyTree, Variables, wide


class Sent(NamedTuple):
    """What a client sends beside its update; with a leading axis `[C]`, a cohort."""

    weight: Array  # f32[], a_k
    upload: Array  # f32[L]
    keep: Array  # f32[L]


class Combined(NamedTuple):
    """What the server makes of a round."""

    update: Variables
    state: PyTree
    weight: Array  # f32[L], 0 = the layer stays as it is
    counted: Array  # f32[], total weight of the clients that count


@dataclasses.dataclass(frozen=True)
class Combination:
    """An aggregator or a robust rule, with what may surround it."""

    rule: Aggregator | Robust
    clip: float | None = None  # largest norm of what a client sends
    privacy: Privacy | None = None  # has a clip of its own
    rescaled: bool = False  # the aggregator divides updates by their keep probability

    @property
    def stacked(self) -> bool:
        """Whether the updates of all clients are kept side by side."""
        return isinstance(self.rule, Robust)

    def init(self, variables: Variables) -> PyTree:
        """The state before the first round; it holds every number that the rounds use."""
        inner = self.rule.init(variables)
        if self.privacy is not None:
            private.check_private(variables)
            return private.bounded(inner, self.privacy.clip, self.privacy.noise_multiplier)
        return inner if self.clip is None else private.bounded(inner, self.clip, 0.0)

    def bound(self, state: PyTree) -> Array | None:
        """`f32[]`, the largest norm of what a client sends, if there is one."""
        return state.clip if isinstance(state, Bounded) else None

    def of_client(
        self,
        update: Variables,
        sent: Sent,
        counted: Array,
        bound: Array | None,
        part: LayerTable,
        level: Submodel,
        like: Variables,
    ) -> tuple[Any, Any]:
        """What ONE client adds to the sum, and what it adds to the stack; one of them is empty.

        Args:
          update: `x_k - x` of the client's submodel.
          sent: its weight and masks.
          counted: `bool[]`.
          bound: see `bound`.
          part: the layer table of the submodel.
          level: the submodel.
          like: the server's variables.
        """
        if bound is not None:
            update = private.clipped(update, sent.upload, bound, part)
        if isinstance(self.rule, Robust):
            return (), level.embed(update, like)
        return self.rule.lift(update, *sent, counted, part), ()

    def embed(self, total: Any, level: Submodel, like: Variables) -> Any:
        """A level's sum in the structure of the whole model."""
        if self.stacked:
            return total
        like = jax.tree.map(lambda x: x.astype(wide(x.dtype)), like)  # as sums are
        return total._replace(total=level.embed(total.total, like))

    def of_cohort(
        self,
        total: Any,
        stack: Any,
        sent: Sent,
        finite: Array,
        cohort: Cohort,
        state: PyTree,
        layers: LayerTable,
        plan: Plan,
    ) -> Combined:
        """What the clients add up to, before any noise.

        Args:
          total: sum over clients, unless stacked.
          stack: a tree of `[D * P, ...]`, if stacked.
          sent: `[D * P, ...]`.
          finite: `bool[D * P]`, who counts.
          cohort: the clients.
          state: of the last round.
          layers: the layer table.
          plan: resolved.
        """
        inner = state.inner if isinstance(state, Bounded) else state
        if isinstance(self.rule, Robust):
            counted = jnp.where(finite, sent.weight, jnp.zeros_like(sent.weight))
            votes = counted[:, None] * sent.upload
            update = combine(self.rule, stack, votes, cohort.client, inner, layers, plan)
            return Combined(update, state, votes.sum(axis=0), counted.sum())
        counted = total.cohort
        if self.privacy is not None:
            total = total._replace(cohort=_asked_for(cohort))
        update, inner = self.rule.lower(total, inner, layers)
        state = state._replace(inner=inner) if isinstance(state, Bounded) else inner
        return Combined(update, state, total.weight, counted)

    def released(
        self,
        combined: Combined,
        sent: Sent,
        cohort: Cohort,
        key: Array,
        round: Array,
        layers: LayerTable,
    ) -> Combined:
        """With privacy: adds noise to each layer that a chosen client was to send."""
        if self.privacy is None:
            return combined
        chosen = (cohort.client >= 0)[:, None]
        planned = jnp.where(chosen, sent.upload, 0.0).sum(axis=0)
        stretch = jnp.ones_like(planned)
        if self.rescaled:
            kept = chosen & (sent.keep > 0)
            stretch = jnp.where(kept, 1.0 / jnp.where(kept, sent.keep, 1.0), 0.0).max(axis=0)
        one = combined.state.noise * combined.state.clip / _asked_for(cohort)
        deviation = jnp.where(planned > 0, one * stretch, 0.0)
        update = private.noised(combined.update, key, round, deviation, layers)
        return combined._replace(update=update, weight=planned)


def _asked_for(cohort: Cohort) -> Array:
    """`f32[]`, C: how many clients a round asks for, however many are heard."""
    if cohort.conditions is not None:
        return cohort.conditions.quota.max().astype(jnp.float32)
    return (cohort.client >= 0).sum(dtype=jnp.float32)
