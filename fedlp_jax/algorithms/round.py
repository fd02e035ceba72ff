"""One round of any composed algorithm, in the order in which it happens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedlp_jax.aggregate import Aggregator, Contribution
from fedlp_jax.client import Client, LocalWork, is_finite, local_update, loop_bounds
from fedlp_jax.data.batching import example_of
from fedlp_jax.keys import BEFORE_FIRST_ROUND, SERVER, Purpose, client_key, head_key
from fedlp_jax.layers import LayerRule, LayerTable, layer_table
from fedlp_jax.masks import MaskPolicy
from fedlp_jax.placement import Level, Plan, map_sum
from fedlp_jax.server import server_step
from fedlp_jax.submodel import Submodel, Submodels
from fedlp_jax.task import Task
from fedlp_jax.types import (
    Array,
    Batch,
    Cohort,
    Examples,
    FedLPError,
    PyTree,
    RoundMetrics,
    ServerState,
    Variables,
)


class Shared(NamedTuple):
    """What every client of a round reads."""

    variables: Variables
    examples: Examples
    key: Array  # the run's root key
    round: Array  # i32[], from 1
    scale: Array | None  # f32[], factor on client updates


class Lane(NamedTuple):
    """What one client of a round brings; with a leading slot axis, the cohort."""

    client: Client
    weight: Array  # f32[], a_k
    upload: Array  # f32[L]
    keep: Array  # f32[L]
    private: tuple[PyTree, ...]  # per level; empty unless stored


@dataclasses.dataclass(frozen=True)
class Composition:
    """The parts of a composed algorithm, and the two functions they make."""

    task: Task
    work: LocalWork
    client_optimizer: optax.GradientTransformation
    submodels: Submodels
    policy: MaskPolicy
    aggregator: Aggregator
    server_optimizer: optax.GradientTransformation
    by_examples: bool  # weigh clients by their number of examples
    layers: LayerRule
    client_schedule: float | Callable[[Array], Any] | None

    def init(
        self, key: Array, example: Batch, clients: int, variables: Variables | None = None
    ) -> ServerState:
        """The state before the first round; see `Algorithm.init`."""
        if variables is None:
            init_key = client_key(key, BEFORE_FIRST_ROUND, SERVER, Purpose.INIT)
            variables = jax.jit(lambda k: self.submodels.init(self.task, k, example))(init_key)
        table = layer_table(variables, self.layers)
        for depth, level in enumerate(self.submodels.levels(self.task, variables, example), 1):
            _check_whole_layers(level, depth, variables, table, self.layers)
        with jax.numpy_dtype_promotion("standard"):
            optimizer = self.server_optimizer.init(variables["params"])
        fixed = not callable(self.client_schedule) and self.client_schedule is not None
        return ServerState(
            variables,
            policy=self.policy.init(table, clients),
            aggregator=self.aggregator.init(variables),
            optimizer=optimizer,
            client_scale=jnp.asarray(self.client_schedule if fixed else 1.0, jnp.float32),
            round=jnp.zeros((), jnp.int32),
            halted=jnp.zeros((), bool),
        )

    def round(
        self,
        state: ServerState,
        private: tuple[PyTree, ...],
        examples: Examples,
        cohort: Cohort,
        key: Array,
        plan: Plan,
    ) -> tuple[ServerState, tuple[PyTree, ...], RoundMetrics]:
        """One server update; see `Algorithm.round`."""
        number = state.round + 1
        table = layer_table(state.variables, self.layers)
        levels = self.submodels.levels(self.task, state.variables, example_of(examples))

        # Which layers: drawn before training, from (seed, round, client) alone.
        parts = [_part(level, state.variables, table, self.layers) for level in levels]
        coverage = jnp.stack([jnp.asarray(part.covered) for part in parts])[cohort.level]
        masks, policy = self.policy.sample(key, state.policy, cohort, number, coverage)

        # Train every client at its level; sum weighted, masked updates.
        shared = Shared(state.variables, examples, key, number, self._scale(state, number))
        weight = cohort.size.astype(jnp.float32)
        lanes = Lane(
            Client(cohort.client, cohort.size, cohort.rows),
            weight if self.by_examples else jnp.ones_like(weight),
            masks.upload,
            masks.keep,
            private,
        )
        contribution, metrics, trained = map_sum(
            [
                self._level(g, level, part, example_of(examples), cohort.even_size, plan)
                for g, (level, part) in enumerate(zip(levels, parts, strict=True))
            ],
            shared,
            lanes,
            cohort.segment,
            plan,
        )

        # Divide, and step the server.
        update, aggregator = self.aggregator.lower(contribution, state.aggregator, table)
        variables, optimizer = server_step(
            self.server_optimizer,
            state.optimizer,
            state.variables,
            update,
            contribution.weight,
            table,
        )
        # Once a round had nobody to average, or its result is not finite, everything stands still:
        # the host, which reads metrics a round late, finds it as it was.
        halted = state.halted | (contribution.cohort <= 0) | ~is_finite(variables)
        new = ServerState(
            variables, policy, aggregator, optimizer, state.client_scale, number, halted
        )
        old = state._replace(halted=halted)
        state = jax.tree.map(lambda n, o: jnp.where(halted, o, n), new, old)
        if self.submodels.persist:
            private = jax.tree.map(lambda n, o: jnp.where(halted, o, n), trained, private)
        return state, private, RoundMetrics(metrics, masks.upload, masks.download, halted)

    def _scale(self, state: ServerState, number: Array) -> Array | None:
        if self.client_schedule is None:
            return None
        if callable(self.client_schedule):
            return jnp.asarray(self.client_schedule(number), jnp.float32)
        return state.client_scale

    def _level(
        self,
        index: int,
        level: Submodel,
        table: LayerTable,
        example: Batch,
        even_size: int | None,
        plan: Plan,
    ) -> Level:
        """One client at one level: train, then lift the update to what is summed."""
        train = local_update(
            level.task, self.client_optimizer, self.work, even_size, alone=plan.width == 1
        )

        def run(shared: Shared, lane: Lane, active: Array, bounds: Any) -> Any:
            start = level.extract(shared.variables)
            if self.submodels.persist:
                head = lane.private[index]
            else:
                head = level.private(head_key(shared.key, lane.client.id), example)
            end, metrics = train(
                level.merge(start, head),
                shared.examples,
                lane.client,
                bounds,
                shared.key,
                shared.round,
                shared.scale,
            )
            end, new_head = level.split(end)
            update = jax.tree.map(jnp.subtract, end, start)
            counted = is_finite((update, new_head)) & active
            contribution = self.aggregator.lift(
                update, lane.weight, lane.upload, lane.keep, counted, table
            )
            kept = {}
            if self.submodels.persist:
                kept = jax.tree.map(lambda n, o: jnp.where(counted, n, o), new_head, head)
            return contribution, metrics._replace(finite=counted), kept

        def embed(shared: Shared, total: Contribution) -> Contribution:
            return total._replace(total=level.embed(total.total, shared.variables))

        return Level(run, lambda lanes: loop_bounds(lanes.client.size, self.work), embed)


def _part(level: Submodel, variables: Variables, whole: LayerTable, rule: LayerRule) -> LayerTable:
    return layer_table(level.extract(variables), rule, whole.names)


def _check_whole_layers(
    level: Submodel, depth: int, variables: Variables, whole: LayerTable, rule: LayerRule
) -> None:
    """A layer is averaged as one, so a submodel has all of it or nothing."""
    part = _part(level, variables, whole, rule)
    cut = (part.covered > 0) & (part.params + part.statistics < whole.params + whole.statistics)
    if cut.any():
        name = whole.names[int(cut.argmax())]
        raise FedLPError(
            f"layer '{name}' is only partly in the submodel of depth {depth} "
            f"({part.params[cut.argmax()]} of {whole.params[cut.argmax()]} parameters); choose "
            "`layers` so that each layer is held whole or not at all."
        )
