"""Run: one seed's rounds under a compiled program, and the state, ledger and history they leave."""

from __future__ import annotations

import time
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax.accounting.ledger import Ledger
from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.clients.failures import Faults
from fedlp_jax.clients.outcomes import ClientStatus, Outcomes, outcome_metrics
from fedlp_jax.data.loading import Dataset
from fedlp_jax.data.partition import Partition
from fedlp_jax.errors import FedLPError
from fedlp_jax.execution import processes
from fedlp_jax.execution.plan import Plan, compile_to_fit, replicated
from fedlp_jax.simulation import evaluation
from fedlp_jax.simulation import validation as checks
from fedlp_jax.simulation.client_history import ClientHistory
from fedlp_jax.simulation.cohorts import CohortRule
from fedlp_jax.simulation.keep_best import Keeper
from fedlp_jax.simulation.personal import ClientModels
from fedlp_jax.simulation.program import Compiled, Program, compile_round, compile_test
from fedlp_jax.simulation.result import History, Result, Row, diverged, names
from fedlp_jax.simulation.snapshot import first_numbers
from fedlp_jax.simulation.spec import Spec, specify
from fedlp_jax.simulation.staging import Stage
from fedlp_jax.types import Cohort, RoundMetrics, ServerState, Variables

# Rounds of one dispatch take no longer, so that a round's numbers are seen within a second.
_DISPATCH_SECONDS = 0.5


class Pending(NamedTuple):
    """Dispatched rounds that the host has not read."""

    first: int  # the number of the first
    cohorts: list[Cohort]  # of each round, numpy
    metrics: Any  # RoundMetrics [D * P, R, ...] on the devices
    tested: dict[str, Any] | None  # the evaluation after the last
    variables: Variables | None = None  # that it tested, if the best are kept


class RoundRecord(NamedTuple):
    """The numbers of one round on the host, of the C clients that ran, by ascending id."""

    round: int
    client: np.ndarray  # i64[C], ids
    level: np.ndarray  # i32[C], submodel levels
    metrics: RoundMetrics  # numpy, [C, ...]
    arrived: np.ndarray  # bool[C], False = lost to a fault
    tested: dict[str, Any] | None  # {suffix: sums}, if the round was evaluated
    halted: bool  # the round left no finite model, so the state stands still
    seconds: float
    variables: Variables | None = None  # that were tested, if the best are kept

    @property
    def left_out(self) -> np.ndarray:
        """Ids of the clients that arrived with an update that is not finite."""
        return self.client[self.arrived & ~self.metrics.client.finite]


