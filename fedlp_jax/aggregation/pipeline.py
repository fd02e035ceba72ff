"""UpdatePipeline: from what clients send to one update.

    clip each update -> reduce the cohort -> add noise

Only the middle step is always there. An asynchronous server discounts what it has clipped.

What an algorithm sends with the update travels as one more collection of it, cut into the same
layers, so every reducer takes it as it takes batch statistics.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from fedlp_jax.aggregation import privacy as private
from fedlp_jax.aggregation.privacy import Privacy
from fedlp_jax.aggregation.reducer import Aggregate, Received, Reducer
from fedlp_jax.execution.plan import Plan
from fedlp_jax.pruning.layers import LayerTable
from fedlp_jax.types import Array, Cohort, PyTree, Terms, Variables, wide

_EXTRAS = "(extras)"  # a collection that no model has


def joined(update: Variables, extras: Terms) -> Variables:
    """An update and what is sent with it, in one tree.

    Args:
      update: with the collections of a model.
      extras: a number becomes a tree of scalars, one for each parameter.
    """
    numbers = {
        name: jax.tree.map(lambda x, n=number: n.astype(wide(x.dtype)), update["params"])
        for name, number in extras.numbers.items()
    }
    kinds = {"numbers": numbers, "trees": extras.trees}
    present = {kind: trees for kind, trees in kinds.items() if trees}
    return {**update, _EXTRAS: present} if present else update


def separated(payload: Variables) -> tuple[Variables, Terms]:
    """The inverse of `joined`, but for numbers, which stay trees."""
    extras = payload.get(_EXTRAS, {})
    update = {name: tree for name, tree in payload.items() if name != _EXTRAS}
    return update, Terms(extras.get("numbers", {}), extras.get("trees", {}))


def layers_of_payload(layers: LayerTable, payload: Variables) -> LayerTable:
    """A layer table that also indexes what is sent with the update.

    Args:
      layers: of the model or a submodel.
      payload: of any submodel; only its names are read.
    """
    if _EXTRAS not in payload:
        return layers
    extras = {
        kind: dict.fromkeys(trees, layers.index["params"])
        for kind, trees in payload[_EXTRAS].items()
    }
    return dataclasses.replace(layers, index={**layers.index, _EXTRAS: extras})


@dataclasses.dataclass(frozen=True)
class UpdatePipeline:
    """A reducer with optional clipping before it and noise after it."""

    reducer: Reducer
    clip: float | None = None  # largest L2 norm of an upload
    privacy: Privacy | None = None  # has its own clip

    @property
    def clips(self) -> bool:
        """Whether updates are clipped, so that the state is a `Clipped`."""
        return self.clip is not None or self.privacy is not None

    def init(self, variables: Variables) -> PyTree:
        """The state. It holds every number that the rounds use, and rounds do not change it."""
        inner = self.reducer.init(variables)
        if self.privacy is not None:
            private.check_private(variables)
            return private.clipped_state(inner, self.privacy.clip, self.privacy.noise_multiplier)
        return inner if self.clip is None else private.clipped_state(inner, self.clip, 0.0)

    def bound(self, state: PyTree) -> Array | None:
        """`f32[]`, the largest norm of an upload; None = unbounded."""
        return state.clip if self.clips else None

    def clipped(
        self, payload: Variables, mask: Array, bound: Array | None, layers: LayerTable
    ) -> Variables:
        """The payload of ONE client with its update clipped, ready for `reducer.prepare`.

        Args:
          payload: `x_k - x` of the client's submodel, and what is sent with it, see `joined`.
          mask: `f32[L]`; what is not sent adds nothing to the norm.
          bound: see `bound`.
          layers: of the submodel, see `layers_of_payload`.
        """
        if bound is None:
            return payload
        beside = {name: tree for name, tree in payload.items() if name == _EXTRAS}
        update, _ = separated(payload)
        return private.clipped(update, mask, bound, layers) | beside

    def select(self, received: Received, state: PyTree, layers: LayerTable) -> Array:
        """`f32[D * P, L]`, what the server asks for after the training; arguments of `reduce`."""
        assert self.reducer.select is not None
        return self.reducer.select(received, state.inner if self.clips else state, layers)

    def reduce(
        self, received: Received, cohort: Cohort, state: PyTree, layers: LayerTable, plan: Plan
    ) -> Aggregate:
        """What the cohort adds up to, before any noise.

        Args:
          received: of the cohort, in its slots `[D * P]`.
          cohort: the clients.
          state: from `init`.
          layers: of the server's variables, see `layers_of_payload`.
          plan: resolved.
        """
        inner, summed = state.inner if self.clips else state, received.contributions
        if self.privacy is not None:
            # The divisor has to be a constant, so it counts the clients asked for.
            constant = summed._replace(cohort_weight=_requested(cohort))
            received = received._replace(contributions=constant)
        aggregate = self.reducer.reduce(received, inner, layers, plan)
        if self.privacy is not None:
            aggregate = aggregate._replace(cohort_weight=summed.cohort_weight)
        update, extras = separated(aggregate.update)
        return aggregate._replace(update=update, extras=extras)

    def privatize(
        self,
        aggregate: Aggregate,
        received: Received,
        cohort: Cohort,
        state: PyTree,
        key: Array,
        round: Array,
        layers: LayerTable,
    ) -> Aggregate:
        """Under privacy, adds noise to each layer that a chosen client was to send."""
        if self.privacy is None or self.reducer.sensitivity is None:
            return aggregate
        chosen = (cohort.client >= 0)[:, None]
        planned = jnp.where(chosen, received.uploads.mask, 0.0).sum(axis=0) > 0
        scale = self.reducer.sensitivity(received.uploads.keep, chosen)
        deviation = state.noise * state.clip / _requested(cohort)
        deviation = jnp.where(planned, deviation * scale, 0.0)
        update = private.noised(aggregate.update, key, round, deviation, layers)
        return aggregate._replace(update=update, gate=planned)


def _requested(cohort: Cohort) -> Array:
    """`f32[]`, C: the clients a round asks for, however many arrive."""
    if cohort.conditions is not None:
        return cohort.conditions.quota.max().astype(jnp.float32)
    return (cohort.client >= 0).sum(dtype=jnp.float32)
