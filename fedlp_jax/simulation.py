"""Simulation: one run, prepared and compiled; it starts rounds and reads their numbers."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax import checks, conv, hosts
from fedlp_jax import metrics as metric
from fedlp_jax.algorithms.algorithm import Algorithm
from fedlp_jax.cohort import CohortRule, cohort_size
from fedlp_jax.costs import Ledger, level_macs
from fedlp_jax.data.batching import example_of
from fedlp_jax.data.datasets import Dataset
from fedlp_jax.data.partition import Partition
from fedlp_jax.fate import Fate, Outcome, fate_metrics
from fedlp_jax.faults import Exposure, Faults
from fedlp_jax.layers import layer_table
from fedlp_jax.memory import compile_to_fit
from fedlp_jax.placement import Plan, over_clients, replicated, resolve
from fedlp_jax.privacy import accountant
from fedlp_jax.readout import Readout
from fedlp_jax.result import DivergedError, History, Result, Row
from fedlp_jax.staging import Population, Stage, on_host
from fedlp_jax.types import (
    Cohort,
    RoundMetrics,
    ServerState,
    Variables,
)


class Pending(NamedTuple):
    """A dispatched round whose numbers the host has not read."""

    round: int
    cohort: Cohort  # numpy
    numbers: Any  # of the clients, and of the round: on the devices, see `Readout.start`


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
        checks.check_numbers(rounds, seed, eval_every)
        checks.check_partition(clients, data)
        self.algorithm, self.rounds, self.seed = algorithm, rounds, seed
        self.eval_every = eval_every or max(rounds, 1)
        self.clients, self.population = clients, clients.clients
        self.size = cohort_size(cohort, self.population, seed)
        self._width_is_open = plan is None or plan.width is None
        root = jax.random.key(seed)
        self.exposure = self._expose(faults, cohort, root, data.num_classes)
        if self.exposure is not None:
            self.size = self.exposure.chosen
        self.plan = resolve(plan, self.size)
        example = example_of(on_host(data.train, data.normalize))
        checks.check_model(algorithm, example, data, root)
        assigned = algorithm.assign(root, self.population)
        shapes = checks.initial_state(algorithm, example, root, self.population)
        checks.check_variables(variables, shapes.variables)
        self.layers = layer_table(shapes.variables, algorithm.layers)
        self.readings: dict[str, float] = {}
        if algorithm.stacked:
            self.readings["stacked_bytes"] = checks.check_stack(
                shapes.variables, self.layers, self.size, self.plan
            )
        self.epsilon = accountant(
            algorithm.privacy, self.population, self.size, sampled=not callable(cohort)
        )
        state = algorithm.init(root, example, self.population, variables)
        self.levels = algorithm.levels(state.variables, example)
        costs = level_macs([level.task for level in self.levels], root, example)
        population = Population(clients, cohort, seed, self.size, assigned, self.exposure)
        self.stage = Stage(
            algorithm, data, population, self.levels, costs, root, example, self.plan
        )
        # A copy: rounds donate the state, and the caller's own arrays must survive.
        self.state: ServerState = hosts.put(jax.tree.map(jnp.copy, state), replicated(self.plan))
        self.readout = Readout(self.plan)
        self.ledger, self.history = Ledger(self.layers, self.population), History()
        self.lowerings: dict[str, str] = {}  # what each convolution takes, by shape
        self.padded_share = self.imbalance = 0.0  # sums over rounds
        self.clock = 0.0

    def compile(self) -> None:
        """Traces, lowers and compiles the round and the evaluation, and times each.

        Raises:
          FedLPError: the round needs more memory than is free, and the width was asked for or
            cannot be lowered.
        """
        self.clock = time.perf_counter()
        if self.rounds == 0:
            return
        self.round_program, plan = compile_to_fit(
            self._compiled_round, self.plan, self._width_is_open
        )
        if plan != self.plan:
            self.plan = plan
            self.stage.lay_on(plan)
        test_program = jax.jit(metric.evaluator(self.algorithm, self.plan))
        arguments = (self.state.variables, self.stage.test)
        self.test_program = self._timed(test_program, "test", arguments)
        self.clock = time.perf_counter()

    def dispatch(self, round: int) -> Pending:
        """Starts a round and, where due, its evaluation; waits for nothing."""
        staged = self.stage(round)
        self.padded_share += staged.layout.padded_share
        self.imbalance += staged.layout.imbalance
        self.state, private, metrics = self.round_program(
            self.state, staged.private, self.stage.train, staged.cohort, self.stage.key
        )
        self.stage.keep(staged, private)
        tested = None
        if round % self.eval_every == 0 or round == self.rounds:
            tested = self.test_program(self.state.variables, self.stage.test)
        numbers = self.readout.start(metrics._replace(halted=()), (metrics.halted, tested))
        return Pending(round, staged.host, numbers)

    def read(self, pending: Pending, listeners: Sequence[Callable[[Row], None]] = ()) -> Row:
        """Waits for a round's numbers and books them.

        Raises:
          DivergedError: no client counted, or what they add up to is not finite.
        """
        metrics, (halted, tested) = self.readout.finish(pending.numbers)
        now = time.perf_counter()
        ran = np.asarray(pending.cohort.client) >= 0
        ids = np.asarray(pending.cohort.client)[ran]
        order = np.argsort(ids)
        ids = ids[order]
        metrics = jax.tree.map(lambda x: x[ran][order], metrics)
        level = np.asarray(pending.cohort.level)[ran][order]
        fate: Fate | None = metrics.fate or None
        heard = np.ones(len(ids), bool)
        if fate is not None:
            heard = np.asarray(fate.outcome) == Outcome.ARRIVED
        row: Row = {"round": pending.round}
        row |= metric.train_metrics(
            jax.tree.map(lambda x: x[heard], metrics.client),
            level[heard],
            len(self.levels),
            self.algorithm.train_loss,
        )
        if fate is not None:
            row |= fate_metrics(fate)
        if self.epsilon is not None:
            row["epsilon"] = self.epsilon(pending.round)
        if tested is not None:
            row |= metric.test_metrics(tested)
        row |= self.ledger.add(ids, metrics.upload, metrics.download, heard)
        row["seconds"], self.clock = now - self.clock, now
        self.history.rows.append(row)
        for listener in listeners:
            listener(row)
        left_out = ids[heard & ~metrics.client.finite]
        if halted:
            self._stop(pending.round, left_out, int(heard.sum()))
        if fate is not None:  # who is meant to send NaN is no news
            left_out = np.setdiff1d(left_out, ids[fate.corrupt])
        if len(left_out):
            warnings.warn(
                f"round {pending.round}: left out {len(left_out)} of {heard.sum()} clients whose "
                f"update was not finite: {_names(left_out)}.",
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
        )

    def _compiled_round(self, plan: Plan) -> Any:
        staged = self.stage(1)
        everywhere, split = replicated(plan), over_clients(plan)
        algorithm = self.algorithm
        per_slot: Any = split
        shardings = RoundMetrics(per_slot, per_slot, per_slot, cast(Any, everywhere), per_slot)
        round_program = jax.jit(
            lambda state, private, examples, cohort, key: algorithm.round(
                state, private, examples, cohort, key, plan
            ),
            donate_argnums=(0, 1),
            out_shardings=(everywhere, split, shardings),
        )
        stage = self.stage
        arguments = (self.state, staged.private, stage.train, staged.cohort, stage.key)
        return self._timed(round_program, "round", arguments)

    def _timed(self, program: Any, name: str, arguments: tuple[Any, ...]) -> Any:
        start = time.perf_counter()
        with conv.recording() as lowerings:
            traced = program.trace(*arguments)
        self.lowerings |= lowerings
        lowering = time.perf_counter()
        lowered = traced.lower()
        compiling = time.perf_counter()
        compiled = lowered.compile()
        end = time.perf_counter()
        self.readings[f"{name}_trace_seconds"] = lowering - start
        self.readings[f"{name}_lowering_seconds"] = compiling - lowering
        self.readings[f"{name}_compile_seconds"] = end - compiling
        return compiled

    def _expose(
        self, faults: Faults | None, rule: CohortRule, root: jax.Array, classes: int
    ) -> Exposure | None:
        if faults is None:
            return None
        checks.check_faults(self.algorithm, faults, rule)
        return Exposure(faults, root, self.population, self.size, classes)

    def _stop(self, round: int, left_out: np.ndarray, clients: int) -> None:
        if len(left_out) == clients:
            what = (
                f"none of the {clients} clients had a finite update ({_names(left_out)}), so there "
                "is nothing to average"
            )
        else:
            what = (
                f"the updates of {clients - len(left_out)} clients are finite, but not the model "
                "they add up to"
            )
        raise DivergedError(
            f"round {round}: {what}. The model is as after round {round - 1}; lower the client's "
            "or the server's learning rate, or look for NaN in the data.",
            self.result(),
        )


def _names(clients: np.ndarray) -> str:
    return ", ".join(map(str, clients[:10])) + (", ..." if len(clients) > 10 else "")
