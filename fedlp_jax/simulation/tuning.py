"""The fastest plan for a run, found by timing whole rounds."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedlp_jax.errors import FedLPError, check_number
from fedlp_jax.execution.plan import Plan
from fedlp_jax.simulation.run import Pending, Simulation

_TURNS = 3  # of a plan, alternating with the fastest so far; more where turns are short
_MOST_TURNS = 9
_ENOUGH_SECONDS = 1.0  # of a plan's turns together; then _TURNS suffice
_TURN_SECONDS = 0.2  # a turn has as many rounds as fit, so that the host's work overlaps
_MOST_ROUNDS = 64
_WORTH = 0.97  # a plan replaces another if it needs less than this share of its time
_HOPELESS = 1.6  # times as slow as the fastest: the search goes no further that way


class Rounds:
    """Times rounds of one compiled plan, without evaluation.

    Each call starts from the initial model, so a long search cannot make it diverge.

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
    width is doubled and halved until that is hopeless.

    Args:
      arguments: of `simulate`, as from `config.build`; rounds, evaluation and plan are ignored.
      seconds: starts no further plan after this long, except the first after the default.
      say: called after each plan.
      prepare: `(**arguments of Simulation) -> time_rounds`, where `time_rounds(rounds)` returns the
        seconds that the rounds of these numbers take. All plans get the same ones.

    Returns:
      The fastest plan, and all that were timed. A plan replaces an earlier one only if its rounds
      take less than 0.97 of the time, so that chance does not choose.

    Raises:
      FedLPError: `seconds` is not a positive number, or the default plan cannot run.
    """
    end = time.monotonic() + check_number("seconds", seconds, gt=0)
    ignored = ("rounds", "eval_every", "early_stop", "plan")
    fixed = {key: value for key, value in arguments.items() if key not in ignored}
    run = Simulation(**fixed, rounds=0)
    plan, cohort = run.plan, run.size
    del run  # and with it the data that it put on the devices
    bench = _Bench(functools.partial(prepare, **fixed), plan, end, say)
    _search(bench, cohort)
    return Tuning(bench.best, bench.trials, bench.left_out)


def describe(tuning: Tuning) -> str:
    """The fastest plan, in a sentence."""
    first = tuning.trials[0].plan
    if tuning.best == first:
        return f"The default plan is the fastest: {words(first)}."
    return f"The fastest plan: {words(tuning.best)}, where the default is {words(first)}."


def words(plan: Plan) -> str:
    """`"devices 2, width 8, data device, rounds_at_once 1"`."""
    fields = dataclasses.asdict(plan)
    if plan.levels is None:
        del fields["levels"]
    return ", ".join(f"{key} {value}" for key, value in fields.items())


class _Bench:
    """Times plans one by one, and keeps the fastest ready to alternate with the next."""

    def __init__(
        self,
        prepare: Callable[..., Callable[[Sequence[int]], float]],
        default: Plan,
        end: float,
        say: Callable[[Trial], None],
    ):
        """Times the default plan, which also fixes the rounds of a turn."""
        self._prepare, self._end, self._say = prepare, end, say
        self.best, self.trials, self.left_out = default, list[Trial](), list[Plan]()
        self._time_best = time_rounds = prepare(plan=default)
        time_rounds([1])  # warms up
        rounds = int(_TURN_SECONDS / max(time_rounds([1]), 1e-9))
        self._rounds = range(1, 1 + min(max(rounds, 1), _MOST_ROUNDS))
        self._note(self._measure(default, time_rounds, None))

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
            time_rounds = self._prepare(plan=plan)
            trial = self._measure(plan, time_rounds, self._time_best)
        # Too little memory, by our own count or the device's.
        except (FedLPError, jax.errors.JaxRuntimeError) as error:
            self._note(Trial(plan, math.nan, math.nan, math.nan, str(error)))
            return math.inf
        self._note(trial)
        if trial.ratio < _WORTH:
            self.best, self._time_best = plan, time_rounds
        return trial.ratio

    def _measure(
        self,
        plan: Plan,
        time_rounds: Callable[[Sequence[int]], float],
        rival: Callable[[Sequence[int]], float] | None,
    ) -> Trial:
        time_rounds(self._rounds)
        own: list[float] = []
        other: list[float] = []
        while len(own) < _TURNS or (len(own) < _MOST_TURNS and sum(own) < _ENOUGH_SECONDS):
            if rival is not None:
                other.append(rival(self._rounds) / len(self._rounds))
            own.append(time_rounds(self._rounds) / len(self._rounds))
        median = statistics.median(own)
        best_so_far = statistics.median(other) if other else median
        return Trial(plan, median, best_so_far, getattr(time_rounds, "compile_seconds", 0.0))

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


def _doubled(width: int, widest: int) -> Iterator[int]:
    while width < widest:
        width = min(2 * width, widest)
        yield width


def _halved(width: int) -> Iterator[int]:
    while width > 1:
        width //= 2
        yield width
