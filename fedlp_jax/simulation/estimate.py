"""What a run will take on this machine: it is compiled, and a few of its rounds are timed."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import psutil

from fedlp_jax.errors import FedLPError, check_number
from fedlp_jax.execution.plan import Plan, free_bytes, needed_bytes
from fedlp_jax.simulation.run import Run
from fedlp_jax.simulation.scaling import Pace, load
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
      seconds: about how long to time rounds. One round warms up; then at least one is timed, and
        only one if it takes longer than this.

    Raises:
      FedLPError: bad input, or a round that does not fit the memory.
    """
    budget = check_number("seconds", seconds, gt=0)
    timed = Rounds(**of_rounds(arguments))
    run = timed.run
    turns, (count,) = _turns([timed], budget)
    assert run.program is not None
    tested = run.state.variables, *run.stage.tested()
    _seconds(run.program.test, *tested)  # warms up
    tests = [_seconds(run.program.test, *tested)]
    while len(tests) < _TURNS and sum(tests) < budget:
        tests.append(_seconds(run.program.test, *tested))
    rounds, every = arguments["rounds"], arguments.get("eval_every") or max(arguments["rounds"], 1)
    memory, need = run.program.round.memory_analysis(), needed_bytes(run.program.round)
    return Estimate(
        run.plan,
        sum(run.program.seconds.values()),
        statistics.median(turn[0] for turn in turns),
        len(turns) * count,
        statistics.median(tests),
        -(-rounds // every),
        rounds,
        None if need is None else need + int(memory.argument_size_in_bytes),
        free_bytes(run.plan),
        psutil.Process().memory_info().rss,
    )


def measure_pace(arguments: Mapping[str, Any], seconds: float = 5.0) -> tuple[Pace, Run]:
    """Times rounds of the whole cohort and of one client on each device: a step, and what remains.

    All devices of the plan work at once, as they do in a run. Where a cohort of one client on each
    device is impossible, or the whole one is no larger, all of a round counts as its steps.

    Args:
      arguments: of `simulate`, as from `config.build`.
      seconds: about how long to time rounds, as for `estimate`.

    Returns:
      The pace of one of these devices, and the run.

    Raises:
      FedLPError: bad input, or a round that does not fit the memory.
    """
    budget = check_number("seconds", seconds, gt=0)
    settings = of_rounds(arguments)
    whole = Rounds(**settings)
    devices = whole.run.plan.devices or 1
    timed = [whole]
    if whole.run.size > devices:
        with contextlib.suppress(FedLPError):  # a robust rule may need more clients
            timed.append(Rounds(**settings | {"cohort": devices, "plan": whole.run.plan}))
    turns, counts = _turns(timed, budget)
    times = [statistics.median(column) for column in zip(*turns, strict=True)]
    steps = [
        statistics.fmean(load(one.run, devices, r)[0] for r in range(1, 1 + n))
        for one, n in zip(timed, counts, strict=True)
    ]
    return pace_between(times, steps), whole.run


def pace_between(seconds: Sequence[float], steps: Sequence[float]) -> Pace:
    """The line through rounds of one or two lengths, the longer first; it has no negative part.

    Args:
      seconds: of a round.
      steps: of its busiest device.
    """
    step = seconds[0] / steps[0]
    if len(steps) == 1 or steps[0] <= steps[1]:
        return Pace(step)
    slope = (seconds[0] - seconds[1]) / (steps[0] - steps[1])
    slope = min(slope, step) if slope > 0 else step
    return Pace(slope, seconds[0] - slope * steps[0])


def of_rounds(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `simulate` that `Simulation` takes, but for the number of rounds."""
    ignored = ("rounds", "eval_every", "early_stop")
    return {key: value for key, value in arguments.items() if key not in ignored}


def _turns(timed: Sequence[Rounds], seconds: float) -> tuple[list[list[float]], list[int]]:
    """Times rounds of programs, which take turns; no turn begins once `seconds` have passed.

    Returns:
      Seconds of a round of each program, for one to three turns; how many rounds each has a turn.
    """
    for one in timed:
        one([1])  # warms up
    first = [one([1]) for one in timed]
    spent, each = sum(first), seconds / len(timed) / _TURNS
    counts = [min(max(int(each / max(time, 1e-9)), 1), _MOST_ROUNDS) for time in first]
    if spent >= seconds:
        counts = [1] * len(timed)
    turns = [first] if max(counts) == 1 else []
    while len(turns) < _TURNS and (not turns or spent < seconds):
        turns.append([one(range(1, 1 + n)) / n for one, n in zip(timed, counts, strict=True)])
        spent += sum(time * n for time, n in zip(turns[-1], counts, strict=True))
    return turns, counts


def _seconds(program: Any, *arguments: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - start
