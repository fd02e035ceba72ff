"""Staging: what a round reads, laid out on the host and put on the devices of a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedlp_jax import hosts
from fedlp_jax.algorithms.algorithm import Algorithm
from fedlp_jax.cohort import CohortBuilder, CohortRule, members
from fedlp_jax.data.arrays import Dataset, Split
from fedlp_jax.data.partition import Partition
from fedlp_jax.faults import Exposure
from fedlp_jax.placement import Layout, Plan, over_clients, replicated
from fedlp_jax.store import PrivateStore
from fedlp_jax.submodel import Submodel
from fedlp_jax.types import Array, Batch, Cohort, Examples, Normalize, PyTree


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

    cohort: Cohort  # on the devices
    private: tuple[PyTree, ...]  # of each level [D * P, ...], on the devices; empty if nothing is
    host: Cohort  # the same cohort, numpy
    layout: Layout


class Stage:
    """The data and the clients of a run, as its rounds read them.

    Attributes:
      train: the training split on the devices.
      test: the test split.
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
          plan: resolved.

        Raises:
          FedLPError: the private variables would not fit this machine's memory.
        """
        self._population, self._level_cost = population, level_cost
        self._local_steps = algorithm.local_steps
        everywhere = replicated(plan)
        self.key = hosts.put(root, everywhere)
        self.train = hosts.put(on_host(data.train, data.normalize), everywhere)
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

    def __call__(self, round: int) -> Staged:
        """What a round reads."""
        p = self._population
        ids = members(p.rule, p.seed, round, p.clients.clients, p.size)
        host, layout = self.builder.build(ids)
        slots = np.asarray(host.client)
        if p.exposure is not None:
            host = dataclasses.replace(host, conditions=p.exposure.conditions(round, slots))
        private = () if self.store is None else self.store.rows(slots)
        return Staged(hosts.put(host, over_clients(self._plan)), private, host, layout)

    def keep(self, staged: Staged, private: tuple[PyTree, ...]) -> None:
        """Stores what a round has made of the private variables."""
        if self.store is not None:
            self.store.put(np.asarray(staged.host.client), private)


def on_host(split: Split, normalize: Normalize) -> Examples:
    """A split as a round takes it, in numpy."""
    arrays: tuple[Any, Any] = split.inputs, split.labels.astype(np.int32)
    gain, shift = (np.asarray(x, np.float32) for x in normalize)
    return Examples(*arrays, Normalize(gain, shift))
