"""simulate: the host loop. Cohort -> round -> evaluation -> numbers -> callbacks."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Sequence

from fedlp_jax.algorithms.algorithm import Algorithm
from fedlp_jax.cohort import CohortRule
from fedlp_jax.data.datasets import Dataset
from fedlp_jax.data.partition import Partition
from fedlp_jax.placement import Plan
from fedlp_jax.progress import Progress
from fedlp_jax.result import Result, Row
from fedlp_jax.simulation import Pending, Simulation
from fedlp_jax.types import ServerState, Variables

Callback = Callable[[int, Row, ServerState], None]

# Rounds the device may be ahead of the host. One is enough to hide the host's work.
_AHEAD = 1


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
    log: Callable[[Row], None] | None = None,
    progress: bool = False,
) -> Result:
    """Runs federated training.

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
      plan: devices and width; None = chosen here.
      variables: initial model; None = drawn from the seed.
      log: called with each round's row as soon as its numbers are ready.
      progress: show rounds as they end, on stderr: a bar on a terminal, lines elsewhere.

    Returns:
      The final model, the history, the ledger.

    Raises:
      FedLPError: bad input, before anything is compiled.
      DivergedError: no client of a round had a finite update.
    """
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
    )
    with Progress(rounds, data.name, wanted=progress) as shown:
        listeners = [shown.update] + ([log] if log is not None else [])
        run.compile()
        pending: collections.deque[Pending] = collections.deque()
        started = run.clock = time.perf_counter()
        for round in range(1, rounds + 1):
            pending.append(run.dispatch(round))
            while len(pending) > (0 if callbacks else _AHEAD):
                row = run.read(pending.popleft(), listeners)
                for callback in callbacks:
                    callback(round, row, run.state)
        while pending:
            run.read(pending.popleft(), listeners)
    run.readings["run_seconds"] = time.perf_counter() - started
    return run.result()
