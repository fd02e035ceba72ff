"""simulate: the host loop. Cohort -> round -> evaluation -> row -> callbacks."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec

import jax

from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.clients.failures import Faults
from fedlp_jax.data.loading import Dataset
from fedlp_jax.data.partition import Partition
from fedlp_jax.errors import collecting, warn
from fedlp_jax.execution import processes
from fedlp_jax.execution.map_clients import open_connections
from fedlp_jax.execution.plan import Plan
from fedlp_jax.reporting.progress import Progress, say
from fedlp_jax.reporting.sinks import Sink, opened
from fedlp_jax.simulation import snapshot as snapshots
from fedlp_jax.simulation import validation as checks
from fedlp_jax.simulation.checkpoint import Checkpoint, Saver
from fedlp_jax.simulation.cohorts import CohortRule
from fedlp_jax.simulation.early_stop import EarlyStop, Watch
from fedlp_jax.simulation.keep_best import KeepBest, Keeper
from fedlp_jax.simulation.profiling import Recorder, Trace
from fedlp_jax.simulation.result import DivergedError, Result, Row
from fedlp_jax.simulation.run import Pending, Run, Simulation
from fedlp_jax.simulation.snapshot import Snapshot
from fedlp_jax.types import ServerState, Variables

Callback = Callable[[int, Row, ServerState], None]
_P = ParamSpec("_P")


def _with_warnings(simulate: Callable[_P, Result]) -> Callable[_P, Result]:
    """Adds the warnings of a run to its result."""

    @functools.wraps(simulate)
    def collected(*arguments: _P.args, **settings: _P.kwargs) -> Result:
        with collecting() as said:
            try:
                result = simulate(*arguments, **settings)
            except DivergedError as error:
                error.result.warnings = said
                raise
        result.warnings = said
        return result

    return collected


@_with_warnings
def simulate(
    algorithm: Algorithm,
    data: Dataset,
    clients: Partition,
    *,
    rounds: int,
    cohort: CohortRule,
    seed: int = 0,
    eval_every: int | None = None,
    first_round: int = 1,
    max_cohort: int | None = None,
    callbacks: Sequence[Callback] = (),
    plan: Plan | None = None,
    variables: Variables | None = None,
    faults: Faults | None = None,
    log: Callable[[Row], None] | None = None,
    sinks: Sequence[Sink] = (),
    progress: bool | str = False,
    checkpoint: Checkpoint | None = None,
    resume: Snapshot | None = None,
    stop: Callable[[], bool] | None = None,
    early_stop: EarlyStop | None = None,
    keep_best: KeepBest | None = None,
    profile: Trace | None = None,
    compiled: Callable[[Plan], None] | None = None,
) -> Result:
    """Runs federated training.

    Every draw is a function of (seed, round, client), so a run repeats bit for bit under one plan,
    and another plan changes parameters only by the order of a sum. Ctrl-C ends a run after the
    round in flight and returns its result so far, with a warning; a second one raises
    KeyboardInterrupt.

    With several processes (`fl.connect`) each calls this with the same arguments. Callbacks run in
    each of them; `log`, `sinks`, `progress` and `checkpoint` in the first only.

    Args:
      algorithm: `fedavg(...)`, `fedlp_homo(...)`, `fedlp_hetero(...)`, `compose(...)` or your own.
      data: from `load` or `from_arrays`.
      clients: from `fedlp_jax.partition`.
      rounds: server updates; 0 returns the initial model.
      cohort: clients a round: a number, a share in (0, 1], or a function `(seed, round, K) -> ids`,
        which is called once a round.
      seed: of all draws.
      eval_every: test every so many rounds; None = after the last only, which always is tested.
      first_round: the number of the first round. To train on in a second call, pass
        `variables=result.state.variables` and the next round, or it draws the cohorts and masks of
        round 1 again. The server optimizer starts afresh; `resume` keeps it.
      max_cohort: the largest cohort of a function whose cohorts differ in size; None = all are as
        large as the first.

    Other Arguments:
      callbacks: each is called `(round, row, state)` once a round, after the round's numbers are
        ready; the state is valid during the call only. With callbacks the host waits for every
        round; with `log` it does not.
      plan: devices and width; None = chosen here, or that of `resume`.
      variables: initial model; None = drawn from the seed.
      faults: what goes wrong with clients, see `fedlp_jax.clients.failures`; None = nothing.
      log: called with each round's row as soon as its numbers are ready.
      sinks: receive each round's row too, such as `fl.sinks.tensorboard("logs")`; one that fails
        costs a warning.
      progress: show rounds as they end, on stderr: a bar on a terminal, lines elsewhere. A text
        is the name that is shown, instead of the data set's.
      checkpoint: where and how often to save the run.
      resume: from `Checkpoint.latest()`; None = from the start. `rounds` then counts those of
        before, too. Under one plan the result is that of an uninterrupted run, bit for bit.
      stop: asked before every round; once it returns True the run is saved and ends.
      early_stop: ends the run at a target or without progress, see `EarlyStop`; the reason is
        `result.stopped`.
      keep_best: also keeps the model that tested best, see `KeepBest`; it is `result.best`.
      profile: rounds that JAX's profiler records, see `Trace`; in the first process.
      compiled: called once, before the first round, with the plan that fits the memory.

    Returns:
      The final model, the history, the ledger.

    Raises:
      FedLPError: bad input, before anything is compiled.
      DivergedError: no client of a round had a finite update.
    """
    title = _begin(data, progress, rounds, first_round, checkpoint, resume)
    if resume is not None:
        plan = resume.plan if plan is None else plan
        first_round, rounds = resume.round + 1, rounds - resume.round
    with processes.together():
        run = Simulation(
            algorithm,
            data,
            clients,
            rounds=rounds,
            cohort=cohort,
            seed=seed,
            eval_every=eval_every,
            first_round=first_round,
            max_cohort=max_cohort,
            plan=plan,
            variables=variables,
            faults=faults,
        )
        # Each process has the whole snapshot, so the first alone saves it.
        saver = Saver(checkpoint if processes.is_first() else None, resume)
        if resume is not None:
            snapshots.check(run, resume)
    asked = stop is not None and processes.count() == 1 and stop()
    left = range(0) if asked else range(run.first_round, run.last_round + 1)
    done = resume.rows if resume is not None else ()
    watch, recorder = _observers(run, done, early_stop, keep_best, profile)
    with processes.losses_explained(), _listeners(run, done, title, log, sinks) as listeners:
        _start(run, bool(left), resume, compiled)
        with listening_to_ctrl_c(stop) as (ask, pressed), recorder:
            ends = processes.stop_together(lambda: ask() or watch.stops, run.plan.mesh)
            _run_rounds(run, left, [watch.update, *listeners], callbacks, saver, ends, recorder)
    _warn_of_missing_rounds(run, pressed())
    return dataclasses.replace(run.result(), stopped=watch.reason)


def _begin(
    data: Dataset,
    progress: bool | str,
    rounds: int,
    first_round: int,
    checkpoint: Checkpoint | None,
    resume: Snapshot | None,
) -> str:
    """Checks where the run starts, and says that it is being prepared.

    Returns:
      Its name for the progress; empty if no progress is shown here.
    """
    checks.check_start(rounds, first_round, checkpoint, resume)
    if not progress or not processes.is_first():
        return ""
    # What the data are is checked later.
    name = progress if isinstance(progress, str) else getattr(data, "name", "") or "a run"
    say(name, "preparing data and model ...")
    return name


@contextlib.contextmanager
def _listeners(
    run: Run,
    done: Sequence[Row],
    title: str,
    log: Callable[[Row], None] | None,
    sinks: Sequence[Sink],
) -> Iterator[list[Callable[[Row], None]]]:
    """Yields what is called with each row: the progress bar; in the first process, the others."""
    first, parameters = processes.is_first(), run.facts["parameters"]
    shown = Progress(run.last_round, title, show=bool(title), done=done, parameters=parameters)
    with shown, opened(sinks if first else (), run.facts) as writers:
        yield [shown.update, *([log] if log is not None and first else []), *writers]


def _observers(
    run: Run,
    done: Sequence[Row],
    early_stop: EarlyStop | None,
    keep_best: KeepBest | None,
    profile: Trace | None,
) -> tuple[Watch, Recorder]:
    """What follows the rows of a run: when it stops, its best model, and its profiler."""
    checks.check_kinds(early_stop=early_stop, keep_best=keep_best, profile=profile)
    checks.check_tested("early_stop", early_stop, run.spec)
    checks.check_tested("keep_best", keep_best, run.spec)
    run.keeper = None if keep_best is None else Keeper(keep_best, done)
    trace = profile if processes.is_first() else None
    return Watch(early_stop, done), Recorder(trace, run.first_round, run.last_round)


def _warn_of_missing_rounds(run: Run, pressed: bool) -> None:
    if pressed and run.reached < run.last_round:
        after = f"interrupted by Ctrl-C after round {run.reached} of {run.last_round}"
        warn(f"{after}; the result holds the rounds so far.", stacklevel=4)


def _start(
    run: Run, compile: bool, resume: Snapshot | None, compiled: Callable[[Plan], None] | None
) -> None:
    """Compiles the run, if there are rounds to run, and restores the state of a resumed one.

    Raises:
      FedLPError: another process has another run, or other code.
    """
    if processes.count() > 1:
        processes.agree("run", snapshots.shared_facts(run, resume) | {"code": processes.code()})
        open_connections(run.plan)
    if compile:
        checks.warn_of_first_block(run.algorithm, run.last_round)
        run.compile()
    if compiled is not None:
        compiled(run.plan)
    if resume is not None:
        snapshots.restore(run, resume)


@contextlib.contextmanager
def listening_to_ctrl_c(
    stop: Callable[[], bool] | None,
) -> Iterator[tuple[Callable[[], bool], Callable[[], bool]]]:
    """Yields whether to stop, and whether Ctrl-C was pressed; twice, it raises KeyboardInterrupt.

    Listens only where Ctrl-C would raise that: in the main thread, unless the program has a handler
    of its own.
    """
    pressed = False

    def handle(number: int, frame: Any) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    listens = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if listens:
        signal.signal(signal.SIGINT, handle)
    try:
        yield (lambda: pressed or (stop is not None and stop())), (lambda: pressed)
    finally:
        if listens:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _run_rounds(
    run: Run,
    rounds: range,
    listeners: Sequence[Callable[[Row], None]],
    callbacks: Sequence[Callback],
    saver: Saver,
    stop: Callable[[], bool],
    recorder: Recorder,
) -> None:
    pending: collections.deque[Pending] = collections.deque()
    started = run.clock = time.perf_counter()

    def read(ahead: int) -> None:
        """Reads what was dispatched, but for the last `ahead` dispatches."""
        while len(pending) > ahead:
            for record in run.records(pending.popleft()):
                row = run.book(record)
                for listener in listeners:
                    listener(row)
                run.check(record)
                for callback in callbacks:
                    callback(row["round"], row, run.state)

    while rounds and not stop():
        # As many rounds in one dispatch as the plan says, but none beyond one that others look at.
        count = 1 if callbacks else min(run.at_once(rounds[0]), saver.rounds_until_due(rounds[0]))
        count = min(count, recorder.rounds_left(rounds[0]))
        recorder.before(rounds[0], wait=lambda: read(ahead=0))
        pending.append(run.dispatch(rounds[0], count))
        last, rounds = rounds[count - 1], rounds[count:]
        # The device may be ahead of the host by one dispatch, which hides the host's work.
        read(ahead=0 if callbacks else 1)
        recorder.after(last, wait=lambda: read(ahead=0))
        if saver.due(last):
            read(ahead=0)
            saver.save(snapshots.capture(run))
    read(ahead=0)
    if saver.due_at_end(run.reached, interrupted=run.reached < run.last_round):
        saver.save(snapshots.capture(run))
    if run.stage.store is not None:
        jax.block_until_ready(run.stage.store.stacks)
    run.readings["run_seconds"] = time.perf_counter() - started
