"""What a run will take on this machine: it is compiled, and a few of its rounds are timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import psutil

from fedlp_jax.errors import check_number
from fedlp_jax.execution.plan import Plan, free_bytes, needed_bytes
from fedlp_jax.simulation.tuning import Rounds

_TURNS = 3
_MOST_ROUNDS = 64  # of a turn


class Estimate(NamedTuple):
    """Times are measured; bytes of a device are XLA's prediction for the compiled round."""

    plan: Plan  # that fits the memory
    compile_seconds: float  # of round and evaluation, tracing included
    round_seconds: float  # median over turns
    rounds_timed: int
    test_seconds: float  # of one evaluation
    tests: int  # evaluations of the whole run
    rounds: int
    device_bytes: int | None  # on each device: arguments, results and temporaries
    free_bytes: int | None  # on each device, while the arguments are there
    process_bytes: int  # of this process, measured

    @property
    def total_seconds(self) -> float:
        """Of the whole run: compilation, its rounds and its evaluations."""
        running = self.rounds * self.round_seconds + self.tests * self.test_seconds
        return self.compile_seconds + running


def estimate(arguments: Mapping[str, Any], seconds: float = 5.0) -> Estimate:
    """Compiles a run and times a few of its rounds, from the initial model.

    Args:
      arguments: of `simulate`, as from `config.build`.
      seconds: about how long to time rounds; at least a round is timed three times.

    Raises:
      FedLPError: bad input, or a round that does not fit the memory.
    """
    budget = check_number("seconds", seconds, gt=0)
    ignored = ("rounds", "eval_every", "early_stop")
    timed = Rounds(**{key: value for key, value in arguments.items() if key not in ignored})
    run = timed.run
    timed([1])  # warms up
    once = timed([1])
    count = min(max(int(budget / _TURNS / max(once, 1e-9)), 1), _MOST_ROUNDS)
    turns = [timed(range(1, 1 + count)) / count for _ in range(_TURNS)]
    assert run.program is not None
    tests = [
        _seconds(run.program.test, run.state.variables, *run.stage.tested())
        for _ in range(1 + _TURNS)
    ]
    rounds, every = arguments["rounds"], arguments.get("eval_every") or max(arguments["rounds"], 1)
    memory, need = run.program.round.memory_analysis(), needed_bytes(run.program.round)
    return Estimate(
        run.plan,
        sum(run.program.seconds.values()),
        statistics.median(turns),
        _TURNS * count,
        statistics.median(tests[1:]),  # the first warms up
        -(-rounds // every),
        rounds,
        None if need is None else need + int(memory.argument_size_in_bytes),
        free_bytes(run.plan),
        psutil.Process().memory_info().rss,
    )


def _seconds(program: Any, *arguments: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - start
