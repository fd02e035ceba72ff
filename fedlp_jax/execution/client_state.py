"""What clients keep between rounds: a tree of their own, one stack per level.

The store lies outside the round, whole on every device. A round takes its cohort's rows and changes
them in place, so the cost of copying depends on the cohort, not on the population. The next time a
client may run on any device, so after each round all devices receive the cohort's rows, block by
block. The row buffer is reused, because allocating megabytes per round dominates the gather.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax.errors import FedLPError
from fedlp_jax.execution import processes
from fedlp_jax.execution.map_clients import entry, of_all_devices, on_each_device, with_entry
from fedlp_jax.execution.packing import Packed, pack, room, room_bytes, size_bytes, unpack
from fedlp_jax.execution.plan import Plan, free_bytes, over_clients, replicated, size
from fedlp_jax.execution.scheduling import slots_per_device
from fedlp_jax.types import Array, PyTree

# Bytes of the rows that each device sends at once: every device has room for the blocks of all, and
# a block is one message. Tens of trees of kilobytes or a few of megabytes (not tuned).
_BLOCK_BYTES = 4 * 2**20


class ClientState(NamedTuple):
    """What each client of one level keeps."""

    init: Callable[[Array, Array], PyTree]  # (root key, client i32[]) -> state before any round
    shapes: PyTree  # of what `init` returns


class ClientStore:
    """The state of all clients, on the device.

    Attributes:
      stacks: for each level a tree of `[K_g, ...]`, K_g the clients at that level. A level without
        clients has one unused row, because loops over no slots still need an array.
      place: `i32[K]`, of each client in the stack of its level.
      row_bytes: bytes of one slot, which has room for the state of any level.
    """

    def __init__(
        self,
        levels: Sequence[ClientState],
        assigned: np.ndarray,
        root: Array,
        plan: Plan,
    ):
        """Makes every client's first state from (seed, client).

        Args:
          levels: G levels.
          assigned: `i32[K]`, the level of each client.
          root: the run's root key.
          plan: resolved.

        Raises:
          FedLPError: the state that a level makes differs from its `shapes`.
        """
        shapes = [level.shapes for level in levels]
        _check_shapes(levels, root)
        self.place = np.zeros(len(assigned), np.int32)
        self.stacks: tuple[PyTree, ...] = ()
        for g, level in enumerate(levels):
            members = np.flatnonzero(assigned == g)
            self.place[members] = np.arange(len(members), dtype=np.int32)

            def draw(client: Array, level: ClientState = level) -> PyTree:
                return level.init(root, client)

            stack = jax.jit(
                lambda ids, draw=draw: jax.lax.map(draw, ids), out_shardings=replicated(plan)
            )(np.asarray(members if len(members) else [0], np.int32))  # a level may be empty
            self.stacks += (stack,)
        sizes = room(shapes)
        self.row_bytes = room_bytes(sizes)
        self._empty = jax.jit(
            lambda slots: {dtype: jnp.zeros((slots, n), dtype) for dtype, n in sizes.items()},
            static_argnums=0,
            out_shardings=over_clients(plan),
        )
        self._spare: Packed | None = None  # the buffer, while no round has it
        self._gather = jax.jit(partial(_gather, plan=plan), donate_argnums=3)
        self._scatter = jax.jit(partial(_scatter, shapes=shapes, plan=plan), donate_argnums=(0, 3))

    def rows(self, client: np.ndarray, segment: np.ndarray) -> Packed:
        """The state of a cohort.

        Args:
          client: `i32[D * P]`, of each slot.
          segment: `i32[D, G + 1]`, the slots of each level.

        Returns:
          `[D * P, n]` for each dtype. An empty slot, and a slot of a level without state, hold
          stale data of an earlier cohort; do not read them.
        """
        rows, self._spare = self._spare, None
        if rows is None or any(len(x) != len(client) for x in rows.values()):
            rows = self._empty(len(client))
        return self._gather(self.stacks, self._row_of(client), segment, rows)

    def put(self, client: np.ndarray, segment: np.ndarray, rows: Packed, halted: Array) -> None:
        """Stores the rows of a cohort, unless the run has halted.

        Args:
          client: `i32[D * P]`, of each slot.
          segment: `i32[D, G + 1]`, the slots of each level.
          rows: `[D * P, n]` for each dtype; donated, because the next cohort's rows go there.
          halted: `bool[]` or `bool[1]`; once true, everything stays as it is.
        """
        # The rows are a result too. If the next `_gather` took them directly, the host would wait
        # until this has read them.
        self.stacks, self._spare = self._scatter(
            self.stacks, self._row_of(client), segment, rows, halted
        )

    def _row_of(self, client: np.ndarray) -> np.ndarray:
        return self.place[np.maximum(client, 0)]


def check_memory(
    levels: Sequence[ClientState], assigned: np.ndarray, cohort: int, plan: Plan, other_bytes: int
) -> int:
    """Refuses client state that does not fit the devices, each of which holds that of all clients.

    Args:
      levels: G levels.
      assigned: `i32[K]`, level of each client.
      cohort: C.
      plan: resolved.
      other_bytes: what else each device will hold: the data and the model.

    Returns:
      Modelled bytes on each device: the store, the rows of its slots, which a round changes, and
      the block of rows that devices exchange at once, its own and those of all.

    Raises:
      FedLPError: with both sizes.
    """
    shapes = [level.shapes for level in levels]
    row = room_bytes(room(shapes))
    per_client = [size_bytes(tree) for tree in shapes]
    store = int(np.dot(per_client, np.bincount(assigned, minlength=len(levels))))
    devices = plan.devices or 1
    slots = slots_per_device(cohort, devices)
    exchanged = (devices + 1) * rows_at_once(slots, row)
    need = store + (slots + exchanged) * row
    free = processes.least(free_bytes(plan))
    if free is not None and need + other_bytes > free:
        raise FedLPError(
            f"what {len(assigned)} clients keep between rounds ({_kept(shapes)}) is {size(store)}, "
            f"and takes {size(need)} on each of {devices} device(s), where {size(free)} are free "
            f"and data and model take {size(other_bytes)}; use fewer clients, a smaller model, or "
            "an algorithm whose clients keep nothing (for heads: 'shared' or 'reset_to_init')."
        )
    return need


def rows_at_once(slots: int, row_bytes: int) -> int:
    """How many of a device's slots it sends at once, to every other device.

    Args:
      slots: P, slots of a device.
      row_bytes: bytes of one slot.
    """
    return min(slots, max(1, _BLOCK_BYTES // max(row_bytes, 1)))


def _kept(shapes: Sequence[PyTree]) -> str:
    """The parts of the state in words, by the names at the top of its trees."""
    names = {name for tree in shapes if isinstance(tree, dict) for name in tree}
    return ", ".join(sorted(names)) or "their state"


def _check_shapes(levels: Sequence[ClientState], root: Array) -> None:
    for depth, level in enumerate(levels, 1):
        made = jax.eval_shape(level.init, root, jax.ShapeDtypeStruct((), jnp.int32))
        words = [
            str(jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree))
            for tree in (made, level.shapes)
        ]
        if words[0] != words[1]:
            raise FedLPError(
                f"clients of level {depth} begin with state {words[0]}, but its shapes are "
                f"{words[1]}; give both the same structure."
            )


def _gather(
    stacks: tuple[PyTree, ...], row: Array, segment: Array, rows: Packed, plan: Plan
) -> Packed:
    """Copies each slot's state once, level by level; a `gather` would read one of every level."""
    sizes = {dtype: x.shape[1] for dtype, x in rows.items()}

    def on_device(stacks: tuple[PyTree, ...], row: Array, segment: Array, rows: Packed) -> Packed:
        for g, stack in enumerate(stacks):

            def copy(slot: Array, rows: Packed, stack: PyTree = stack) -> Packed:
                return with_entry(rows, slot, pack(entry(stack, row[slot]), sizes))

            if jax.tree.leaves(stack):
                rows = jax.lax.fori_loop(segment[0, g], segment[0, g + 1], copy, rows)
        return rows

    mapped = on_each_device(on_device, plan, (False, True, True, True), True)
    filled: Packed = mapped(stacks, row, segment, rows)
    return filled


