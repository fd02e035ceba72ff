"""Calls of the compiled round: of one round, or of several that follow each other in one program.

Several rounds are a loop with a traced trip count around the same round, so that every number of
them, up to that of the plan, is one program, and their bits do not depend on how many are called.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.execution.map_clients import Plan, over_clients, over_clients_of_rounds, replicated
from fedlp_jax.execution.packing import entry, with_entry
from fedlp_jax.nn import conv
from fedlp_jax.types import Array, Cohort, Examples, RoundMetrics, ServerState

# A device runs one operation after the other, so an order for the least memory is the quicker one:
# what was just written is still in the cache (3 to 5% of a round of convolutions).
_CPU_OPTIONS = {"xla_cpu_enable_concurrency_optimized_scheduler": False}


class Pending(NamedTuple):
    """A dispatched round whose numbers the host has not read."""

    round: int
    cohort: Cohort  # numpy
    metrics: RoundMetrics  # on the device
    tested: dict[str, Any] | None
    place: int = 0  # among the rounds of its call
    of: int = 1  # rounds of its call
    stacked: bool = False  # the metrics are those of all rounds of the call, [R, ...]


def one_round(algorithm: Algorithm, plan: Plan) -> Any:
    """`(state, private, examples, cohort, key) -> (state, private, metrics)`, to be compiled."""
    everywhere, split = replicated(plan), over_clients(plan)
    return jax.jit(
        lambda state, private, examples, cohort, key: algorithm.round(
            state, private, examples, cohort, key, plan
        ),
        donate_argnums=(0, 1),
        out_shardings=(everywhere, split, _shardings(split, everywhere)),
    )


def several_rounds(algorithm: Algorithm, plan: Plan) -> Any:
    """`(state, examples, cohorts, count, key) -> (state, metrics)`, to be compiled.

    Cohorts and metrics are stacked, `[R, ...]`; the first `count` rounds are run.
    """
    everywhere, split = replicated(plan), over_clients_of_rounds(plan)
    shardings = _shardings(split, everywhere)

    def run(
        state: ServerState, examples: Examples, cohorts: Cohort, count: Array, key: Array
    ) -> tuple[ServerState, RoundMetrics]:
        @functools.partial(jax.jit, inline=True)  # traced once, for its shapes and for the loop
        def round_of(state: ServerState, cohort: Cohort) -> tuple[ServerState, RoundMetrics]:
            state, _, metrics = algorithm.round(state, {}, examples, cohort, key, plan)
            return state, metrics

        def body(i: Array, carry: Any) -> Any:
            state, stack = carry
            state, metrics = round_of(state, entry(cohorts, i))
            return state, with_entry(stack, i, metrics)

        shapes = jax.eval_shape(round_of, state, entry(cohorts, 0))[1]
        rounds = cohorts.client.shape[0]
        stack = jax.tree.map(lambda x: jnp.zeros((rounds, *x.shape), x.dtype), shapes)
        return jax.lax.fori_loop(0, count, body, (state, stack))

    return jax.jit(run, donate_argnums=0, out_shardings=(everywhere, shardings))


class Compiled(NamedTuple):
    """A program, and what it took to make it."""

    program: Any
    seconds: dict[str, float]  # of "trace", "lowering" and "compile"
    lowerings: dict[str, str]  # of its convolutions, see `conv.recording`


def compiled(program: Any, arguments: tuple[Any, ...]) -> Compiled:
    """Traces, lowers and compiles what `jax.jit` made."""
    start = time.perf_counter()
    with conv.recording() as lowerings:
        traced = program.trace(*arguments)
    lowering = time.perf_counter()
    lowered = traced.lower()
    compiling = time.perf_counter()
    executable = _executable(lowered)
    seconds = (lowering - start, compiling - lowering, time.perf_counter() - compiling)
    names = ("trace", "lowering", "compile")
    return Compiled(executable, dict(zip(names, seconds, strict=True)), lowerings)


def _executable(lowered: Any) -> Any:
    if jax.default_backend() != "cpu":
        return lowered.compile()
    try:
        return lowered.compile(compiler_options=_CPU_OPTIONS)
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return lowered.compile()  # another version of XLA


def metrics_of(pending: Pending, read: Callable[[Any], Any]) -> tuple[RoundMetrics, Any]:
    """A round's own numbers and its test, read from the device."""
    metrics, tested = read((pending.metrics, pending.tested))
    if pending.stacked:
        metrics = jax.tree.map(lambda x: x[pending.place], metrics)
    return metrics, tested


def _shardings(split: Any, everywhere: Any) -> RoundMetrics:
    return RoundMetrics(split, split, split, cast(Any, everywhere), split)
