"""simulate: the host loop. Cohort -> round -> evaluation -> numbers -> callbacks."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Sequence

from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.clients.failures import Faults
from fedlp_jax.data.loading import Dataset
from fedlp_jax.data.partition import Partition
from fedlp_jax.execution import processes as hosts
from fedlp_jax.execution.map_clients import Plan
from fedlp_jax.nn import conv
from fedlp_jax.reporting.progress import Progress
from fedlp_jax.simulation import snapshot
from fedlp_jax.simulation.checkpoint import Checkpoint
from fedlp_jax.simulation.cohorts import CohortRule
from fedlp_jax.simulation.program import Pending
from fedlp_jax.simulation.result import Result, Row
from fedlp_jax.simulation.run import Simulation
from fedlp_jax.simulation.saver import Saver
from fedlp_jax.simulation.snapshot import Snapshot
from fedlp_jax.types import ServerState, Variables

Callback = Callable[[int, Row, ServerState], None]


def simulate(
    algorithm: Algorithm,
    data: Dataset,
    clients: Partition,
    *,
    rounds: int,
    cohort: CohortRule,
    seed: int = 0,
    eval_every: int | None = None,
    callbacks: Sequence[Callback] = (),
    plan: Plan | None = None,
    variables: Variables | None = None,
    faults: Faults | None = None,
    log: Callable[[Row], None] | None = None,
    progress: bool | str = False,
    checkpoint: Checkpoint | None = None,
    resume: Snapshot | None = None,
    stop: Callable[[], bool] | None = None,
    compiled: Callable[[Plan], None] | None = None,
) -> Result:
    """Runs federated training.

    With several processes (`fl.connect`) each calls this with the same arguments. Callbacks run in
    each of them; `log`, `progress` and `checkpoint` do so in the first only.

    Every draw is a function of (seed, round, client), so a run repeats bit for bit on one plan, and
    another plan changes parameters only by the order of a sum.

    Args:
      algorithm: `fedavg(...)`, `fedlp_homo(...)`, `fedlp_hetero(...)`, `compose(...)` or your own.
      data: from `load` or `from_arrays`.
      clients: from `fedlp_jax.partition`.
      rounds: server updates; 0 returns the initial model.
      cohort: clients a round: a number, a share in (0, 1], or a function `(seed, round, K) -> ids`.
      seed: of everything that is drawn.
      eval_every: test every so many rounds; None = after the last only, which always is tested.

    Other Arguments:
      callbacks: each is called `(round, row, state)` once a round, after the round's numbers are
        ready; the state is valid during the call only. With callbacks the host waits for every
        round; `log` does not.
      plan: devices and width; None = chosen here, or that of `resume`.
      variables: initial model; None = drawn from the seed.
      faults: what goes wrong with clients, see `fedlp_jax.clients.failures`; None = nothing.
      log: called with each round's row as soon as its numbers are ready.
      progress: show rounds as they end, on stderr: a bar on a terminal, lines elsewhere. A text
        is the name that is shown, instead of the data set's.
      checkpoint: where and how often to save the run.
      resume: where to go on, from `Checkpoint.latest()`; None = from the start. On one plan the
        result is that of a run which was never interrupted, bit for bit.
      stop: asked before every round; once it is true the run is saved and ends.
      compiled: called once, before the first round, with the plan that was found to fit the memory.

    Returns:
      The final model, the history, the ledger.

    Raises:
      FedLPError: bad input, before anything is compiled.
      DivergedError: no client of a round had a finite update.
    """
    if plan is None and resume is not None:
        plan = resume.plan
    with hosts.together("prepare"):
        run = Simulation(
            algorithm,
            data,
            clients,
            rounds=rounds,
            cohort=cohort,
            seed=seed,
            eval_every=eval_every,
            plan=plan,
            variables=variables,
            faults=faults,
        )
        # What is saved is whole in each process, so the first alone saves it, when it sees fit.
        saver = Saver(checkpoint if hosts.is_first() else None, resume)
        if resume is not None:
            snapshot.check(run, resume)
    if hosts.count() > 1:
        hosts.agree("run", snapshot.facts(run, data, resume))
    done = resume.rows if resume is not None else []
    left = range(len(done) + 1, rounds + 1)
    if stop is not None and hosts.anywhere("stop", stop()):
        left = range(0)
    name, show = data.name if progress is True else str(progress), hosts.is_first() and progress
    with Progress(rounds, name, show=bool(show), done=done) as shown, saver, hosts.explained():
        listeners = [shown.update] + ([log] if log is not None and hosts.is_first() else [])
        if left:
            with conv.repeating(resume.lowerings if resume is not None else {}):
                run.compile()
        if compiled is not None:
            compiled(run.plan)
        if resume is not None:
            snapshot.put_back(run, resume)
        run.readout.meet()
        started = run.clock = time.perf_counter()
        _run_rounds(run, left, listeners, callbacks, saver, stop)
    run.readings["run_seconds"] = time.perf_counter() - started
    return run.result()


def _never() -> bool:
    return False


def _run_rounds(
    run: Simulation,
    rounds: range,
    listeners: Sequence[Callable[[Row], None]],
    callbacks: Sequence[Callback],
    saver: Saver,
    stop: Callable[[], bool] | None,
) -> None:
    pending: collections.deque[Pending] = collections.deque()

    def read(ahead: int) -> None:
        while len(pending) > ahead:
            row = run.read(pending.popleft(), listeners)
            for callback in callbacks:
                callback(row["round"], row, run.state)

    while rounds and not run.readout.ends(rounds[0], stop or _never):
        # As many rounds in one call as the plan says, but none beyond one that others look at.
        count = 1 if callbacks else min(run.at_once(rounds[0]), saver.until_due(rounds[0]))
        call, rounds = rounds[:count], rounds[count:]
        pending.extend(run.dispatch_several(call))
        # The device may be ahead of the host by one call, which hides the host's work.
        read(ahead=0 if callbacks else count)
        if saver.due(call[-1]):
            read(ahead=0)
            saver.save(snapshot.take(run))
    read(ahead=0)
    done = len(run.history)
    if saver.due_at_end(done, interrupted=done < run.rounds):
        saver.save(snapshot.take(run))
