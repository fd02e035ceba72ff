"""One round of a composed algorithm: `train_client` for ONE client, `run_round` for the cohort."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedlp_jax.aggregation.pipeline import UpdatePipeline
from fedlp_jax.aggregation.reducer import Aggregate, UploadInfo
from fedlp_jax.aggregation.server import server_step
from fedlp_jax.clients.local_training import (
    Bounds,
    Client,
    LocalWork,
    is_finite,
    local_update,
    loop_bounds,
)
from fedlp_jax.clients.outcomes import (
    ClientOutcome,
    ClientStatus,
    Outcomes,
    corrupted,
    draw_outcomes,
    with_flipped_labels,
    with_outcomes,
)
from fedlp_jax.data.batching import example_of
from fedlp_jax.errors import FedLPError
from fedlp_jax.execution.map_clients import Level, map_sum
from fedlp_jax.execution.packing import Packed, pack, unpack
from fedlp_jax.execution.plan import HOST, Plan
from fedlp_jax.prng import BEFORE_FIRST_ROUND, SERVER, Purpose, client_key, head_key
from fedlp_jax.pruning.layers import LayerRule, LayerTable, layer_table
from fedlp_jax.pruning.masks import MaskPolicy
from fedlp_jax.pruning.submodels import Submodel, Submodels
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import (
    Array,
    Batch,
    ClientMetrics,
    Cohort,
    Examples,
    PyTree,
    RoundMetrics,
    ServerState,
    Variables,
)


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of an algorithm, as `compose` puts them together."""

    task: Task
    work: LocalWork
    client_optimizer: optax.GradientTransformation
    submodels: Submodels
    policy: MaskPolicy
    pipeline: UpdatePipeline
    server_optimizer: optax.GradientTransformation
    by_examples: bool  # a_k is the number of examples, else 1
    layers: LayerRule
    client_schedule: float | Callable[[Array], Any] | None


class Broadcast(NamedTuple):
    """What every client of a round reads."""

    variables: Variables
    examples: Examples
    key: Array  # the run's root key
    round: Array  # i32[], from 1
    scale: Array | None  # f32[], factor on client updates
    bound: Array | None  # f32[], largest norm of an upload


class ClientInput(NamedTuple):
    """What one client of a round reads for itself; with a leading slot axis, the cohort."""

    client: Client
    upload: UploadInfo
    outcome: ClientOutcome | None  # None = a run without faults


@dataclasses.dataclass(frozen=True)
class ClientProgram:
    """What all clients at one submodel level have in common, known when the round is traced."""

    parts: Parts
    submodel: Submodel
    layers: LayerTable  # of the submodel, indexed as those of the server's variables
    example: Batch  # one row
    corruption: str | None  # kind, of `fedlp_jax.clients.outcomes.KINDS`
    even_size: int | None  # the size of every client, if it is the same
    alone: bool  # clients are not vmapped with others
    lost_skip: bool  # lost clients take no step


def initial_state(
    parts: Parts, key: Array, example: Batch, clients: int, variables: Variables | None = None
) -> ServerState:
    """The state before the first round; see `Algorithm.init`."""
    if variables is None:
        init_key = client_key(key, BEFORE_FIRST_ROUND, SERVER, Purpose.INIT)
        variables = jax.jit(lambda k: parts.submodels.init(parts.task, k, example))(init_key)
    table = layer_table(variables, parts.layers)
    for depth, level in enumerate(parts.submodels.levels(parts.task, variables, example), 1):
        _check_whole_layers(level, depth, variables, table, parts.layers)
    with jax.numpy_dtype_promotion("standard"):
        optimizer = parts.server_optimizer.init(variables["params"])
    fixed = not callable(parts.client_schedule) and parts.client_schedule is not None
    return ServerState(
        variables,
        policy=parts.policy.init(table, clients),
        aggregator=parts.pipeline.init(variables),
        optimizer=optimizer,
        client_scale=jnp.asarray(parts.client_schedule if fixed else 1.0, jnp.float32),
        round=jnp.zeros((), jnp.int32),
        halted=jnp.zeros((), bool),
    )


