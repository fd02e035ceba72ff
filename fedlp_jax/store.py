"""What clients keep between rounds: private variables, one stack per level.

The store lies outside the round. A round takes its cohort's rows and returns them changed, so its
cost follows the cohort, not the population.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as Spec

from fedlp_jax.keys import head_key
from fedlp_jax.packing import Packed, pack, room, unpack
from fedlp_jax.placement import AXIS, Plan, replicated
from fedlp_jax.submodel import Submodel
from fedlp_jax.types import Array, Batch, FedLPError, PyTree


class PrivateStore:
    """Private variables of all clients, on the device.

    Attributes:
      stacks: for each level a tree of `[K_g, ...]`, K_g the clients at that level.
    """

    def __init__(
        self,
        levels: Sequence[Submodel],
        assigned: np.ndarray,
        root: Array,
        example: Batch,
        plan: Plan,
    ):
        """Draws every client's first private variables from (seed, client).

        Args:
          levels: G levels.
          assigned: `i32[K]`, the level of each client.
          root: the run's root key.
          example: a batch for shapes.
          plan: resolved.

        Raises:
          FedLPError: the store would not fit this machine's memory.
        """
        shapes = [level.private_shapes for level in levels]
        counts = np.bincount(assigned, minlength=len(levels))
        self._check_fits(shapes, counts, plan)
        self._level = assigned
        self._row = np.zeros(len(assigned), np.int32)
        self.stacks: tuple[PyTree, ...] = ()
        for g, level in enumerate(levels):
            members = np.flatnonzero(assigned == g)
            self._row[members] = np.arange(len(members), dtype=np.int32)

            def draw(client: Array, level: Submodel = level) -> PyTree:
                return level.private(head_key(root, client), example)

            stack = jax.jit(
                lambda ids, draw=draw: jax.lax.map(draw, ids), out_shardings=replicated(plan)
            )(np.asarray(members if len(members) else [0], np.int32))  # a level may be empty
            self.stacks += (stack,)
        wanted = room(shapes)
        self._gather = jax.jit(partial(_gather, wanted=wanted, plan=plan))
        self._scatter = jax.jit(partial(_scatter, shapes=shapes, plan=plan), donate_argnums=0)

    def rows(self, client: np.ndarray, segment: np.ndarray) -> Packed:
        """The private variables of a cohort.

        Args:
          client: `i32[D * P]`, of each slot.
          segment: `i32[D, G + 1]`, the slots of each level.

        Returns:
          `[D * P, n]` for each dtype; zeros in empty slots.
        """
        return self._gather(self.stacks, self._row_of(client), segment)

    def put(self, client: np.ndarray, segment: np.ndarray, rows: Packed, halted: Array) -> None:
        """Stores the rows of a cohort; once `halted`, `bool[]`, everything stays as it is."""
        self.stacks = self._scatter(self.stacks, self._row_of(client), segment, rows, halted)

    def _row_of(self, client: np.ndarray) -> np.ndarray:
        return self._row[np.maximum(client, 0)]

    @staticmethod
    def _check_fits(shapes: Sequence[PyTree], counts: np.ndarray, plan: Plan) -> None:
        per_client = [
            sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shape)) for shape in shapes
        ]
        need = int(np.dot(per_client, counts))
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        copies = plan.devices or 1 if jax.default_backend() == "cpu" else 1
        if need * copies > have // 2:
            raise FedLPError(
                f"heads='persist' would keep {need / 2**30:.1f} GiB for {int(counts.sum())} "
                f"clients on {copies} device(s), more than half of the {have / 2**30:.0f} GiB of "
                "this machine; use heads='shared' or 'reset_to_init', or fewer clients."
            )


def _gather(
    stacks: tuple[PyTree, ...], row: Array, segment: Array, wanted: dict[str, int], plan: Plan
) -> Packed:
    """Copies each slot's head once, level by level; a `gather` would read one of every level."""

    def on_device(stacks: tuple[PyTree, ...], row: Array, segment: Array) -> Packed:
        rows = {dtype: jnp.zeros((len(row), n), dtype) for dtype, n in wanted.items()}
        for g, stack in enumerate(stacks):

            def copy(slot: Array, rows: Packed, stack: PyTree = stack) -> Packed:
                return _set(rows, pack(_at(stack, row[slot]), wanted), slot)

            if jax.tree.leaves(stack):
                rows = jax.lax.fori_loop(segment[0, g], segment[0, g + 1], copy, rows)
        return rows

    specs = (Spec(), Spec(AXIS), Spec(AXIS))
    mapped = jax.shard_map(
        on_device, mesh=plan.mesh, in_specs=specs, out_specs=Spec(AXIS), check_vma=False
    )
    return mapped(stacks, row, segment)


def _scatter(
    stacks: tuple[PyTree, ...],
    row: Array,
    segment: Array,
    rows: Packed,
    halted: Array,
    shapes: Sequence[PyTree],
    plan: Plan,
) -> tuple[PyTree, ...]:
    """Every device copies the heads of all slots into its own store."""
    devices = plan.devices or 1

    def on_device(
        stacks: tuple[PyTree, ...], row: Array, segment: Array, rows: Packed, halted: Array
    ) -> tuple[PyTree, ...]:
        rows = jax.lax.all_gather(rows, AXIS, tiled=True)
        slots = len(row) // devices
        stop = jnp.where(halted, segment[:, :-1], segment[:, 1:])
        stored = []
        for g, (stack, like) in enumerate(zip(stacks, shapes, strict=True)):

            def copy(slot: Array, stack: PyTree, like: PyTree = like) -> PyTree:
                return _set(stack, unpack(_at(rows, slot), like), row[slot])

            def of_device(d: Array, stack: PyTree, g: int = g, copy: Any = copy) -> PyTree:
                first = d * slots
                return jax.lax.fori_loop(first + segment[d, g], first + stop[d, g], copy, stack)

            if jax.tree.leaves(stack):
                stack = jax.lax.fori_loop(0, devices, of_device, stack)
            stored.append(stack)
        return tuple(stored)

    specs = (Spec(), Spec(), Spec(), Spec(AXIS), Spec())
    mapped = jax.shard_map(
        on_device, mesh=plan.mesh, in_specs=specs, out_specs=Spec(), check_vma=False
    )
    return mapped(stacks, row, segment, rows, halted)


def _at(stack: PyTree, index: Array) -> PyTree:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stack)


def _set(stack: PyTree, tree: PyTree, index: Array) -> PyTree:
    return jax.tree.map(
        lambda s, x: jax.lax.dynamic_update_index_in_dim(s, x, index, 0), stack, tree
    )
