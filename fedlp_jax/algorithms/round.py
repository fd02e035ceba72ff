"""One round of a composed algorithm: `run_round` for the cohort, on `train_client` for each."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fedlp_jax.accounting.ledger import layers_of_levels
from fedlp_jax.aggregation.pipeline import layers_of_payload, separated
from fedlp_jax.aggregation.reducer import Aggregate, Received, UploadInfo
from fedlp_jax.aggregation.server import Reduced, gated, server_step
from fedlp_jax.aggregation.uploads import check_counted
from fedlp_jax.algorithms.client_round import (
    Broadcast,
    ClientInput,
    ClientProgram,
    Parts,
    client_state,
    payload_like,
    train_client,
)
from fedlp_jax.clients.asynchrony import first_versions
from fedlp_jax.clients.local_training import Client, is_finite, loop_bounds
from fedlp_jax.clients.outcomes import (
    ClientOutcome,
    ClientStatus,
    Outcomes,
    draw_outcomes,
    with_outcomes,
)
from fedlp_jax.data.batching import example_of
from fedlp_jax.errors import FedLPError
from fedlp_jax.execution.client_state import ClientState
from fedlp_jax.execution.compilation import Same
from fedlp_jax.execution.map_clients import Level, map_sum, with_entry
from fedlp_jax.execution.packing import Packed
from fedlp_jax.execution.plan import HOST, Plan
from fedlp_jax.prng import initial_key
from fedlp_jax.pruning.layers import LayerRule, LayerTable, layer_table, order_of_use
from fedlp_jax.pruning.masks import Feedback, Masks
from fedlp_jax.pruning.submodels import Submodel
from fedlp_jax.types import (
    NO_TERMS,
    Array,
    Batch,
    Cohort,
    Examples,
    PyTree,
    RoundMetrics,
    ServerState,
    Variables,
    cast_like,
)

_TASKS = 32  # whose first draw is kept in the process


def initial_state(
    parts: Parts, key: Array, example: Batch, clients: int, variables: Variables | None = None
) -> ServerState:
    """The state before the first round; see `Algorithm.init`."""
    if variables is None:
        draw = _drawing(Same(parts.submodels.init), Same(parts.task))
        variables = draw(initial_key(key), example)
    variables = parts.submodels.of_server(variables)
    table = layer_table(variables, parts.layers)
    if parts.policy.needs_order:
        table = dataclasses.replace(table, order=order_of_use(parts.task, table, example))
    if parts.upload is not None:
        check_counted(parts.upload, table)
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
        algorithm=_first_terms(parts, variables, clients),
    )


@functools.lru_cache(maxsize=_TASKS)
def _drawing(init: Same, task: Same) -> Callable[[Array, Batch], Variables]:
    """(key, example) -> the first variables; compiled once for all runs of a task."""
    return jax.jit(lambda key, example: init.value(task.value, key, example))


def _first_terms(parts: Parts, variables: Variables, clients: int) -> Any:
    """What the algorithm keeps on the server."""
    if parts.asynchrony is not None:
        return first_versions(parts.asynchrony, variables)
    return () if parts.server_rule is None else parts.server_rule.init(variables["params"], clients)


def client_states(parts: Parts, variables: Variables, example: Batch) -> tuple[ClientState, ...]:
    """What clients of each level keep between rounds; see `Algorithm.client_state`."""
    levels = parts.submodels.levels(parts.task, variables, example)
    return tuple(client_state(parts, level, variables, example) for level in levels)


def run_round(
    parts: Parts,
    state: ServerState,
    clients: Packed,
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
    rests = _resting(parts, masks, coverage, cohort)

    # Train every client at its level, unless it is lost. Sum or stack what they send.
    outcomes = None
    if cohort.conditions is not None:
        wire = parts.wire(layers_of_levels(table, tables) if parts.submodels.slices else table)
        work = parts.work
        outcomes = draw_outcomes(key, number, cohort, masks, wire, levels, tables, work, example)
    a = cohort.size.astype(jnp.float32)
    uploads = UploadInfo(a if parts.by_examples else jnp.ones_like(a), masks.upload, masks.keep)
    broadcast = _broadcast(parts, state, number, examples, key)
    payload = payload_like(parts, state.variables, broadcast.terms)
    summed, (metrics, stacked, bits, sent), clients = map_sum(
        [
            _level(parts, level, layers_of_payload(layers, payload), payload, example, cohort, plan)
            for level, layers in zip(levels, tables, strict=True)
            if not level.idle  # it comes after the others
        ],
        broadcast,
        _client_inputs(parts, cohort, masks, uploads, outcomes, plan, examples),
        cohort.segment,
        plan,
        sharded=_sharded(plan),
        client_state=clients,
        widths=cohort.widths,
    )

    # Reduce the cohort, and step the server.
    pipeline, finite, numbers = parts.pipeline, metrics.finite, state.aggregator
    contributions = stacked if pipeline.reducer.stacked else summed
    received = Received(contributions, uploads, finite, cohort.client)
    of_payload = layers_of_payload(table, payload)
    masks, received = _with_fewer_layers(parts, masks, sent, received, numbers, of_payload)
    aggregate = pipeline.reduce(received, cohort, numbers, of_payload, plan)
    aggregate = pipeline.privatize(aggregate, received, cohort, numbers, key, number, table)
    senders = jnp.where(finite[:, None], masks.upload, 0.0).sum(axis=0)  # f32[L], that count
    policy = _learned(parts, policy, state, aggregate, senders, finite, cohort, table)
    state = _step_server(parts, state, number, policy, aggregate, rests, senders, outcomes, table)
    reported = RoundMetrics(metrics, masks.upload, masks.download, state.halted, bits)
    return state, clients, reported if outcomes is None else with_outcomes(reported, outcomes)


def _with_fewer_layers(
    parts: Parts,
    masks: Masks,
    sent: Array | tuple[()],
    received: Received,
    numbers: PyTree,
    layers: LayerTable,
) -> tuple[Masks, Received]:
    """The masks and what the server has, where fewer layers are sent than were drawn.

    `sent: f32[D * P, L]` is what clients decided by their updates; () = they did not.
    """
    if parts.pipeline.reducer.select is not None:
        sent = parts.pipeline.select(received, numbers, layers)
    if isinstance(sent, tuple):
        return masks, received
    uploads = received.uploads._replace(mask=sent)
    return masks._replace(upload=sent), received._replace(uploads=uploads)


def _level(
    parts: Parts,
    level: Submodel,
    layers: LayerTable,
    payload: Variables,
    example: Batch,
    cohort: Cohort,
    plan: Plan,
) -> Level:
    """The work of one level, as `map_sum` runs it."""
    kept = client_state(parts, level, separated(payload)[0], example)
    by_epochs = parts.work.steps is None and not _lost_skip(cohort, plan)
    program = ClientProgram(
        parts,
        level,
        layers,
        kept.shapes,
        example,
        corruption=None if cohort.conditions is None else cohort.conditions.kind,
        even_size=cohort.even_size,
        alone=plan.width == 1 and not plan.known_trip_counts,
        lost_skip=_lost_skip(cohort, plan),
        largest=cohort.like_size if by_epochs else None,
    )
    sizes = jnp.asarray(cohort.buckets, jnp.int32)

    def embed(broadcast: Broadcast, summed: PyTree) -> PyTree:
        if program.embeds:
            return summed
        like = payload_like(parts, broadcast.variables, broadcast.terms)
        return parts.pipeline.reducer.embed(summed, level, like, layers)

    return Level(
        partial(train_client, program),
        lambda inputs: loop_bounds(inputs.client.size, parts.work),
        embed,
        [
            partial(train_client, dataclasses.replace(program, largest=size), bounds=None)
            for size in cohort.buckets
        ],
        lambda inputs: jnp.searchsorted(sizes, inputs.client.size.max()).astype(jnp.int32),
    )


def _broadcast(
    parts: Parts, state: ServerState, number: Array, examples: Examples, key: Array
) -> Broadcast:
    """What every client of a round reads."""
    rule = parts.server_rule
    return Broadcast(
        state.variables,
        examples,
        key,
        number,
        scale=_client_scale(parts, state, number),
        bound=parts.pipeline.bound(state.aggregator),
        terms=NO_TERMS if rule is None else rule.broadcast(state.algorithm),
        versions=state.algorithm if parts.asynchrony is not None else None,
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
    parts: Parts,
    cohort: Cohort,
    masks: Masks,
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
    return ClientInput(
        Client(cohort.client, size, rows),
        uploads,
        outcome,
        cohort.staleness,
        train=masks.train,
        download=masks.download if parts.policy.keeps_models else None,
    )


def _step_server(
    parts: Parts,
    old: ServerState,
    number: Array,
    policy: PyTree,
    aggregate: Aggregate,
    rests: Array | None,
    senders: Array,
    outcomes: Outcomes | None,
    table: LayerTable,
) -> ServerState:
    """The server's step, unless the run has halted.

    A round halts the run if nobody counted or its result is not finite. Everything then stands
    still until the host, which reads metrics a round late, finds it as it was.
    """
    update, terms = _apply_rule(parts, old.algorithm, aggregate, senders, table)
    gate = aggregate.gate
    if rests is not None:  # single entries are gated where clients hold slices
        gate = jax.tree.map(jnp.logical_or, table.expand(gate), table.expand(rests))
    variables, optimizer = server_step(
        parts.server_optimizer, old.optimizer, old.variables, update, gate, table
    )
    if parts.asynchrony is not None:
        place = number % (parts.asynchrony.most + 1)
        terms = terms._replace(ring=with_entry(terms.ring, place, variables))
    unchanged = old._replace(policy=policy, round=number)
    new = unchanged._replace(variables=variables, optimizer=optimizer, algorithm=terms)
    nobody = aggregate.cohort_weight <= 0
    if outcomes is not None:
        # If no honest client arrived, the model is not to blame: time passes, the run continues.
        expected = ((outcomes.status == ClientStatus.ARRIVED) & ~outcomes.corrupt).any()
        if parts.pipeline.privacy is None:  # under privacy, noise is released all the same
            void = nobody & ~expected
            new = jax.tree.map(lambda n, o: jnp.where(void, o, n), new, unchanged)
        nobody = nobody & expected
    halted = old.halted | nobody | ~is_finite((variables, terms))
    new, old = (x._replace(halted=halted) for x in (new, old))
    return jax.tree.map(lambda n, o: jnp.where(halted, o, n), new, old)


def _resting(parts: Parts, masks: Masks, coverage: Array, cohort: Cohort) -> Array | None:
    """`bool[L]`, layers that move though clients were told not to send them; None = none does."""
    if parts.server_rule is None or not parts.server_rule.moves_resting:
        return None
    held = (coverage > 0) & (cohort.client >= 0)[:, None]
    return held.any(axis=0) & ~(masks.upload > 0).any(axis=0)


def _apply_rule(
    parts: Parts, terms: Any, aggregate: Aggregate, senders: Array, table: LayerTable
) -> tuple[Variables, Any]:
    """The update and the terms after the algorithm's rule for the server."""
    if parts.server_rule is None or parts.server_rule.step is None:
        return aggregate.update, terms
    reduced = Reduced(aggregate.update, aggregate.extras, table.expand(senders)["params"])
    with jax.numpy_dtype_promotion("standard"):
        update, new = parts.server_rule.step(terms, reduced)
    new = cast_like(new, terms)
    return update, gated(new, terms, table.expand(aggregate.gate)["params"])


