"""One round of any composed algorithm, in the order in which it happens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from fedlp_jax.aggregation.pipeline import Combination, Combined, Sent
from fedlp_jax.aggregation.server import server_step
from fedlp_jax.clients.local_training import Client, LocalWork, is_finite, local_update, loop_bounds
from fedlp_jax.clients.outcomes import (
    Fate,
    Lot,
    Outcome,
    came_true,
    corrupted,
    judge,
    with_flipped_labels,
)
from fedlp_jax.data.batching import example_of
from fedlp_jax.errors import FedLPError
from fedlp_jax.execution.map_clients import HOST, Level, Plan, map_sum
from fedlp_jax.execution.packing import Packed, pack, unpack
from fedlp_jax.prng import BEFORE_FIRST_ROUND, SERVER, Purpose, client_key, head_key
from fedlp_jax.pruning.layers import LayerRule, LayerTable, layer_table
from fedlp_jax.pruning.masks import MaskPolicy
from fedlp_jax.pruning.submodels import Submodel, Submodels
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import (
    Array,
    Batch,
    Cohort,
    Examples,
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
    bound: Array | None  # f32[], largest norm of what a client sends


class Lane(NamedTuple):
    """What one client of a round brings; with a leading slot axis, the cohort."""

    client: Client
    sent: Sent
    lot: Lot | None  # None = a run without faults


@dataclasses.dataclass(frozen=True)
class Composition:
    """The parts of a composed algorithm, and the two functions they make."""

    task: Task
    work: LocalWork
    client_optimizer: optax.GradientTransformation
    submodels: Submodels
    policy: MaskPolicy
    combination: Combination
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
            aggregator=self.combination.init(variables),
            optimizer=optimizer,
            client_scale=jnp.asarray(self.client_schedule if fixed else 1.0, jnp.float32),
            round=jnp.zeros((), jnp.int32),
            halted=jnp.zeros((), bool),
        )

    def round(
        self,
        state: ServerState,
        private: Packed,
        examples: Examples,
        cohort: Cohort,
        key: Array,
        plan: Plan,
    ) -> tuple[ServerState, Packed, RoundMetrics]:
        """One server update; see `Algorithm.round`."""
        number = state.round + 1
        table = layer_table(state.variables, self.layers)
        levels = self.submodels.levels(self.task, state.variables, example_of(examples))

        # Which layers: drawn before training, from (seed, round, client) alone.
        parts = [_part(level, state.variables, table, self.layers) for level in levels]
        coverage = jnp.stack([jnp.asarray(part.covered) for part in parts])[cohort.level]
        masks, policy = self.policy.sample(key, state.policy, cohort, number, coverage)

        # Train every client at its level, unless it is lost; sum or stack what they send.
        example, fate = example_of(examples), None
        if cohort.conditions is not None:
            fate = judge(key, number, cohort, masks, table, levels, self.work, example)
        # With data on the host, each device has the examples of its own clients only.
        dealt, whole = cast(Any, plan.data == HOST), cast(Any, False)
        weight = cohort.size.astype(jnp.float32)
        sent = Sent(weight if self.by_examples else jnp.ones_like(weight), masks.upload, masks.keep)
        total, (metrics, stack), private = map_sum(
            [
                self._level(level, part, example, cohort, plan)
                for level, part in zip(levels, parts, strict=True)
            ],
            Shared(
                state.variables,
                examples,
                key,
                number,
                self._scale(state, number),
                self.combination.bound(state.aggregator),
            ),
            self._lanes(cohort, sent, fate, plan, examples),
            cohort.segment,
            plan,
            dealt=Shared(whole, Examples(dealt, dealt, whole), *4 * (whole,)),
            own=private,
        )

        # Combine, and step the server.
        combined = self.combination.of_cohort(
            total, stack, sent, metrics.finite, cohort, state.aggregator, table, plan
        )
        combined = self.combination.released(combined, sent, cohort, key, number, table)
        state = self._stepped(state, number, policy, combined, fate, table)
        reported = RoundMetrics(metrics, masks.upload, masks.download, state.halted)
        return state, private, reported if fate is None else came_true(reported, fate)

    def _stepped(
        self,
        old: ServerState,
        number: Array,
        policy: PyTree,
        combined: Combined,
        fate: Fate | None,
        table: LayerTable,
    ) -> ServerState:
        """The server's step, unless there is nothing to go on with."""
        variables, optimizer = server_step(
            self.server_optimizer,
            old.optimizer,
            old.variables,
            combined.update,
            combined.weight,
            table,
        )
        # Once a round had nobody to average, or its result is not finite, everything stands still:
        # the host, which reads metrics a round late, finds it as it was.
        nobody = combined.counted <= 0
        new = ServerState(
            variables, policy, combined.state, optimizer, old.client_scale, number, nobody
        )
        if fate is not None:
            # That no honest client came through is no fault of the model: time passes.
            awaited = ((fate.outcome == Outcome.ARRIVED) & ~fate.corrupt).any()
            if self.combination.privacy is None:  # with it, noise is published all the same
                stood = old._replace(policy=policy, round=number)
                void = nobody & ~awaited
                new = jax.tree.map(lambda n, o: jnp.where(void, o, n), new, stood)
            nobody = nobody & awaited
        halted = old.halted | nobody | ~is_finite(variables)
        new, old = (x._replace(halted=halted) for x in (new, old))
        return jax.tree.map(lambda n, o: jnp.where(halted, o, n), new, old)

    def _lanes(
        self,
        cohort: Cohort,
        sent: Sent,
        fate: Fate | None,
        plan: Plan,
        examples: Examples,
    ) -> Lane:
        size, rows, lot = cohort.size, cohort.rows, None
        if plan.data == HOST:  # rows of all devices' examples -> rows of the device's own
            rows = rows % (examples.labels.shape[0] // (plan.devices or 1))
        if fate is not None:
            arrives = fate.outcome == Outcome.ARRIVED
            lot = Lot(arrives, fate.corrupt, cohort.conditions.strength)
            if _lost_skip(cohort, plan):
                size = jnp.where(arrives, size, 0)
        return Lane(Client(cohort.client, size, rows), sent, lot)

    def _scale(self, state: ServerState, number: Array) -> Array | None:
        if self.client_schedule is None:
            return None
        if callable(self.client_schedule):
            return jnp.asarray(self.client_schedule(number), jnp.float32)
        return state.client_scale

    def _level(
        self,
        level: Submodel,
        table: LayerTable,
        example: Batch,
        cohort: Cohort,
        plan: Plan,
    ) -> Level:
        """One client at one level: train, then make of the update what is summed or stacked."""
        corruption = None if cohort.conditions is None else cohort.conditions.kind

        def run(shared: Shared, lane: Lane, own: Packed, active: Array, bounds: Any) -> Any:
            task = level.task
            if corruption == "label_flip" and lane.lot is not None:
                task = with_flipped_labels(task, lane.lot)
            train = local_update(
                task,
                self.client_optimizer,
                self.work,
                cohort.even_size,
                alone=plan.width == 1,
                all_train=not _lost_skip(cohort, plan),
            )
            start = level.extract(shared.variables)
            if self.submodels.persist:
                head = unpack(own, level.private_shapes)
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
            counted = active
            if lane.lot is not None:
                attack = client_key(shared.key, shared.round, lane.client.id, Purpose.ATTACK)
                update = corrupted(corruption, update, lane.lot, attack)
                counted = counted & lane.lot.arrives
            counted = is_finite((update, new_head)) & counted
            summed, stacked = self.combination.of_client(
                update, lane.sent, counted, shared.bound, table, level, shared.variables
            )
            if self.submodels.persist:
                new_head = jax.tree.map(lambda n, o: jnp.where(counted, n, o), new_head, head)
                own = pack(new_head, {dtype: x.size for dtype, x in own.items()})
            return summed, (metrics._replace(finite=counted), stacked), own

        def embed(shared: Shared, total: Any) -> Any:
            return self.combination.embed(total, level, shared.variables)

        return Level(run, lambda lanes: loop_bounds(lanes.client.size, self.work), embed)


def _lost_skip(cohort: Cohort, plan: Plan) -> bool:
    """Lost clients take no step; but those vmapped with others take theirs all the same."""
    return cohort.conditions is not None and plan.width == 1


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
