"""Simulation: one run, prepared and compiled; it starts rounds and reads their numbers."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax import checks
from fedlp_jax import metrics as metric
from fedlp_jax.algorithms.algorithm import Algorithm
from fedlp_jax.cohort import CohortBuilder, CohortRule, cohort_size, members
from fedlp_jax.costs import Ledger, forward_macs
from fedlp_jax.data.batching import example_of
from fedlp_jax.data.datasets import Dataset, Split
from fedlp_jax.data.partition import Partition
from fedlp_jax.layers import layer_table
from fedlp_jax.placement import Layout, Plan, over_clients, replicated, resolve
from fedlp_jax.result import DivergedError, History, Result, Row
from fedlp_jax.store import PrivateStore
from fedlp_jax.types import (
    Array,
    Cohort,
    Examples,
    Normalize,
    RoundMetrics,
    ServerState,
    Variables,
)


class Pending(NamedTuple):
    """A dispatched round whose numbers the host has not read."""

    round: int
    cohort: Cohort  # numpy
    metrics: RoundMetrics  # on the device
    tested: dict[str, Any] | None


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
    ):
        checks.check_numbers(rounds, seed, eval_every)
        checks.check_partition(clients, data)
        self.algorithm, self.rounds, self.seed, self.rule = algorithm, rounds, seed, cohort
        self.eval_every = eval_every or max(rounds, 1)
        self.population = clients.clients
        self.size = cohort_size(cohort, self.population, seed)
        self.plan = resolve(plan, self.size)
        root = jax.random.key(seed)
        example = example_of(_examples(data.train, data.normalize))
        checks.check_model(algorithm, example, data, root)
        assigned = algorithm.assign(root, self.population)
        shapes = checks.initial_state(algorithm, example, root, self.population)
        if variables is not None:
            checks.check_variables(variables, shapes.variables)
        state = algorithm.init(root, example, self.population, variables)
        self.layers = layer_table(state.variables, algorithm.layers)
        self.levels = algorithm.levels(state.variables, example)
        self.builder = CohortBuilder(
            clients, assigned, algorithm.local_steps, self._level_costs(root, example), self.plan
        )
        everywhere = replicated(self.plan)
        # A copy: rounds donate the state, and the caller's own arrays must survive.
        self.state: ServerState = jax.device_put(jax.tree.map(jnp.copy, state), everywhere)
        self.key = jax.device_put(root, everywhere)
        self.train = jax.device_put(_examples(data.train, data.normalize), everywhere)
        self.test = jax.device_put(_examples(data.test, data.normalize), everywhere)
        self.store = None
        if algorithm.persist:
            self.store = PrivateStore(self.levels, assigned, root, example, self.plan)
        self.ledger = Ledger(self.layers, self.population)
        self.history = History()
        self.readings: dict[str, float] = {}
        self.padded_share = self.imbalance = 0.0  # sums over rounds
        self.clock = 0.0

    def compile(self) -> None:
        """Traces, lowers and compiles the round and the evaluation, and times each."""
        self.clock = time.perf_counter()
        if self.rounds == 0:
            return
        cohort, private, _, _ = self._stage(1)
        everywhere, split = replicated(self.plan), over_clients(self.plan)
        algorithm, plan = self.algorithm, self.plan
        per_slot: Any = split
        shardings = RoundMetrics(per_slot, per_slot, per_slot, halted=cast(Any, everywhere))
        round_program = jax.jit(
            lambda state, private, examples, cohort, key: algorithm.round(
                state, private, examples, cohort, key, plan
            ),
            donate_argnums=(0, 1),
            out_shardings=(everywhere, split, shardings),
        )
        arguments = (self.state, private, self.train, cohort, self.key)
        self.round_program = self._timed(round_program, "round", arguments)
        test_program = jax.jit(metric.evaluator(self.algorithm, self.plan))
        self.test_program = self._timed(test_program, "test", (self.state.variables, self.test))
        self.clock = time.perf_counter()

    def dispatch(self, round: int) -> Pending:
        """Starts a round and, where due, its evaluation; waits for nothing."""
        cohort, private, host, layout = self._stage(round)
        self.padded_share += layout.padded_share
        self.imbalance += layout.imbalance
        self.state, private, metrics = self.round_program(
            self.state, private, self.train, cohort, self.key
        )
        if self.store is not None:
            self.store.put(np.asarray(host.client), private)
        tested = None
        if round % self.eval_every == 0 or round == self.rounds:
            tested = self.test_program(self.state.variables, self.test)
        return Pending(round, host, metrics, tested)

    def read(self, pending: Pending, listeners: Sequence[Callable[[Row], None]] = ()) -> Row:
        """Waits for a round's numbers and books them.

        Raises:
          DivergedError: no client counted, or what they add up to is not finite.
        """
        metrics, tested = jax.device_get((pending.metrics, pending.tested))
        now = time.perf_counter()
        ran = np.asarray(pending.cohort.client) >= 0
        ids = np.asarray(pending.cohort.client)[ran]
        order = np.argsort(ids)
        halted = bool(metrics.halted)
        ids = ids[order]
        metrics = jax.tree.map(lambda x: x[ran][order], metrics._replace(halted=None))
        row: Row = {"round": pending.round}
        row |= metric.train_metrics(
            metrics.client,
            np.asarray(pending.cohort.level)[ran][order],
            len(self.levels),
            self.algorithm.train_loss,
        )
        if tested is not None:
            row |= metric.test_metrics(tested)
        row |= self.ledger.add(ids, metrics.upload, metrics.download)
        row["seconds"], self.clock = now - self.clock, now
        self.history.rows.append(row)
        for listener in listeners:
            listener(row)
        left_out = ids[~metrics.client.finite]
        if halted:
            self._stop(pending.round, left_out, len(ids))
        if len(left_out):
            warnings.warn(
                f"round {pending.round}: left out {len(left_out)} of {len(ids)} clients whose "
                f"update was not finite: {_names(left_out)}.",
                RuntimeWarning,
                stacklevel=3,
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

    def _stage(self, round: int) -> tuple[Cohort, tuple[Any, ...], Cohort, Layout]:
        """The cohort of a round: on the device, its private variables, on the host, its slots."""
        ids = members(self.rule, self.seed, round, self.population, self.size)
        host, layout = self.builder.build(ids)
        private: tuple[Any, ...] = ()
        if self.store is not None:
            private = self.store.rows(np.asarray(host.client))
        return jax.device_put(host, over_clients(self.plan)), private, host, layout

    def _timed(self, program: Any, name: str, arguments: tuple[Any, ...]) -> Any:
        start = time.perf_counter()
        traced = program.trace(*arguments)
        lowering = time.perf_counter()
        lowered = traced.lower()
        compiling = time.perf_counter()
        compiled = lowered.compile()
        end = time.perf_counter()
        self.readings[f"{name}_trace_seconds"] = lowering - start
        self.readings[f"{name}_lowering_seconds"] = compiling - lowering
        self.readings[f"{name}_compile_seconds"] = end - compiling
        return compiled

    def _level_costs(self, root: Array, example: Any) -> list[float]:
        if len(self.levels) == 1:
            return [1.0]
        return [
            float(
                sum(
                    forward_macs(
                        level.task, checks.initial_shapes(level.task, root, example), example
                    ).values()
                )
            )
            for level in self.levels
        ]

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


def _examples(split: Split, normalize: Normalize) -> Examples:
    arrays: tuple[Any, Any] = split.inputs, split.labels.astype(np.int32)  # on the host still
    gain, shift = (np.asarray(x, np.float32) for x in normalize)
    return Examples(*arrays, Normalize(gain, shift))
