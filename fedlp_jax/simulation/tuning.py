"""The quickest plan for a run, found by measuring whole rounds."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from fedlp_jax.errors import FedLPError, is_number, shown
from fedlp_jax.execution.map_clients import DEVICE, HOST, Plan
from fedlp_jax.simulation.rounds import Rounds, without_plan
from fedlp_jax.simulation.run import Simulation

_TURNS = 3  # of a plan, each beside one of the quickest so far; more where they are short
_MOST_TURNS = 9
_ENOUGH_SECONDS = 1.0  # of a plan's turns together, after which no more than _TURNS are made
_TURN_SECONDS = 0.2  # as many rounds make a turn, so that the host's work overlaps with them
_MOST_ROUNDS = 64
_WORTH = 0.97  # a plan is taken for another if it needs less than this share of its time
_HOPELESS = 1.6  # times as slow as the quickest: what lies beyond is not looked at
_AT_ONCE = (4, 16)  # rounds; more has won nothing where it was measured
_COARSE = 4  # factor between widths, before those beside the quickest are tried


class Trial(NamedTuple):
    """One measured plan.

    `seconds` and `best_so_far` are medians over turns that alternated, so the ratio of the two is
    known better than either.
    """

    plan: Plan
    seconds: float  # of a round
    best_so_far: float  # of the quickest plan before, in the same turns
    compile_seconds: float
    error: str = ""  # why it was not measured

    @property
    def ratio(self) -> float:
        """Its time as a share of that of the quickest before; infinite if it cannot run."""
        return math.inf if self.error else self.seconds / self.best_so_far


class Tuning(NamedTuple):
    """What `tune` found."""

    best: Plan
    trials: list[Trial]  # in the order they were measured; the first is the default plan
    left_out: list[Plan]  # for which no time was left


def tune(
    arguments: Mapping[str, Any],
    seconds: float = 120.0,
    say: Callable[[Trial], None] = lambda trial: None,
    prepare: Callable[..., Callable[[Sequence[int]], float]] = Rounds,
) -> Tuning:
    """Measures whole rounds under several plans, each beside the quickest before.

    The default plan comes first. Then, on all devices, on half of them and so on down to one,
    widths four times as large and as small follow for as long as they are not hopeless, then the
    widths beside the best, and at last that plan with its data on the host, and with several rounds
    at once where they are short.

    Args:
      arguments: of `simulate`, as from `experiment.build`; its plan counts for nothing.
      seconds: no plan is begun after so long; the default and one other always are.
      say: called after each plan.
      prepare: `(**arguments of Simulation) -> once`, where `once(rounds)` is the seconds that the
        rounds of these numbers take. All plans are given the same ones.

    Returns:
      The quickest plan, and all that were measured. A plan replaces an earlier one only if its
      rounds take less than 0.97 of the time, so that chance does not choose.

    Raises:
      FedLPError: `seconds` is not a positive number, or the default plan cannot run.
    """
    fixed = without_plan(arguments)
    bench = _Bench(prepare, fixed, time.monotonic() + check_seconds(seconds), say)
    plan, cohort = _default(fixed)
    bench.begin(plan)
    _search(bench, cohort, one_by_one=arguments["algorithm"].persist)
    return Tuning(bench.best, bench.trials, bench.left_out)


def check_seconds(seconds: float) -> float:
    """Refuses what is no time to measure for.

    Raises:
      FedLPError: not a positive number.
    """
    if not (is_number(seconds) and math.isfinite(seconds) and seconds > 0):
        raise FedLPError(f"seconds={shown(seconds)} must be a positive number.")
    return seconds


def describe(tuning: Tuning) -> str:
    """The plan found, in a sentence."""
    first = tuning.trials[0].plan
    if _same(tuning.best, first):
        return f"The default plan is the quickest: {words(first)}."
    return f"The quickest plan: {words(tuning.best)}, where the default is {words(first)}."


def words(plan: Plan) -> str:
    """`"devices 2, width 8, data device, rounds_at_once 1"`."""
    return ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(plan).items())


class _Bench:
    """Measures plans one by one and keeps the quickest ready, to be measured beside the next."""

    def __init__(
        self,
        prepare: Callable[..., Callable[[Sequence[int]], float]],
        arguments: Mapping[str, Any],
        end: float,
        say: Callable[[Trial], None],
    ):
        self._prepare, self._arguments, self._end, self._say = prepare, arguments, end, say
        self.trials: list[Trial] = []
        self.left_out: list[Plan] = []

    def begin(self, plan: Plan) -> None:
        """Measures the default plan, and by it how many rounds a turn has."""
        self.best = plan
        once = self._prepare(**self._arguments, plan=plan)
        once([1])  # what is slow for the first time only
        rounds = int(_TURN_SECONDS / max(once([1]), 1e-9))
        self._rounds = range(1, 1 + min(max(rounds, 1), _MOST_ROUNDS))
        self._best_once = once
        self._note(self._measured(plan, once, None))

    @property
    def rounds_are_short(self) -> bool:
        """Whether several could be one call, whose numbers are seen within a second."""
        return len(self._rounds) > 1

    def ratio(self, plan: Plan) -> float:
        """The time of a plan as a share of that of the quickest before, which it may replace.

        That of a plan met before is what it was then; without one, infinite.
        """
        for trial in self.trials:
            if _same(plan, trial.plan):
                return trial.ratio
        if any(_same(plan, other) for other in self.left_out):
            return math.inf
        if time.monotonic() > self._end and len(self.trials) > 1:
            self.left_out.append(plan)
            return math.inf
        try:
            once = self._prepare(**self._arguments, plan=plan)
            trial = self._measured(plan, once, self._best_once)
        # As where the memory does not suffice, by our own count or the device's.
        except (FedLPError, jax.errors.JaxRuntimeError) as error:
            self._note(Trial(plan, math.nan, math.nan, math.nan, str(error)))
            return math.inf
        self._note(trial)
        if trial.ratio < _WORTH:
            self.best, self._best_once = plan, once
        return trial.ratio

    def _measured(
        self,
        plan: Plan,
        once: Callable[[Sequence[int]], float],
        rival: Callable[[Sequence[int]], float] | None,
    ) -> Trial:
        once(self._rounds)
        own: list[float] = []
        other: list[float] = []
        while len(own) < _TURNS or (len(own) < _MOST_TURNS and sum(own) < _ENOUGH_SECONDS):
            if rival is not None:
                other.append(rival(self._rounds) / len(self._rounds))
            own.append(once(self._rounds) / len(self._rounds))
        median = statistics.median(own)
        against = statistics.median(other) if other else median
        return Trial(plan, median, against, getattr(once, "compile_seconds", 0.0))

    def _note(self, trial: Trial) -> None:
        self.trials.append(trial)
        self._say(trial)


def _default(arguments: Mapping[str, Any]) -> tuple[Plan, int]:
    """The plan of a run that names none, and C; what it puts on the devices is let go."""
    run = Simulation(**arguments, rounds=0)
    return run.plan, run.size


def _search(bench: _Bench, cohort: int, one_by_one: bool) -> None:
    """Tries plans around the default, coarsely and then finely."""
    devices = bench.best.devices or 1
    while devices:
        widest = -(-cohort // devices)
        start = min(bench.best.width or 1, widest)
        fewer = dataclasses.replace(bench.best, devices=devices, width=start)
        if bench.ratio(fewer) < _HOPELESS:
            for widths in (_up(start, widest), _down(start)):
                for width in widths:
                    if bench.ratio(dataclasses.replace(fewer, width=width)) > _HOPELESS:
                        break
        devices //= 2
    for factor in (2.0, 0.5):
        best = bench.best
        width = int((best.width or 1) * factor)
        while 1 <= width <= -(-cohort // (best.devices or 1)):
            if bench.ratio(dataclasses.replace(best, width=width)) > _WORTH:
                break
            width = int(width * factor)
    best = bench.best
    for factor in (1.5, 0.75):
        width = int((best.width or 1) * factor)
        if 1 <= width <= -(-cohort // (best.devices or 1)):
            bench.ratio(dataclasses.replace(best, width=width))
    if bench.best.data == DEVICE:  # where it is HOST, the devices have no room
        bench.ratio(dataclasses.replace(bench.best, data=HOST))
    if bench.best.data == DEVICE and bench.rounds_are_short and not one_by_one:
        for rounds in _AT_ONCE:
            if bench.ratio(dataclasses.replace(bench.best, rounds_at_once=rounds)) > _WORTH:
                break


def _up(width: int, widest: int) -> list[int]:
    widths = []
    while (width := _COARSE * width) < widest:
        widths.append(width)
    return [*widths, widest]


def _down(width: int) -> list[int]:
    widths = []
    while width > 1:
        width = max(width // _COARSE, 1)
        widths.append(width)
    return widths


def _same(one: Plan, other: Plan) -> bool:
    return dataclasses.astuple(one) == dataclasses.astuple(other)