def _scatter(
    stacks: tuple[PyTree, ...],
    row: Array,
    segment: Array,
    rows: Packed,
    halted: Array,
    shapes: Sequence[PyTree],
    plan: Plan,
) -> tuple[tuple[PyTree, ...], Packed]:
    """Every device copies the state of all slots into its own store, block by block."""
    devices = plan.devices or 1
    slots = len(row) // devices
    block = rows_at_once(slots, room_bytes({dtype: x.shape[1] for dtype, x in rows.items()}))

    def on_device(
        stacks: tuple[PyTree, ...], row: Array, segment: Array, rows: Packed, halted: Array
    ) -> tuple[PyTree, ...]:
        def exchange(i: Array, stacks: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
            # The last block starts early, to end with the slots; the rows that it shares with the
            # block before are not stored again.
            first = jnp.minimum(i * block, slots - block)
            local = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, block), rows)
            gathered = of_all_devices(local)
            stored = []
            for g, (stack, like) in enumerate(zip(stacks, shapes, strict=True)):

                def of_device(d: Array, stack: PyTree, g: int = g, like: PyTree = like) -> PyTree:
                    def copy(slot: Array, stack: PyTree) -> PyTree:
                        tree = unpack(entry(gathered, d * block + slot - first), like)
                        return with_entry(stack, row[d * slots + slot], tree)

                    start = jnp.maximum(segment[d, g], i * block)
                    stop = jnp.minimum(segment[d, g + 1], first + block)
                    return jax.lax.fori_loop(start, stop, copy, stack)

                if jax.tree.leaves(stack):
                    stack = jax.lax.fori_loop(0, devices, of_device, stack)
                stored.append(stack)
            return tuple(stored)

        blocks = -(-segment[:, -1].max() // block)  # as many on every device
        return jax.lax.fori_loop(0, jnp.where(halted.any(), 0, blocks), exchange, stacks)

    mapped = on_each_device(on_device, plan, (False, False, False, True, False), False)
    stored: tuple[PyTree, ...] = mapped(stacks, row, segment, rows, halted)
    return stored, rows
