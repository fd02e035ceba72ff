"""Staging: what a round reads, laid out on the host and put on the devices of a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.clients.failures import Exposure
from fedlp_jax.data.dataset import Dataset, Split
from fedlp_jax.data.partition import Partition
from fedlp_jax.execution import processes as hosts
from fedlp_jax.execution.client_state import PrivateStore
from fedlp_jax.execution.map_clients import (
    HOST,
    Plan,
    over_clients,
    over_clients_of_rounds,
    replicated,
)
from fedlp_jax.execution.packing import Packed
from fedlp_jax.execution.scheduling import Layout, slots_per_device
from fedlp_jax.pruning.submodels import Submodel
from fedlp_jax.simulation.cohorts import CohortBuilder, CohortRule, members
from fedlp_jax.types import Array, Batch, Cohort, Examples, Normalize


class Population(NamedTuple):
    """Whom a run draws its cohorts from, and how."""

    clients: Partition
    rule: CohortRule
    seed: int
    size: int  # C, with over-selection
    assigned: np.ndarray  # i32[K], submodel level of each client
    exposure: Exposure | None  # to faults


class Staged(NamedTuple):
    """One round's input."""

    examples: Examples  # on the devices: the training split, or each device's own part of it
    cohort: Cohort  # on the devices
    private: Packed  # `[D * P, n]`, on the devices; empty if nothing is stored
    host: Cohort  # the same cohort, numpy
    layout: Layout


class StagedRounds(NamedTuple):
    """The input of several rounds in one call; all read the same examples."""

    cohorts: Cohort  # on the devices, stacked [R, ...]; empty after the last
    hosts: list[Cohort]  # the same cohorts, numpy
    layouts: list[Layout]


