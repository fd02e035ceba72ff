"""Simulation: one run, prepared and compiled; it starts rounds and reads their numbers."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax.accounting.ledger import Ledger
from fedlp_jax.accounting.macs import relative_work
from fedlp_jax.aggregation.privacy import accountant
from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.clients.failures import Exposure, Faults
from fedlp_jax.clients.outcomes import ClientStatus, Outcomes, outcome_metrics
from fedlp_jax.data.batching import example_of
from fedlp_jax.data.loading import Dataset
from fedlp_jax.data.partition import Partition
from fedlp_jax.errors import FedLPError
from fedlp_jax.execution import processes as hosts
from fedlp_jax.execution.map_clients import HOST, Plan, replicated, resolve
from fedlp_jax.execution.packing import size_bytes
from fedlp_jax.execution.scheduling import with_even_chunks
from fedlp_jax.prng import root_key
from fedlp_jax.pruning.layers import layer_table
from fedlp_jax.simulation import evaluation as metric
from fedlp_jax.simulation import validation as checks
from fedlp_jax.simulation.cohorts import CohortRule, cohort_size
from fedlp_jax.simulation.memory import check_private, compile_to_fit, with_place
from fedlp_jax.simulation.program import Pending, compiled, metrics_of, one_round, several_rounds
from fedlp_jax.simulation.readout import Readout
from fedlp_jax.simulation.result import History, Result, Row, diverged, names
from fedlp_jax.simulation.staging import Population, Stage, on_host
from fedlp_jax.types import ServerState, Variables

# Rounds of one call take no longer, so that a round's numbers are seen within a second.
_CALL_SECONDS = 0.5


class Simulation:
    """One run: what is checked and compiled once, and the state that changes.

    `simulate` is `compile`, then `dispatch` and `read` for every round, then `result`. Benchmarks
    and loops of your own call them directly.
    """

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
        plan: Plan | None = None,
        variables: Variables | None = None,
        faults: Faults | None = None,
    ):
        self.rounds, self.seed, self.eval_every = checks.check_numbers(rounds, seed, eval_every)
        checks.check_partition(clients, data)
        self.algorithm, self.clients, self.population = algorithm, clients, clients.clients
        self.size = cohort_size(cohort, self.population, seed)
        self._width_is_open = plan is None or plan.width is None
        root = root_key(seed)
        self.exposure = self._expose(faults, cohort, root, data.num_classes)
        if self.exposure is not None:
            self.size = self.exposure.chosen
        self.plan = with_place(resolve(plan, self.size), data.train.nbytes, data.test.nbytes)
        if algorithm.persist or self.plan.data == HOST or hosts.count() > 1:
            self.plan = dataclasses.replace(self.plan, rounds_at_once=1)
        example = example_of(on_host(data.train, data.normalize))
        checks.check_model(algorithm, example, data, root)
        assigned = algorithm.assign(root, self.population)
        if self._width_is_open:
            self.plan = with_even_chunks(self.plan, self.size, assigned)
        shapes = checks.initial_state(algorithm, example, root, self.population)
        checks.check_size(shapes.variables)
        checks.check_steps(algorithm, clients)
        checks.check_variables(variables, shapes.variables)
        self.layers = layer_table(shapes.variables, algorithm.layers)
        if variables is not None:  # numpy's float64 becomes what jax computes in
            variables = jax.tree.map(jnp.asarray, variables)
        # Private variables take the dtype of what is given.
        held = shapes.variables if variables is None else variables
        self.levels = algorithm.levels(held, example)
        self.readings = self._predicted(shapes.variables, assigned, data)
        self.epsilon = accountant(
            algorithm.privacy, self.population, self.size, sampled=not callable(cohort)
        )
        state = algorithm.init(root, example, self.population, variables)
        self.begun_with = checks.first_numbers(state)
        costs = relative_work([level.task for level in self.levels], root, example)
        population = Population(clients, cohort, seed, self.size, assigned, self.exposure)
        self.stage = Stage(
            algorithm, data, population, self.levels, costs, root, example, self.plan
        )
        # A copy: rounds donate the state, and the caller's own arrays must survive.
        self.state: ServerState = hosts.put(jax.tree.map(jnp.copy, state), replicated(self.plan))
        self.readout = Readout(self.plan)
        self.ledger, self.history = Ledger(self.layers, self.population), History()
        self.round_program: Any = None  # until compiled
        self.lowerings: dict[str, str] = {}  # what each convolution takes, by shape
        self.padded_share = self.imbalance = 0.0  # sums over rounds
        self.clock = self._seconds = 0.0

    def compile(self) -> None:
        """Traces, lowers and compiles the round and the evaluation, and times each.

        Raises:
          FedLPError: the round needs more memory than is free, and the width was asked for or
            cannot be lowered.
        """
        if self.rounds == 0:
            return
        self.round_program, plan = compile_to_fit(
            self._compiled_round, self.plan, self._width_is_open, self.stage.round_bytes
        )
        if plan != self.plan:
            self.plan = plan
            self.stage.lay_on(plan)
        test_program = jax.jit(metric.evaluator(self.algorithm, self.plan))
        arguments = (self.state.variables, self.stage.test)
        self.test_program = self._timed(test_program, "test", arguments)
        self.clock = time.perf_counter()

    def dispatch(self, round: int) -> Pending:
        """Starts a round and, where due, its evaluation; waits for nothing.

        Args:
          round: from 1, one more than the last; who takes part follows it, all other draws the
            state's own count.

        Raises:
          FedLPError: a number below 1, or the run is not compiled.
        """
        self._check_ready(round)
        if self.plan.rounds_at_once != 1:
            return self.dispatch_several((round,))[0]
        staged = self.stage(round)
        self.padded_share += staged.layout.padded_share
        self.imbalance += staged.layout.imbalance
        self.state, private, metrics = self.round_program(
            self.state, staged.private, staged.examples, staged.cohort, self.stage.key
        )
        self.stage.keep(staged, private, metrics.halted)
        return Pending(round, staged.host, self.readout.start(metrics), self._tested(round))

    def dispatch_several(self, rounds: Sequence[int]) -> list[Pending]:
        """Starts rounds that follow each other, up to `rounds_at_once`, in one call.

        Only the last of them is evaluated, where due; see `at_once`.
        """
        if self.plan.rounds_at_once == 1:
            return [self.dispatch(round) for round in rounds]
        self._check_ready(min(rounds))
        staged = self.stage.several(rounds)
        self.padded_share = sum((x.padded_share for x in staged.layouts), self.padded_share)
        self.imbalance = sum((x.imbalance for x in staged.layouts), self.imbalance)
        count, key = np.int32(len(rounds)), self.stage.key
        several = (self.state, self.stage.train, staged.cohorts, count, key)
        self.state, metrics = self.round_program(*several)
        metrics = self.readout.start(metrics)
        tested = len(rounds[:-1]) * [None] + [self._tested(rounds[-1])]
        return [
            Pending(round, host, metrics, test, place, len(rounds), stacked=True)
            for place, (round, host, test) in enumerate(
                zip(rounds, staged.hosts, tested, strict=True)
            )
        ]

    def at_once(self, round: int) -> int:
        """How many rounds from this one on may be one call: up to the next that is evaluated."""
        most = self.plan.rounds_at_once or 1
        if most == 1 or not len(self.history):
            return 1  # until it is known how long a round takes
        quick = int(_CALL_SECONDS / max(self.history.rows[-1]["seconds"], 1e-9))
        until_test = self.eval_every - (round - 1) % self.eval_every
        return max(min(most, quick, until_test, self.rounds - round + 1), 1)

    def read(self, pending: Pending, listeners: Sequence[Callable[[Row], None]] = ()) -> Row:
        """Waits for a round's numbers and books them.

        Raises:
          DivergedError: no client counted, or what they add up to is not finite.
        """
        metrics, tested = metrics_of(pending, self.readout.read)
        halted = bool(metrics.halted)
        now = time.perf_counter()
        if pending.place == 0:  # the time of a call is shared by its rounds
            self._seconds, self.clock = (now - self.clock) / pending.of, now
        ran = np.asarray(pending.cohort.client) >= 0
        ids = np.asarray(pending.cohort.client)[ran]
        order = np.argsort(ids)
        ids = ids[order]
        metrics = jax.tree.map(lambda x: x[ran][order], metrics._replace(halted=cast(Any, None)))
        level = np.asarray(pending.cohort.level)[ran][order]
        outcomes: Outcomes | None = metrics.outcomes or None
        heard = np.ones(len(ids), bool)
        if outcomes is not None:
            heard = np.asarray(outcomes.status) == ClientStatus.ARRIVED
        row: Row = {"round": pending.round}
        row |= metric.train_metrics(
            jax.tree.map(lambda x: x[heard], metrics.client),
            level[heard],
            len(self.levels),
            self.algorithm.train_loss,
        )
        if outcomes is not None:
            row |= outcome_metrics(outcomes)
        if self.epsilon is not None:
            row["epsilon"] = self.epsilon(pending.round)
        if tested is not None:
            row |= metric.test_metrics(tested)
        row |= self.ledger.add(ids, metrics.upload, metrics.download, heard)
        row["seconds"] = self._seconds
        self.history.rows.append(row)
        for listener in listeners:
            listener(row)
        left_out = ids[heard & ~metrics.client.finite]
        if halted:
            raise diverged(pending.round, left_out, int(heard.sum()), self.result())
        if outcomes is not None:  # corrupt clients may send NaN on purpose
            left_out = np.setdiff1d(left_out, ids[outcomes.corrupt])
        if len(left_out):
            warnings.warn(
                f"round {pending.round}: left out {len(left_out)} of {heard.sum()} clients whose "
                f"update was not finite: {names(left_out)}.",
                RuntimeWarning,
                stacklevel=5,
            )
        return row

    def result(self) -> Result:
        """The run so far."""
        if len(self.history):
            self.readings["padded_share"] = self.padded_share / len(self.history)
            self.readings["imbalance"] = self.imbalance / len(self.history)
        return Result(
            self.levels[-1].extract(self.state.variables),
            self.state,
            self.history,
            self.ledger,
            self.plan,
            self.layers,
            self.readings,
            dict(self.lowerings),
        )

    def _check_ready(self, round: int) -> None:
        if round < 1:
            raise FedLPError(f"round {round} cannot be started: the first is round 1.")
        if self.round_program is None:
            raise FedLPError(
                f"round {round} cannot be started before compile(), nor in a run of 0 rounds."
            )

    def _compiled_round(self, plan: Plan) -> Any:
        stage = self.stage
        if plan.rounds_at_once == 1:
            staged = stage(1)
            arguments = (self.state, staged.private, staged.examples, staged.cohort, stage.key)
            return self._timed(one_round(self.algorithm, plan), "round", arguments)
        cohorts = stage.several((1,)).cohorts
        several = (self.state, stage.train, cohorts, np.int32(1), stage.key)
        return self._timed(several_rounds(self.algorithm, plan), "round", several)

    def _tested(self, round: int) -> dict[str, Any] | None:
        if round % self.eval_every and round != self.rounds:
            return None
        return cast("dict[str, Any]", self.test_program(self.state.variables, self.stage.test))

    def _timed(self, program: Any, name: str, arguments: tuple[Any, ...]) -> Any:
        made = compiled(program, arguments)
        self.lowerings |= made.lowerings
        for part, seconds in made.seconds.items():
            self.readings[f"{name}_{part}_seconds"] = seconds
        return made.program

    def _predicted(self, model: Variables, assigned: np.ndarray, data: Dataset) -> dict[str, float]:
        """Bytes of what a run may keep beside its model; refuses what does not fit."""
        found: dict[str, float] = {}
        if self.algorithm.stacked:
            found["stacked_bytes"] = checks.check_stack(model, self.layers, self.size, self.plan)
        if self.algorithm.persist:
            train = 0 if self.plan.data == HOST else data.train.nbytes
            held = size_bytes(model) + train + data.test.nbytes
            private = check_private(self.levels, assigned, self.size, self.plan, held)
            found["private_bytes"] = private
        return found

    def _expose(
        self, faults: Faults | None, rule: CohortRule, root: jax.Array, classes: int
    ) -> Exposure | None:
        if faults is None:
            return None
        checks.check_faults(self.algorithm, faults, rule)
        return Exposure(faults, root, self.population, self.size, classes)
