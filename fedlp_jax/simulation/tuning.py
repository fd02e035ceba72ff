"""The fastest plan for a run, found by timing whole rounds."""

from __future__ import annotations

import collections
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedlp_jax.errors import FedLPError, is_number, shown
from fedlp_jax.execution.plan import DEVICE, Plan
from fedlp_jax.simulation.run import Pending, Simulation

_TURNS = 3  # of a plan, alternating with the fastest so far; more where turns are short
_MOST_TURNS = 9
_ENOUGH_SECONDS = 1.0  # of a plan's turns together; then _TURNS suffice
_TURN_SECONDS = 0.2  # a turn has as many rounds as fit, so that the host's work overlaps
_MOST_ROUNDS = 64
_WORTH = 0.97  # a plan replaces another if it needs less than this share of its time
_HOPELESS = 1.6  # times as slow as the fastest: the search goes no further that way
_AT_ONCE = 16  # rounds a dispatch, tried where rounds are short; more gained nothing


class Rounds:
    """Times rounds of one compiled plan, without evaluation.

    Each call starts from the initial model, so that a model that diverges after a thousand rounds
    does not matter.

    Attributes:
      run: the simulation.
      compile_seconds: of tracing, lowering and compiling the round.
    """

    def __init__(self, *arguments: Any, **settings: Any):
        """Compiles a `Simulation` of these arguments."""
        self.run = Simulation(*arguments, rounds=10**6, **settings)
        self.run.compile()
        self.compile_seconds = sum(
            self.run.readings[f"round_{part}_seconds"] for part in ("trace", "lowering", "compile")
        )
        self.number = 0
        self._first = jax.tree.map(jnp.copy, self.run.state)  # rounds donate theirs

    def __call__(self, rounds: Sequence[int] | None = None) -> float:
        """Seconds to lay out cohorts, run their rounds and read the numbers.

        Private variables that persist are kept, and the next call starts from them.

        Args:
          rounds: numbers of consecutive rounds, dispatched one ahead of what was read, as in
            `simulate`; None = the next round alone.
        """
        if rounds is None:
            self.number += 1
            rounds = (self.number,)
        run, pending = self.run, collections.deque[Pending]()
        run.state = jax.block_until_ready(jax.tree.map(jnp.copy, self._first))
        start = time.perf_counter()
        most = run.plan.rounds_at_once or 1
        for first in range(0, len(rounds), most):
            pending.append(run.dispatch(rounds[first], min(most, len(rounds) - first)))
            if len(pending) > 1:
                run.read(pending.popleft())
        while pending:
            run.read(pending.popleft())
        if run.stage.store is not None:
            jax.block_until_ready(run.stage.store.stacks)
        return time.perf_counter() - start


class Trial(NamedTuple):
    """One timed plan.

    `seconds` and `best_so_far` are medians over alternating turns, so their ratio is more exact
    than either.
    """

    plan: Plan
    seconds: float  # of a round
    best_so_far: float  # of the fastest plan before, in the same turns
    compile_seconds: float
    error: str = ""  # why it was not timed

    @property
    def ratio(self) -> float:
        """Its time over that of the fastest plan before; infinite if it cannot run."""
        return math.inf if self.error else self.seconds / self.best_so_far


class Tuning(NamedTuple):
    """The result of `tune`."""

    best: Plan
    trials: list[Trial]  # in the order of their timing; the first is the default plan
    left_out: list[Plan]  # not begun when time was over