class Stage:
    """The data and the clients of a run, as its rounds read them.

    Attributes:
      train: the training split, on the devices or, where the plan says so, on the host.
      test: the test split, on the devices.
      key: the run's root key.
      store: private variables of all clients, where they persist.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        data: Dataset,
        population: Population,
        levels: Sequence[Submodel],
        level_cost: Sequence[float],
        root: Array,
        example: Batch,
        plan: Plan,
    ):
        """Puts the data on the devices.

        Args:
          algorithm: what runs.
          data: both splits.
          population: the clients.
          levels: G submodels.
          level_cost: G numbers, modelled cost of one step at each level.
          root: the run's root key.
          example: a batch for shapes.
          plan: resolved, with the place of the data.

        Raises:
          FedLPError: as `PrivateStore`.
        """
        self._population, self._level_cost = population, level_cost
        self._local_steps = algorithm.local_steps
        everywhere = replicated(plan)
        self.key = hosts.put(root, everywhere)
        self.train = on_host(data.train, data.normalize)
        if plan.data != HOST:
            self.train = hosts.put(self.train, everywhere)
        self.test = hosts.put(on_host(data.test, data.normalize), everywhere)
        self.store: PrivateStore | None = None
        if algorithm.persist:
            self.store = PrivateStore(levels, population.assigned, root, example, plan)
        self.lay_on(plan)

    def lay_on(self, plan: Plan) -> None:
        """Lays later cohorts out for this plan, on the same devices."""
        p = self._population
        self._plan = plan
        self.builder = CohortBuilder(
            p.clients, p.assigned, self._local_steps, self._level_cost, plan
        )
        self._rows = self.builder.most_rows(p.size) if plan.data == HOST else 0

    @property
    def round_bytes(self) -> int:
        """Bytes on each device for one round: examples, also of the next one, and private rows."""
        one = sum(x[:1].nbytes for x in (self.train.inputs, self.train.labels))
        row = 0 if self.store is None else self.store.row_bytes
        slots = slots_per_device(self._population.size, self._plan.devices or 1)
        return 2 * self._rows * one + slots * row

    def __call__(self, round: int) -> Staged:
        """What a round reads, on its way to the devices; waits for nothing."""
        host, layout = self._cohort(round)
        private: Packed = {}
        if self.store is not None:
            private = self.store.rows(np.asarray(host.client), np.asarray(host.segment))
        examples = self.train
        if self._plan.data == HOST:
            examples, host = self._sent(host)
        cohort = hosts.put(host, over_clients(self._plan))
        return Staged(examples, cohort, private, host, layout)

    def several(self, rounds: Sequence[int]) -> StagedRounds:
        """What several rounds read, in arrays for as many as the plan's `rounds_at_once`."""
        cohorts, layouts = zip(*map(self._cohort, rounds), strict=True)
        room = self._plan.rounds_at_once or 1

        def stacked(*arrays: np.ndarray) -> np.ndarray:
            stack = np.zeros((room, *arrays[0].shape), arrays[0].dtype)
            np.stack(arrays, out=stack[: len(arrays)])
            return stack

        stack = jax.tree.map(stacked, *cohorts)
        stack = jax.device_put(stack, over_clients_of_rounds(self._plan))
        return StagedRounds(stack, list(cohorts), list(layouts))

    def _cohort(self, round: int) -> tuple[Cohort, Layout]:
        """The cohort of a round, in numpy."""
        p = self._population
        ids = members(p.rule, p.seed, round, p.clients.clients, p.size)
        host, layout = self.builder.build(ids)
        if p.exposure is not None:
            slots = np.asarray(host.client)
            host = dataclasses.replace(host, conditions=p.exposure.conditions(round, slots))
        return host, layout

    def keep(self, staged: Staged, private: Packed, halted: Array) -> None:
        """Stores what a round has made of the private variables, unless the run has halted."""
        if self.store is not None:
            client, segment = np.asarray(staged.host.client), np.asarray(staged.host.segment)
            self.store.put(client, segment, private, halted)

    def _sent(self, cohort: Cohort) -> tuple[Examples, Cohort]:
        """To each device the examples of its own clients, and where the cohort finds them there."""
        devices = self._plan.devices or 1
        own, rows = own_rows(cohort, devices, self._rows)
        train = self.train
        inputs = np.zeros((devices * self._rows, *train.inputs.shape[1:]), train.inputs.dtype)
        labels = np.zeros(devices * self._rows, train.labels.dtype)
        for d, of_device in enumerate(own):
            here = slice(d * self._rows, d * self._rows + len(of_device))
            # Into its place at once; "clip" only because numpy would copy to be able to raise.
            np.take(train.inputs, of_device, axis=0, out=inputs[here], mode="clip")
            np.take(train.labels, of_device, axis=0, out=labels[here], mode="clip")
        split, everywhere = over_clients(self._plan), replicated(self._plan)
        shardings = Examples(cast(Any, split), cast(Any, split), cast(Any, everywhere))
        arrays: Any = Examples(cast(Any, inputs), cast(Any, labels), train.normalize)
        sent: Any = jax.tree.map(lambda where, x: hosts.put(x, where), shardings, arrays)
        return sent, dataclasses.replace(cohort, rows=cast(Any, rows))


def own_rows(cohort: Cohort, devices: int, room: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Cuts the rows of a cohort into those of each device.

    Args:
      cohort: numpy, with rows of the split.
      devices: D.
      room: R, rows that a device has room for.

    Returns:
      For each device its rows of the split, at most R; and `i32[D * P, M]`, where each client's
      rows are if device d has its own from d * R on.
    """
    size, rows = np.asarray(cohort.size).reshape(devices, -1), np.asarray(cohort.rows)
    column = np.arange(rows.shape[1])
    valid = column < size.reshape(-1, 1)
    first = np.cumsum(size, axis=1) - size + room * np.arange(devices)[:, None]
    there = np.where(valid, first.reshape(-1, 1) + column, 0).astype(np.int32)
    ends = np.cumsum(size.sum(axis=1))
    return np.split(rows[valid], ends[:-1]), there


def on_host(split: Split, normalize: Normalize) -> Examples:
    """A split as a round takes it, in numpy."""
    arrays: tuple[Any, Any] = split.inputs, split.labels.astype(np.int32, copy=False)
    gain, shift = (np.asarray(x, np.float32) for x in normalize)
    return Examples(*arrays, Normalize(gain, shift))
