"""Staging: the input of a round, laid out on the host and put on the devices of a plan."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import numpy as np

from fedlp_jax.accounting.macs import relative_work
from fedlp_jax.data.dataset import Split
from fedlp_jax.data.partition import dealt_alike
from fedlp_jax.execution import processes
from fedlp_jax.execution.client_state import ClientStore
from fedlp_jax.execution.packing import Packed, room
from fedlp_jax.execution.plan import HOST, Plan, over_clients, replicated
from fedlp_jax.execution.scheduling import Layout, slots_per_device
from fedlp_jax.simulation.cohorts import CohortBuilder
from fedlp_jax.simulation.personal import ClientBatches, client_batches, eval_batch_size, heads
from fedlp_jax.types import Array, Cohort, Examples, Normalize

if TYPE_CHECKING:
    from fedlp_jax.simulation.spec import Spec


class Staged(NamedTuple):
    """The input of the rounds of one dispatch."""

    examples: Examples  # on the devices: the training split, or each device's own part of it
    cohorts: Cohort  # on the devices, [D * P, R, ...]; empty after the last round
    clients: Packed  # what they keep, [D * P, n], on the devices; empty if nothing is stored
    hosts: list[Cohort]  # the cohort of each round, numpy
    layouts: list[Layout]


class Stage:
    """Puts a run's data on its devices once, and the cohorts of each dispatch.

    Attributes:
      key: the run's root key, on the devices.
      train: the training split, on the devices or (`plan.data == "host"`) in numpy.
      test: the test split, on the devices.
      batches: of the test split by client, on the devices, where each is tested with its own model.
      store: what clients keep between rounds, if they keep anything.
      builder: lays cohorts out.
      level_cost: G numbers, modelled work of a local step of each level.
    """

    def __init__(self, spec: Spec, like: Stage | None = None):
        """Puts the data where the plan says.

        Args:
          spec: of the run.
          like: of another run with the same data and devices, whose arrays it shares.

        Raises:
          FedLPError: as `ClientStore`.
        """
        plan, data = spec.plan, spec.data
        self._spec = spec
        everywhere = replicated(plan)
        self.key = processes.put(spec.root, everywhere)
        self.train: Examples = on_host(data.train, data.normalize) if like is None else like.train
        self.test: Examples = on_host(data.test, data.normalize) if like is None else like.test
        if like is None:
            if plan.data != HOST:
                self.train = processes.put(self.train, everywhere)
            self.test = processes.put(self.test, everywhere)
        self.store: ClientStore | None = None
        if spec.client_state:
            self.store = ClientStore(spec.client_state, spec.assigned, spec.root, plan)
        self.batches = self._test_batches() if spec.algorithm.personal else None
        tasks = [level.task for level in spec.levels]
        self.level_cost = relative_work(tasks, spec.root, spec.example)
        self.lay_on(plan)

    def lay_on(self, plan: Plan, widest: int | None = None) -> None:
        """Lays later cohorts out for this plan, on the same devices.

        Args:
          plan: resolved.
          widest: see `CohortBuilder`.
        """
        spec = self._spec
        self._plan = plan
        self.builder = CohortBuilder(
            spec.clients,
            spec.assigned,
            spec.algorithm.local_steps,
            self.level_cost,
            plan,
            spec.cohorts.size,
            widest,
        )
        self._rows = self.builder.most_rows(spec.cohorts.size) if plan.data == HOST else 0

    @property
    def round_bytes(self) -> int:
        """Bytes on each device for one round: its examples and the next round's, client state."""
        one = sum(x[:1].nbytes for x in (self.train.inputs, self.train.labels))
        row = 0 if self.store is None else self.store.row_bytes
        slots = slots_per_device(self._spec.cohorts.size, self._plan.devices or 1)
        return 2 * self._rows * one + slots * row

    def __call__(self, first: int, count: int = 1) -> Staged:
        """Stages rounds `first` to `first + count - 1`; waits for nothing."""
        cohorts, layouts = self.lay_out(first, count)
        kept, examples = self.kept(cohorts), self.train
        if self._plan.data == HOST:
            (cohort,) = cohorts
            examples, cohort = self._sent(cohort)
            cohorts = [cohort]
        stack = processes.put(self.stacked(cohorts), over_clients(self._plan))
        return Staged(examples, stack, kept, cohorts, layouts)

    def tested(self) -> tuple[Any, ...]:
        """What an evaluation reads besides the server's variables."""
        if self.batches is None or self.store is None:
            return (self.test,)
        return self.test, heads(self.store), self.batches

    def lay_out(self, first: int, count: int = 1) -> tuple[list[Cohort], list[Layout]]:
        """The cohorts of rounds `first` to `first + count - 1`, in numpy."""
        built = [self._cohort(round) for round in range(first, first + count)]
        return [cohort for cohort, _ in built], [layout for _, layout in built]

    def kept(self, cohorts: list[Cohort]) -> Packed:
        """What the clients of the one cohort keep; empty if nothing is stored."""
        if self.store is None:
            return {}
        (cohort,) = cohorts
        return self.store.rows(np.asarray(cohort.client), np.asarray(cohort.segment))

    def shapes(self) -> tuple[Packed, Examples, Cohort]:
        """Shapes and shardings of what a dispatch stages: client state, examples, cohorts."""
        split, everywhere = over_clients(self._plan), replicated(self._plan)
        ids = np.arange(self._spec.cohorts.size)
        cohort = self._exposed(self.builder.build(ids)[0], round=1)
        slots = len(cohort.client)
        state: Any = {}
        if self.store is not None:
            kept = room(level.shapes for level in self._spec.client_state)
            state = {
                dtype: jax.ShapeDtypeStruct((slots, n), dtype, sharding=split)
                for dtype, n in kept.items()
            }
        examples: Any = _shapes(self.train, everywhere)
        if self._plan.data == HOST:
            rows = (self._plan.devices or 1) * self._rows
            inputs, labels = self.train.inputs, self.train.labels
            examples = Examples(
                cast(Any, _shape((rows, *inputs.shape[1:]), inputs.dtype, split)),
                cast(Any, _shape((rows, *labels.shape[1:]), labels.dtype, split)),
                examples.normalize,
            )
        return state, examples, _shapes(self.stacked([cohort]), split)

    def keep(self, cohorts: list[Cohort], clients: Packed, halted: Array) -> None:
        """Stores the client state that a round returned, unless the run has halted.

        Args:
          cohorts: the one of the round, numpy.
          clients: `[D * P, n]` for each dtype.
          halted: `bool[1]`.
        """
        if self.store is not None:
            (cohort,) = cohorts
            client, segment = np.asarray(cohort.client), np.asarray(cohort.segment)
            self.store.put(client, segment, clients, halted)

    def _test_batches(self) -> ClientBatches:
        spec, store = self._spec, self.store
        assert store is not None  # personal layers are kept
        batches = client_batches(
            *dealt_alike(spec.clients, spec.data.test.labels),
            spec.assigned,
            store.place,
            levels=len(spec.levels),
            devices=spec.plan.devices or 1,
            batch_size=eval_batch_size(),
        )
        return processes.put(batches, over_clients(spec.plan))

    def _cohort(self, round: int) -> tuple[Cohort, Layout]:
        """The cohort of a round, in numpy."""
        cohort, layout = self.builder.build(self._spec.cohorts.members(round))
        return self._exposed(cohort, round), layout

    def _exposed(self, cohort: Cohort, round: int) -> Cohort:
        staleness: Any = self._spec.cohorts.staleness(round, np.asarray(cohort.client))
        if staleness is not None:
            cohort = dataclasses.replace(cohort, staleness=staleness)
        exposure = self._spec.exposure
        if exposure is None:
            return cohort
        conditions = exposure.conditions(round, np.asarray(cohort.client))
        return dataclasses.replace(cohort, conditions=conditions)

    def stacked(self, cohorts: list[Cohort]) -> Cohort:
        """Cohorts in one, `[D * P, R, ...]`, with room for the plan's `rounds_at_once`."""
        most = self._plan.rounds_at_once or 1
        if most == 1:
            return jax.tree.map(lambda x: np.asarray(x)[:, None], cohorts[0])

        def stack(*arrays: np.ndarray) -> np.ndarray:
            stacked = np.zeros((len(arrays[0]), most, *arrays[0].shape[1:]), arrays[0].dtype)
            np.stack(arrays, axis=1, out=stacked[:, : len(arrays)])
            return stacked

        return jax.tree.map(stack, *cohorts)

    def _sent(self, cohort: Cohort) -> tuple[Examples, Cohort]:
        """To each device the examples of its own clients, and where the cohort finds them there."""
        devices = self._plan.devices or 1
        own, rows = own_rows(cohort, devices, self._rows)
        train = self.train
        inputs = np.zeros((devices * self._rows, *train.inputs.shape[1:]), train.inputs.dtype)
        labels = np.zeros((devices * self._rows, *train.labels.shape[1:]), train.labels.dtype)
        for d, of_device in enumerate(own):
            here = slice(d * self._rows, d * self._rows + len(of_device))
            # Copied straight into place; numpy would buffer the output in the mode "raise".
            np.take(train.inputs, of_device, axis=0, out=inputs[here], mode="clip")
            np.take(train.labels, of_device, axis=0, out=labels[here], mode="clip")
        split, everywhere = over_clients(self._plan), replicated(self._plan)
        sent = Examples(
            processes.put(cast(Any, inputs), split),
            processes.put(cast(Any, labels), split),
            processes.put(train.normalize, everywhere),
        )
        return sent, dataclasses.replace(cohort, rows=cast(Any, rows))


def own_rows(cohort: Cohort, devices: int, room: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Cuts the rows of a cohort into those of each device.

    Args:
      cohort: numpy, with rows of the split.
      devices: D.
      room: R, the most rows of one device.

    Returns:
      For each device its rows of the split, at most R; and `i32[D * P, M]`, the places of each
      client's rows if device d holds its own from d * R on.
    """
    size, rows = np.asarray(cohort.size).reshape(devices, -1), np.asarray(cohort.rows)
    column = np.arange(rows.shape[1])
    valid = column < size.reshape(-1, 1)
    first = np.cumsum(size, axis=1) - size + room * np.arange(devices)[:, None]
    there = np.where(valid, first.reshape(-1, 1) + column, 0).astype(np.int32)
    ends = np.cumsum(size.sum(axis=1))
    return np.split(rows[valid], ends[:-1]), there


def on_host(split: Split, normalize: Normalize) -> Examples:
    """A split in the form that rounds read, in numpy."""
    arrays: tuple[Any, Any] = split.inputs, split.labels
    gain, shift = (np.asarray(x, np.float32) for x in normalize)
    return Examples(*arrays, Normalize(gain, shift))


def _shape(shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def _shapes(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda x: _shape(x.shape, x.dtype, sharding), tree)