class Run:
    """The state of one run: server, ledger, history, and the next cohorts.

    A loop of your own:

        run.compile()
        for round in range(1, rounds + 1):
            row = run.read(run.dispatch(round))
        result = run.result()

    Attributes:
      spec: the checked inputs.
      plan: of the rounds; after `compile`, the one that fits the memory.
      last_round: its number; below `first_round` in a run without rounds.
      program: compiled; None before `compile` and for a run without rounds.
      state: the server's.
      stage: data and cohorts on the devices.
      ledger: what was sent.
      history: a row for each round read.
      client_history: a row for each client of each round read.
      keeper: keeps the best model; None = the last alone is kept.
      readings: seconds of tracing, lowering and compiling, and predicted bytes.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        rounds: int,
        first_round: int = 1,
        eval_every: int | None = None,
        like: Run | None = None,
    ):
        """Puts data and initial state on the devices.

        Args:
          spec: from `specify`.
          rounds: how many.
          first_round: the number of the first.
          eval_every: test after every round that this divides, and after the last; None = after
            the last only.
          like: another run with the same data and devices, whose arrays it shares.
        """
        self.spec, self.plan = spec, spec.plan
        self.first_round, self.last_round = first_round, first_round + rounds - 1
        self.eval_every = eval_every or max(self.last_round, 1)
        self.algorithm, self.clients, self.seed = spec.algorithm, spec.clients, spec.seed
        self.population, self.size = spec.clients.clients, spec.cohorts.size
        self.readings: dict[str, float] = dict(spec.predicted)
        state = spec.algorithm.init(spec.root, spec.example, self.population, spec.variables)
        self.begun_with = first_numbers(state)
        state = state._replace(round=jnp.asarray(first_round - 1, jnp.int32))
        self.stage: Stage = Stage(spec, None if like is None else like.stage)
        # A copy: rounds donate the state, and the caller's own arrays must survive.
        self.state: ServerState = processes.put(
            jax.tree.map(jnp.copy, state), replicated(self.plan)
        )
        self.ledger = Ledger(spec.layers, self.population, spec.wire)
        self.history = History()
        self.client_history = ClientHistory(
            self.algorithm.task.metrics, spec.layers.names, spec.clients.sizes
        )
        self.program: Program | None = None
        self.lowerings: dict[str, str] = {}  # the form of each convolution, by its shapes
        self.keeper: Keeper | None = None
        self.padded_share = self.imbalance = 0.0  # sums over rounds
        self.clock = 0.0

    @property
    def facts(self) -> dict[str, Any]:
        """What identifies the run to people: data, clients, cohort, rounds and seed."""
        return {
            "data": self.spec.data.name,
            "clients": self.population,
            "cohort": self.size,
            "rounds": self.last_round,
            "seed": self.seed,
            "parameters": int(self.spec.layers.params.sum()),
        }

    @property
    def reached(self) -> int:
        """The number of the last round that was booked; 0 if there is none."""
        return int(self.history.rows[-1]["round"]) if len(self.history) else 0

    def compile(self) -> None:
        """Compiles the round and the evaluation, unless the process already has equal programs.

        Raises:
          FedLPError: the round needs more memory than is free, and the width was asked for or
            cannot be lowered.
        """
        if self.last_round < self.first_round:
            return
        made: dict[str, Compiled] = {}

        def compile(plan: Plan) -> Any:
            self.stage.lay_on(plan)
            made["round"] = compile_round(self.algorithm, plan, self.round_shapes(plan))
            return made["round"].program

        program, self.plan = compile_to_fit(
            compile, self.plan, self.spec.width_is_open, self.stage.round_bytes
        )
        tested = _shapes_of((self.state.variables, *self.stage.tested()))
        made["test"] = compile_test(self.algorithm, self.plan, tested)
        seconds = {
            f"{name}_{part}_seconds": value
            for name, compiled in made.items()
            for part, value in compiled.seconds.items()
        }
        self.lowerings = made["round"].lowerings | made["test"].lowerings
        self.program = Program(self.plan, program, made["test"].program, self.lowerings, seconds)
        self.readings |= seconds
        self.clock = time.perf_counter()

    def dispatch(self, round: int, count: int = 1) -> Pending:
        """Starts rounds and, where due, an evaluation after the last; waits for nothing.

        Args:
          round: the first, one more than the last of the call before; it determines the cohort.
            All other draws follow the state's own count.
          count: how many, up to the plan's `rounds_at_once`; see `at_once`.

        Raises:
          FedLPError: a number below 1, or the run is not compiled.
        """
        if round < 1:
            raise FedLPError(f"round {round} cannot be started: the first is round 1.")
        if self.program is None:
            raise FedLPError(
                f"round {round} cannot be started before compile(), nor in a run of 0 rounds."
            )
        staged = self.stage(round, count)
        self.padded_share = sum((x.padded_share for x in staged.layouts), self.padded_share)
        self.imbalance = sum((x.imbalance for x in staged.layouts), self.imbalance)
        self.state, clients, metrics = self.program.round(
            self.state,
            staged.clients,
            staged.examples,
            staged.cohorts,
            None if self.plan.rounds_at_once == 1 else np.int32(count),
            self.stage.key,
        )
        self.stage.keep(staged.hosts, clients, metrics.halted)
        last, tested, kept = round + count - 1, None, None
        if last % self.eval_every == 0 or last == self.last_round:
            tested = self.program.test(self.state.variables, *self.stage.tested())
            if self.keeper is not None:  # the next round donates the state
                kept = jax.tree.map(jnp.copy, self.state.variables)
        with jax.transfer_guard_device_to_host("allow"):  # intended, as device_get is
            for leaf in jax.tree.leaves(metrics):
                leaf.copy_to_host_async()  # when it exists, not when it is asked for
        return Pending(round, staged.hosts, metrics, tested, kept)

    def at_once(self, round: int, lanes: int = 1) -> int:
        """How many rounds from this one on may share a dispatch: up to the next evaluation.

        Args:
          round: the next one.
          lanes: runs side by side, among which the seconds of a round were divided.
        """
        most = self.plan.rounds_at_once or 1
        if most == 1 or not len(self.history):
            return 1  # the first round says how long the others take
        quick = int(_DISPATCH_SECONDS / max(lanes * self.history.rows[-1]["seconds"], 1e-9))
        until_test = self.eval_every - (round - 1) % self.eval_every
        return max(min(most, quick, until_test, self.last_round - round + 1), 1)

    def records(self, pending: Pending, seconds: float | None = None) -> list[RoundRecord]:
        """Waits for the numbers of dispatched rounds.

        Args:
          pending: from `dispatch`.
          seconds: of each round; None = those since the call before.
        """
        metrics, tested = jax.device_get((pending.metrics, pending.tested))
        now = time.perf_counter()
        since, self.clock = (now - self.clock) / len(pending.cohorts), now
        read = pending._replace(metrics=metrics, tested=tested)
        return records_of(read, since if seconds is None else seconds)

    def book(self, record: RoundRecord) -> Row:
        """Adds a round to the ledger and the histories.

        Returns:
          The round's row.
        """
        metrics, arrived = record.metrics, record.arrived
        outcomes: Outcomes | None = metrics.outcomes or None
        row: Row = {"round": record.round}
        of_clients, level = metrics.client, record.level
        if not arrived.all():
            of_clients = jax.tree.map(lambda x: x[arrived], of_clients)
            level = level[arrived]
        row |= evaluation.train_metrics(
            of_clients,
            level,
            [level.name for level in self.spec.levels if not level.idle],
            self.algorithm.train_loss,
        )
        if outcomes is not None:
            row |= outcome_metrics(outcomes)
        row |= self.spec.cohorts.row(record.round)
        if self.spec.epsilon is not None:
            row["epsilon"] = self.spec.epsilon(record.round)
        if record.tested is not None:
            row |= evaluation.test_metrics(record.tested)
        self.client_history.add(record.round, record.client, record.level, metrics, arrived)
        upload, download = np.asarray(metrics.upload), np.asarray(metrics.download)
        bits = None if isinstance(metrics.bits, tuple) else np.asarray(metrics.bits)
        row |= self.ledger.add(record.client, upload, download, arrived, bits, record.level)
        row["seconds"] = record.seconds
        self.history.rows.append(row)
        if self.keeper is not None and record.variables is not None:
            self.keeper.update(row, record.variables)
        return row

    def check(self, record: RoundRecord) -> None:
        """Ends a run that diverged, and warns of clients that were left out.

        Raises:
          DivergedError: no client counted, or the model is not finite.
        """
        left_out, arrived = record.left_out, int(record.arrived.sum())
        if record.halted:
            raise diverged(record.round, left_out, arrived, self.result())
        if record.metrics.outcomes:  # corrupt clients are expected to send NaN
            left_out = np.setdiff1d(left_out, record.client[record.metrics.outcomes.corrupt])
        if len(left_out):
            warnings.warn(
                f"round {record.round}: left out {len(left_out)} of {arrived} clients whose "
                f"update was not finite: {names(left_out)}.",
                RuntimeWarning,
                stacklevel=5,
            )

    def read(self, pending: Pending) -> Row:
        """Waits for dispatched rounds, books and checks each; returns the row of the last.

        Raises:
          DivergedError: see `check`.
        """
        for record in self.records(pending):
            row = self.book(record)
            self.check(record)
        return row

    def result(self) -> Result:
        """The run so far."""
        if len(self.history):
            self.readings["padded_share"] = self.padded_share / len(self.history)
            self.readings["imbalance"] = self.imbalance / len(self.history)
        return Result(
            self.spec.levels[-1].extract(self.state.variables),
            self.state,
            self.history,
            self.ledger,
            self.plan,
            self.spec.layers,
            self.readings,
            dict(self.lowerings),
            clients=self.client_history,
            best=None if self.keeper is None else self.keeper.best,
            models=self._models(),
            seed=self.seed,
        )

    def _models(self) -> ClientModels | None:
        """The models of the clients, if they keep a part of them."""
        spec, store = self.spec, self.stage.store
        if store is None or any("head" not in stack for stack in store.stacks):
            return None
        return ClientModels(self.state.variables, spec.levels, spec.assigned, store)

    def round_shapes(self, plan: Plan) -> tuple[Any, ...]:
        """Shapes and shardings of the arguments of `rounds_of`."""
        clients, examples, cohorts = self.stage.shapes()
        count = None if plan.rounds_at_once == 1 else jax.ShapeDtypeStruct((), np.int32)
        state, key = _shapes_of(self.state), _shapes_of(self.stage.key)
        return state, clients, examples, cohorts, count, key


class Simulation(Run):
    """A `Run` from the arguments of `simulate`, for benchmarks and loops of your own."""

    def __init__(
        self,
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
        plan: Plan | None = None,
        variables: Variables | None = None,
        faults: Faults | None = None,
    ):
        """Checks the arguments, see `simulate`, and prepares the run without compiling it.

        Raises:
          FedLPError: bad input.
        """
        rounds, seed, eval_every, first_round = checks.check_numbers(
            rounds, seed, eval_every, first_round
        )
        spec = specify(
            algorithm,
            data,
            clients,
            cohort=cohort,
            seed=seed,
            first_round=first_round,
            max_cohort=max_cohort,
            plan=plan,
            variables=variables,
            faults=faults,
        )
        super().__init__(spec, rounds=rounds, first_round=first_round, eval_every=eval_every)


def records_of(pending: Pending, seconds: float) -> list[RoundRecord]:
    """The rounds of a dispatch, each with the clients that ran.

    Args:
      pending: whose numbers are numpy's.
      seconds: of each round.
    """
    halted, last = pending.metrics.halted, len(pending.cohorts) - 1
    leaves, tree = jax.tree.flatten(pending.metrics._replace(halted=()))
    found = []
    for place, cohort in enumerate(pending.cohorts):
        client = np.asarray(cohort.client)
        slots = np.flatnonzero(client >= 0)
        slots = slots[np.argsort(client[slots])]
        metrics: RoundMetrics = jax.tree.unflatten(tree, [x[slots, place] for x in leaves])
        arrived = np.ones(len(slots), bool)
        if metrics.outcomes:
            arrived = np.asarray(metrics.outcomes.status) == ClientStatus.ARRIVED
        found.append(
            RoundRecord(
                pending.first + place,
                client[slots],
                np.asarray(cohort.level)[slots],
                metrics,
                arrived,
                pending.tested if place == last else None,
                bool(halted[place]),
                seconds,
                pending.variables if place == last else None,
            )
        )
    return found


def _shapes_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