def tune(
    arguments: Mapping[str, Any],
    seconds: float = 120.0,
    say: Callable[[Trial], None] = lambda trial: None,
    prepare: Callable[..., Callable[[Sequence[int]], float]] = Rounds,
) -> Tuning:
    """Times whole rounds under several plans, each in turns with the fastest before.

    The default plan comes first. Then, on all devices, half of them and so on down to one, the
    width is doubled and halved until that is hopeless. Where rounds are short, the fastest plan is
    tried with 16 rounds a dispatch.

    Args:
      arguments: of `simulate`, as from `experiment.build`; its plan is ignored.
      seconds: no plan is begun after so long; the default and one other always are.
      say: called after each plan.
      prepare: `(**arguments of Simulation) -> once`, where `once(rounds)` returns the seconds that
        the rounds of these numbers take. All plans get the same ones.

    Returns:
      The fastest plan, and all that were timed. A plan replaces an earlier one only if its rounds
      take less than 0.97 of the time, so that chance does not choose.

    Raises:
      FedLPError: `seconds` is not a positive number, or the default plan cannot run.
    """
    fixed = without_plan(arguments)
    bench = _Bench(prepare, fixed, time.monotonic() + check_seconds(seconds), say)
    run = Simulation(**fixed, rounds=0)
    plan, cohort = run.plan, run.size
    del run  # and with it the data that it put on the devices
    bench.begin(plan)
    _search(bench, cohort)
    if plan.data == DEVICE and bench.rounds_are_short and not arguments["algorithm"].persist:
        bench.ratio(dataclasses.replace(bench.best, rounds_at_once=_AT_ONCE))
    return Tuning(bench.best, bench.trials, bench.left_out)


def without_plan(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `simulate` without those that are tuned or set its length."""
    ignored = ("rounds", "eval_every", "plan")
    return {key: value for key, value in arguments.items() if key not in ignored}


def check_seconds(seconds: float) -> float:
    """Refuses a time limit that is not a positive number.

    Raises:
      FedLPError: not a positive number.
    """
    if not (is_number(seconds) and math.isfinite(seconds) and seconds > 0):
        raise FedLPError(f"seconds={shown(seconds)} must be a positive number.")
    return seconds


def describe(tuning: Tuning) -> str:
    """The fastest plan, in a sentence."""
    first = tuning.trials[0].plan
    if tuning.best == first:
        return f"The default plan is the fastest: {words(first)}."
    return f"The fastest plan: {words(tuning.best)}, where the default is {words(first)}."


def words(plan: Plan) -> str:
    """`"devices 2, width 8, data device, rounds_at_once 1"`."""
    return ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(plan).items())


class _Bench:
    """Times plans one by one, and keeps the fastest ready to alternate with the next."""

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
        """Times the default plan, which also fixes the rounds of a turn."""
        self.best = plan
        once = self._prepare(**self._arguments, plan=plan)
        once([1])  # warms up
        rounds = int(_TURN_SECONDS / max(once([1]), 1e-9))
        self._rounds = range(1, 1 + min(max(rounds, 1), _MOST_ROUNDS))
        self._best_once = once
        self._note(self._measured(plan, once, None))

    @property
    def rounds_are_short(self) -> bool:
        """Whether several could share a dispatch whose numbers are seen within a second."""
        return len(self._rounds) > 1

    def ratio(self, plan: Plan) -> float:
        """The time of a plan over that of the fastest before, which it may replace.

        A plan is timed once, and later calls return the same; infinite if it was not timed.
        """
        for trial in self.trials:
            if plan == trial.plan:
                return trial.ratio
        if plan in self.left_out:
            return math.inf
        if time.monotonic() > self._end and len(self.trials) > 1:
            self.left_out.append(plan)
            return math.inf
        try:
            once = self._prepare(**self._arguments, plan=plan)
            trial = self._measured(plan, once, self._best_once)
        # Too little memory, by our own count or the device's.
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


def _search(bench: _Bench, cohort: int) -> None:
    """Tries fewer devices, and on each number of them wider and narrower chunks."""
    devices = bench.best.devices or 1
    while devices:
        widest = -(-cohort // devices)
        width = min(bench.best.width or 1, widest)
        start = dataclasses.replace(bench.best, devices=devices, width=width)
        if bench.ratio(start) < _HOPELESS:
            for widths in (_doubled(width, widest), _halved(width)):
                for other in widths:
                    if bench.ratio(dataclasses.replace(start, width=other)) > _HOPELESS:
                        break
        devices //= 2


def _doubled(width: int, widest: int) -> list[int]:
    widths = []
    while width < widest:
        width = min(2 * width, widest)
        widths.append(width)
    return widths


def _halved(width: int) -> list[int]:
    widths = []
    while width > 1:
        width //= 2
        widths.append(width)
    return widths