def _learned(
    parts: Parts,
    policy: PyTree,
    old: ServerState,
    aggregate: Aggregate,
    senders: Array,
    counted: Array,
    cohort: Cohort,
    table: LayerTable,
) -> PyTree:
    """The state of the mask policy once it is known what the round came to."""
    if parts.policy.learn is None:
        return policy
    feedback = Feedback(
        params=old.variables["params"],
        update=aggregate.update["params"],
        senders=senders,
        client=cohort.client,
        counted=counted,
        extras=aggregate.extras,
        round=old.round + 1,
        layers=table,
    )
    return parts.policy.learn(policy, feedback)


def _client_scale(parts: Parts, state: ServerState, number: Array) -> Array | None:
    if parts.client_schedule is None:
        return None
    if callable(parts.client_schedule):
        return parts.scale_of(number)
    return state.client_scale


def _lost_skip(cohort: Cohort, plan: Plan) -> bool:
    """Whether lost clients take no step; those vmapped with others take theirs all the same."""
    return cohort.conditions is not None and plan.width == 1 and not plan.known_trip_counts


def _layers_of(
    level: Submodel, variables: Variables, whole: LayerTable, rule: LayerRule
) -> LayerTable:
    return layer_table(jax.eval_shape(level.extract, variables), rule, whole.names)


def _check_whole_layers(
    level: Submodel, depth: int, variables: Variables, whole: LayerTable, rule: LayerRule
) -> None:
    """A layer is averaged as one, so a submodel has all of it or nothing."""
    if level.slices:
        return  # its entries are averaged one by one
    part = _layers_of(level, variables, whole, rule)
    cut = (part.covered > 0) & (part.params + part.statistics < whole.params + whole.statistics)
    if cut.any():
        layer = int(cut.argmax())
        raise FedLPError(
            f"layer '{whole.names[layer]}' is only partly in the submodel of depth {depth} "
            f"({part.params[layer]} of {whole.params[layer]} parameters); choose `layers` so that "
            "each layer is held whole or not at all."
        )
