"""The quickest plan for a run, found by measuring whole rounds; and written into its file."""

from __future__ import annotations

import contextlib
import math
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedlp_jax.config import Config, load_config
from fedlp_jax.placement import Plan, resolve
from fedlp_jax.simulation import Simulation
from fedlp_jax.types import FedLPError

_TURNS = 3  # rounds of a plan that count, each beside one of the quickest so far
_WORTH = 0.97  # a plan is taken for another if it needs less than this share of its time


class Rounds:
    """A simulation, compiled when it is made; each call runs one more round, without a test.

    Attributes:
      run: the simulation.
      compile_seconds: tracing, lowering and compiling the round.
    """

    def __init__(self, *arguments: Any, **settings: Any):
        """Compiles a `Simulation` of these arguments."""
        self.run = Simulation(*arguments, rounds=10**6, **settings)
        self.run.compile()
        self.compile_seconds = sum(
            self.run.readings[f"round_{part}_seconds"] for part in ("trace", "lowering", "compile")
        )
        self.number = 0

    def __call__(self) -> float:
        """Seconds of a round: laying the cohort out, running it, reading its numbers."""
        self.number += 1
        start = time.perf_counter()
        self.run.read(self.run.dispatch(self.number))
        return time.perf_counter() - start


class Trial(NamedTuple):
    """One measured plan.

    `seconds` and `best_so_far` are medians of rounds that took turns, so the ratio of the two is
    known better than either.
    """

    plan: Plan
    seconds: float
    best_so_far: float  # of the quickest plan before, in the same turns
    compile_seconds: float
    error: str = ""  # why it was not measured

    @property
    def is_better(self) -> bool:
        """Whether it beats the quickest before by more than chance would."""
        return not self.error and self.seconds < _WORTH * self.best_so_far


class Tuning(NamedTuple):
    """What `tune` found."""

    best: Plan
    trials: list[Trial]  # in the order they were measured; the first is the default plan
    left_out: list[Plan]  # for which no time was left


def tune(
    arguments: Mapping[str, Any],
    seconds: float = 120.0,
    say: Callable[[Trial], None] = lambda trial: None,
    prepare: Callable[..., Callable[[], float]] = Rounds,
) -> Tuning:
    """Measures whole rounds under several plans, each beside the quickest before.

    The default plan comes first. Then, for all devices, half of them and so on down to one, the
    width is doubled, and then halved, for as long as that makes a round quicker.

    Args:
      arguments: of `simulate`, as from `experiment.build`; its plan counts for nothing.
      seconds: no plan is begun after so long; the default and one other always are.
      say: called after each plan.
      prepare: `(**arguments of Simulation) -> once`, where `once()` is the seconds of a round.

    Returns:
      The quickest plan, and all that were measured. A plan replaces a quicker-to-explain one only
      if its rounds take less than 0.97 of the time, so that chance does not choose.

    Raises:
      FedLPError: `seconds` is not a positive number, or the default plan cannot run.
    """
    if not (isinstance(seconds, int | float) and math.isfinite(seconds) and seconds > 0):
        raise FedLPError(f"seconds={seconds!r} must be a positive number.")
    ignored = ("rounds", "eval_every", "plan")
    fixed = {key: value for key, value in arguments.items() if key not in ignored}
    end = time.monotonic() + seconds
    cohort = Simulation(**fixed, rounds=0).size
    best = resolve(None, cohort)
    best_round, trial = _measure(prepare, fixed, best, None)
    trials: list[Trial] = [trial]
    left_out: list[Plan] = []
    say(trial)
    search = _plans(best, cohort)
    better: bool | None = None
    while True:
        try:
            plan = search.send(better)
        except StopIteration:
            return Tuning(best, trials, left_out)
        better = False
        if time.monotonic() > end and len(trials) > 1:
            left_out.append(plan)
            continue
        once = best_round
        try:
            once, trial = _measure(prepare, fixed, plan, best_round)
        except FedLPError as error:  # as where the memory does not suffice
            trial = Trial(plan, math.nan, math.nan, math.nan, str(error))
        trials.append(trial)
        say(trial)
        better = trial.is_better
        if better:
            best, best_round = plan, once


def _plans(first: Plan, cohort: int) -> Generator[Plan, bool | None, None]:
    """Plans to try after the default; is sent whether the one before was better."""
    devices = first.devices or 1
    width = first.width or 1
    while devices:
        if devices != first.devices:
            yield Plan(devices, min(width, -(-cohort // devices)))
        for factor in (2.0, 0.5):
            step = width
            while True:
                step = int(step * factor)
                if not 1 <= step <= -(-cohort // devices):
                    break
                if not (yield Plan(devices, step)):
                    break
        devices //= 2


def _measure(
    prepare: Callable[..., Callable[[], float]],
    arguments: Mapping[str, Any],
    plan: Plan,
    rival: Callable[[], float] | None,
) -> tuple[Callable[[], float], Trial]:
    once = prepare(**arguments, plan=plan)
    once()  # what is slow for the first time only
    own, other = [], []
    for _ in range(_TURNS):
        if rival is not None:
            other.append(rival())
        own.append(once())
    median = statistics.median(own)
    against = statistics.median(other) if other else median
    return once, Trial(plan, median, against, getattr(once, "compile_seconds", 0.0))


def write_plan(path: str | Path, plan: Plan) -> None:
    """Puts a plan into a configuration file and leaves every other line of it as it is.

    Args:
      path: a YAML file.
      plan: devices and width.

    Raises:
      FedLPError: the file is written in a way that this cannot change safely, or not at all; it is
        then as before.
    """
    path = Path(path)
    before = load_config(path)
    block = f"plan:\n  devices: {plan.devices}\n  width: {plan.width}\n"
    try:
        text = path.read_text()
        found = re.search(r"^plan\s*:[^\n]*\n?(?:[ \t]+[^\n]*(?:\n|\Z))*", text, re.MULTILINE)
        if found:
            changed = text[: found.start()] + block + text[found.end() :]
        else:
            changed = text + ("" if text.endswith("\n") else "\n") + "\n" + block
        with _beside(path, changed) as candidate:
            if _reads_otherwise(candidate, before, plan):
                raise FedLPError(
                    f"{path}: its plan cannot be replaced without touching other lines; write it "
                    f"yourself as\n{block}"
                )
            os.replace(candidate, path)
    except OSError as error:
        raise FedLPError(f"{path}: cannot be written ({error}); the plan is\n{block}") from error


@contextlib.contextmanager
def _beside(path: Path, text: str) -> Iterator[Path]:
    """A file with this text in the same folder, which is gone at the end unless it was moved."""
    handle, name = tempfile.mkstemp(suffix=path.suffix, prefix=f".{path.stem}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as out:
            out.write(text)
        os.chmod(name, path.stat().st_mode & 0o7777)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _reads_otherwise(candidate: Path, before: Config, plan: Plan) -> bool:
    """Whether a changed file means anything but the one before with this plan."""
    try:
        after = load_config(candidate)
    except FedLPError:
        return True
    section = before.plan.model_copy(update={"devices": plan.devices, "width": plan.width})
    name = {"name": before.name}  # that of the file, where none is given
    wanted = before.model_copy(update={"plan": section} | name)
    return after.model_copy(update=name) != wanted


def describe(tuning: Tuning) -> str:
    """The plan found, in a sentence."""
    first, best = tuning.trials[0], tuning.best
    words = f"devices {best.devices}, width {best.width}"
    if best == first.plan:
        return f"The default plan is the quickest: {words}."
    default = f"devices {first.plan.devices}, width {first.plan.width}"
    return f"The quickest plan: {words}, where the default is {default}."
