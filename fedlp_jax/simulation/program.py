"""Program: the round and the evaluation of an algorithm, compiled for shapes and shared by runs."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.errors import collecting, note
from fedlp_jax.execution import processes
from fedlp_jax.execution.compilation import Same, executable
from fedlp_jax.execution.packing import Packed
from fedlp_jax.execution.plan import Plan, over_clients, replicated
from fedlp_jax.nn import conv
from fedlp_jax.simulation.evaluation import evaluator
from fedlp_jax.types import Array, Cohort, Examples, RoundMetrics, ServerState

_ALGORITHMS = 32  # traced programs kept in the process


class Program(NamedTuple):
    """The compiled round and evaluation of one plan. It holds no state, so runs may share it.

    Attributes:
      plan: the plan it is compiled for.
      round: see `rounds_of`.
      test: `(variables, examples, ...) -> {suffix: sums}`, see `evaluation.evaluator`.
      lowerings: the form of each convolution, by its shapes.
      seconds: of tracing, lowering and compiling, as "round_trace_seconds"; 0 for what the process
        already had.
    """

    plan: Plan
    round: Any
    test: Any
    lowerings: dict[str, str]
    seconds: dict[str, float]


class Compiled(NamedTuple):
    """An executable, and what it took to make it."""

    program: Any
    seconds: dict[str, float]  # of "trace", "lowering" and "compile"
    lowerings: dict[str, str]  # of its convolutions, see `conv.recording`
    warnings: tuple[str, ...]  # given while it was traced


def rounds_of(algorithm: Algorithm, plan: Plan) -> Any:
    """The rounds of one dispatch, to be traced.

    `(state, clients, examples, cohorts, count, key) -> (state, clients, metrics)`. Arrays of
    cohorts and metrics have the round as second axis, `[D * P, R, ...]`; R is the plan's
    `rounds_at_once`. The first `count` rounds run, in a loop, so their bits do not depend on how
    many there are. With R = 1 `count` is None and there is no loop.
    """
    everywhere, split = replicated(plan), over_clients(plan)
    # The host of every process reads the metrics of all clients.
    of_slots: Any = split if processes.count() == 1 else everywhere
    metrics = RoundMetrics(of_slots, of_slots, of_slots, cast(Any, everywhere), of_slots, of_slots)
    return jax.jit(
        traceable_rounds(algorithm, plan),
        donate_argnums=(0, 1),
        out_shardings=(everywhere, split, metrics),
        keep_unused=True,
    )


def traceable_rounds(algorithm: Algorithm, plan: Plan) -> Callable[..., Any]:
    """The function that `rounds_of` compiles."""

    def run(
        state: ServerState,
        clients: Packed,
        examples: Examples,
        cohorts: Cohort,
        count: Array | None,
        key: Array,
    ) -> tuple[ServerState, Packed, RoundMetrics]:
        @functools.partial(jax.jit, inline=True)  # traced once, for its shapes and for the loop
        def one(state: ServerState, clients: Packed, cohort: Cohort) -> Any:
            return algorithm.round(state, clients, examples, cohort, key, plan)

        if count is None:
            state, clients, metrics = one(state, clients, _at(cohorts, 0))
            halted: Any = metrics.halted[None]
            stacked = jax.tree.map(lambda x: x[:, None], metrics._replace(halted=cast(Any, ())))
            return state, clients, stacked._replace(halted=halted)

        def body(i: Array, carry: Any) -> Any:
            state, clients, stack, halted = carry
            state, clients, metrics = one(state, clients, _at(cohorts, i))
            halted = halted.at[i].set(metrics.halted)
            metrics = metrics._replace(halted=cast(Any, ()))
            stack = jax.tree.map(
                lambda s, x: jax.lax.dynamic_update_index_in_dim(s, x, i, 1), stack, metrics
            )
            return state, clients, stack, halted

        most = cohorts.client.shape[1]
        shapes = jax.eval_shape(one, state, clients, _at(cohorts, 0))[2]
        stack = jax.tree.map(
            lambda x: jnp.zeros((x.shape[0], most, *x.shape[1:]), x.dtype),
            shapes._replace(halted=()),
        )
        carry = (state, clients, stack, jnp.zeros(most, bool))
        if plan.known_trip_counts:
            body = functools.partial(_while_due, body, count)
        trips = most if plan.known_trip_counts else count
        state, clients, stack, halted = jax.lax.fori_loop(0, trips, body, carry)
        return state, clients, stack._replace(halted=halted)

    return run


def _while_due(body: Any, count: Array, i: Array, carry: Any) -> Any:
    """`body`, which changes nothing from round `count` on."""
    return jax.lax.cond(i < count, body, lambda _, carry: carry, i, carry)


def compile_round(algorithm: Algorithm, plan: Plan, shapes: tuple[Any, ...]) -> Compiled:
    """Compiles `rounds_of` for arguments of these shapes and shardings."""
    return _compile("round", algorithm, plan, shapes)


def compile_test(algorithm: Algorithm, plan: Plan, shapes: tuple[Any, ...]) -> Compiled:
    """Compiles the evaluation of arguments of these shapes and shardings."""
    return _compile("test", algorithm, plan, shapes)


def _compile(name: str, algorithm: Algorithm, plan: Plan, shapes: tuple[Any, ...]) -> Compiled:
    """Traces, lowers and compiles, each unless the process has done so for an equal program.

    The same `Algorithm` object with an equal plan and shapes is not traced again. Another object
    is, but its executable is reused if the lowered text is the same.
    """
    devices = tuple(plan.mesh.devices.flat)
    settings = conv.current()  # jax does not see it
    traced = _traceable(name, Same(algorithm), dataclasses.astuple(plan), devices, settings)
    start = time.perf_counter()
    with conv.recording() as lowerings, collecting() as said:
        trace = traced.jitted.trace(*shapes)
    lowering = time.perf_counter()
    # jax returns the jaxpr of before if the shapes and all its own settings are those of before.
    for jaxpr, compiled in traced.compiled:
        if jaxpr is trace.jaxpr:
            note(compiled.warnings)
            return compiled._replace(seconds=dict.fromkeys(compiled.seconds, 0.0))
    lowered = trace.lower()
    compiling = time.perf_counter()
    program = executable(lowered, devices)
    seconds = (lowering - start, compiling - lowering, time.perf_counter() - compiling)
    names = ("trace", "lowering", "compile")
    timed = dict(zip(names, seconds, strict=True))
    compiled = Compiled(program, timed, lowerings, tuple(said))
    traced.compiled.append((trace.jaxpr, compiled))
    return compiled


class _Traceable(NamedTuple):
    """A function under `jax.jit`, and what was compiled from each of its traces."""

    jitted: Any
    compiled: list[tuple[Any, Compiled]]  # by jaxpr


@functools.lru_cache(maxsize=_ALGORITHMS)
def _traceable(
    name: str, algorithm: Same, plan: tuple[Any, ...], devices: Any, settings: Any
) -> _Traceable:
    make = rounds_of if name == "round" else _test_of
    return _Traceable(make(algorithm.value, Plan(*plan)), [])


def _test_of(algorithm: Algorithm, plan: Plan) -> Any:
    return jax.jit(evaluator(algorithm, plan), keep_unused=True)


def _at(cohorts: Cohort, round: Array | int) -> Cohort:
    """The cohort of one round, of arrays `[D * P, R, ...]`."""
    return jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, round, 1, keepdims=False), cohorts
    )