def run_round(
    parts: Parts,
    state: ServerState,
    private: Packed,
    examples: Examples,
    cohort: Cohort,
    key: Array,
    plan: Plan,
) -> tuple[ServerState, Packed, RoundMetrics]:
    """One server update; see `Algorithm.round`."""
    number = state.round + 1
    example = example_of(examples)
    table = layer_table(state.variables, parts.layers)
    levels = parts.submodels.levels(parts.task, state.variables, example)

    # Draw the layer masks before training, from (seed, round, client) alone.
    tables = [_layers_of(level, state.variables, table, parts.layers) for level in levels]
    coverage = jnp.stack([jnp.asarray(part.covered) for part in tables])[cohort.level]
    masks, policy = parts.policy.sample(key, state.policy, cohort, number, coverage)

    # Train every client at its level, unless it is lost. Sum or stack what they send.
    outcomes = None
    if cohort.conditions is not None:
        outcomes = draw_outcomes(key, number, cohort, masks, table, levels, parts.work, example)
    a = cohort.size.astype(jnp.float32)
    uploads = UploadInfo(a if parts.by_examples else jnp.ones_like(a), masks.upload, masks.keep)
    broadcast = Broadcast(
        state.variables,
        examples,
        key,
        number,
        scale=_client_scale(parts, state, number),
        bound=parts.pipeline.bound(state.aggregator),
    )
    summed, (metrics, stacked), private = map_sum(
        [
            _level(parts, level, layers, example, cohort, plan)
            for level, layers in zip(levels, tables, strict=True)
        ],
        broadcast,
        _client_inputs(cohort, uploads, outcomes, plan, examples),
        cohort.segment,
        plan,
        sharded=_sharded(plan),
        client_state=private,
    )

    # Reduce the cohort, and step the server.
    pipeline = parts.pipeline
    contributions = stacked if pipeline.reducer.stacked else summed
    aggregate = pipeline.reduce(
        contributions, uploads, metrics.finite, cohort, state.aggregator, table, plan
    )
    aggregate = pipeline.privatize(aggregate, uploads, cohort, state.aggregator, key, number, table)
    state = _step_server(parts, state, number, policy, aggregate, outcomes, table)
    reported = RoundMetrics(metrics, masks.upload, masks.download, state.halted)
    return state, private, reported if outcomes is None else with_outcomes(reported, outcomes)


def train_client(
    program: ClientProgram,
    broadcast: Broadcast,
    inputs: ClientInput,
    private: Packed,
    active: Array,
    bounds: Bounds,
) -> tuple[PyTree, tuple[ClientMetrics, PyTree], Packed]:
    """ONE client's round: train its submodel and prepare its upload.

    Args:
      program: of its level.
      broadcast: what all clients read.
      inputs: what it reads for itself.
      private: its private variables, packed; empty if none are stored.
      active: `bool[]`, False = an idle lane.
      bounds: loop bounds of the clients that are vmapped together.

    Returns:
      What is summed over clients; its metrics and what is stacked; its new private variables.
      A contribution is either summed or stacked, and the other is `()`.
    """
    parts, level, outcome = program.parts, program.submodel, inputs.outcome
    task = level.task
    if program.corruption == "label_flip" and outcome is not None:
        task = with_flipped_labels(task, outcome)
    train = local_update(
        task,
        parts.client_optimizer,
        parts.work,
        program.even_size,
        alone=program.alone,
        all_train=not program.lost_skip,
    )

    # Start from the server's variables and the client's head.
    start = level.extract(broadcast.variables)
    if parts.submodels.persist:
        head = unpack(private, level.private_shapes)
    else:
        head = level.private(head_key(broadcast.key, inputs.client.id), program.example)
    end, metrics = train(
        level.merge(start, head),
        broadcast.examples,
        inputs.client,
        bounds,
        broadcast.key,
        broadcast.round,
        broadcast.scale,
    )
    end, new_head = level.split(end)

    # Send the update, unless the client is lost or its result is not finite.
    update = jax.tree.map(jnp.subtract, end, start)
    counted = active
    if outcome is not None:
        attack = client_key(broadcast.key, broadcast.round, inputs.client.id, Purpose.ATTACK)
        update = corrupted(program.corruption, update, outcome, attack)
        counted = counted & outcome.arrives
    counted = is_finite((update, new_head)) & counted
    contribution = parts.pipeline.prepare(
        update, inputs.upload, counted, broadcast.bound, program.layers
    )
    summed, stacked = contribution, ()
    if parts.pipeline.reducer.stacked:  # alike at all levels, to lie in one stack
        embedded = parts.pipeline.reducer.embed(contribution, level, broadcast.variables)
        summed, stacked = (), embedded

    if parts.submodels.persist:
        new_head = jax.tree.map(lambda n, o: jnp.where(counted, n, o), new_head, head)
        private = pack(new_head, {dtype: x.size for dtype, x in private.items()})
    return summed, (metrics._replace(finite=counted), stacked), private


def _level(
    parts: Parts,
    level: Submodel,
    layers: LayerTable,
    example: Batch,
    cohort: Cohort,
    plan: Plan,
) -> Level:
    """The work of one level, as `map_sum` runs it."""
    program = ClientProgram(
        parts,
        level,
        layers,
        example,
        corruption=None if cohort.conditions is None else cohort.conditions.kind,
        even_size=cohort.even_size,
        alone=plan.width == 1,
        lost_skip=_lost_skip(cohort, plan),
    )

    def embed(broadcast: Broadcast, summed: PyTree) -> PyTree:
        if parts.pipeline.reducer.stacked:
            return summed
        return parts.pipeline.reducer.embed(summed, level, broadcast.variables)

    return Level(
        partial(train_client, program),
        lambda inputs: loop_bounds(inputs.client.size, parts.work),
        embed,
    )


def _sharded(plan: Plan) -> Broadcast:
    """A prefix of `Broadcast`, True where each device gets its own share of an array.

    With data on the host, a device gets the examples of its own clients only.
    """
    whole: Any = False
    on_host: Any = plan.data == HOST
    everything = Broadcast(**dict.fromkeys(Broadcast._fields, whole))
    return everything._replace(examples=Examples(inputs=on_host, labels=on_host, normalize=whole))


def _client_inputs(
    cohort: Cohort,
    uploads: UploadInfo,
    outcomes: Outcomes | None,
    plan: Plan,
    examples: Examples,
) -> ClientInput:
    """The inputs of all slots, `[D * P, ...]`."""
    size, rows, outcome = cohort.size, cohort.rows, None
    if plan.data == HOST:  # rows of all devices' examples -> rows of the device's own
        rows = rows % (examples.labels.shape[0] // (plan.devices or 1))
    if outcomes is not None:
        arrives = outcomes.status == ClientStatus.ARRIVED
        outcome = ClientOutcome(arrives, outcomes.corrupt, cohort.conditions.strength)
        if _lost_skip(cohort, plan):
            size = jnp.where(arrives, size, 0)
    return ClientInput(Client(cohort.client, size, rows), uploads, outcome)


def _step_server(
    parts: Parts,
    old: ServerState,
    number: Array,
    policy: PyTree,
    aggregate: Aggregate,
    outcomes: Outcomes | None,
    table: LayerTable,
) -> ServerState:
    """The server's step, unless the run has halted.

    A round halts the run if nobody counted or its result is not finite. Everything then stands
    still until the host, which reads metrics a round late, finds it as it was.
    """
    variables, optimizer = server_step(
        parts.server_optimizer,
        old.optimizer,
        old.variables,
        aggregate.update,
        aggregate.gate,
        table,
    )
    unchanged = old._replace(policy=policy, round=number)
    new = unchanged._replace(variables=variables, optimizer=optimizer)
    nobody = aggregate.cohort_weight <= 0
    if outcomes is not None:
        # If no honest client arrived, the model is not to blame: time passes, the run continues.
        expected = ((outcomes.status == ClientStatus.ARRIVED) & ~outcomes.corrupt).any()
        if parts.pipeline.privacy is None:  # under privacy, noise is released all the same
            void = nobody & ~expected
            new = jax.tree.map(lambda n, o: jnp.where(void, o, n), new, unchanged)
        nobody = nobody & expected
    halted = old.halted | nobody | ~is_finite(variables)
    new, old = (x._replace(halted=halted) for x in (new, old))
    return jax.tree.map(lambda n, o: jnp.where(halted, o, n), new, old)


def _client_scale(parts: Parts, state: ServerState, number: Array) -> Array | None:
    if parts.client_schedule is None:
        return None
    if callable(parts.client_schedule):
        return jnp.asarray(parts.client_schedule(number), jnp.float32)
    return state.client_scale


def _lost_skip(cohort: Cohort, plan: Plan) -> bool:
    """Whether lost clients take no step; those vmapped with others take theirs all the same."""
    return cohort.conditions is not None and plan.width == 1


def _layers_of(
    level: Submodel, variables: Variables, whole: LayerTable, rule: LayerRule
) -> LayerTable:
    return layer_table(level.extract(variables), rule, whole.names)


def _check_whole_layers(
    level: Submodel, depth: int, variables: Variables, whole: LayerTable, rule: LayerRule
) -> None:
    """A layer is averaged as one, so a submodel has all of it or nothing."""
    part = _layers_of(level, variables, whole, rule)
    cut = (part.covered > 0) & (part.params + part.statistics < whole.params + whole.statistics)
    if cut.any():
        layer = int(cut.argmax())
        raise FedLPError(
            f"layer '{whole.names[layer]}' is only partly in the submodel of depth {depth} "
            f"({part.params[layer]} of {whole.params[layer]} parameters); choose `layers` so that "
            "each layer is held whole or not at all."
        )
