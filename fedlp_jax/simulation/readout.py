"""What a round's numbers are to the host, where each of several processes has only some of them.

A round leaves the numbers of its clients on the devices that ran them. With one process the host
reads them there. With several, a program of its own hands them round after the round, all in one
message, and with them whether a process was asked to stop: so every process learns that after the
same round, whichever of them got the signal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax.execution import processes as hosts
from fedlp_jax.execution.map_clients import Plan, over_clients, replicated
from fedlp_jax.types import Array, PyTree, RoundMetrics

_AHEAD = 1  # rounds that a process may have started before it reads of one


class _Shared(NamedTuple):
    """A round's numbers on their way to all processes."""

    round: int
    words: Array  # i32[D * P, n + 1], as `pack` has them; the last column: asked to stop
    halted: Array  # which every device has anyway
    shapes: PyTree  # of what is in the words


class Readout:
    """Reads what rounds report, and knows whether the run is to end.

    started = readout.start(metrics)                    # dispatches; waits for nothing
    metrics, tested = readout.read((started, tested))   # numpy
    """

    def __init__(self, plan: Plan):
        """Prepares for rounds on this plan's devices."""
        self._plan, self._split = plan, over_clients(plan)
        self._several = hosts.count() > 1
        self._round, self._asked = 0, False
        self._last: int | None = None  # the round after which the run ends
        self._pack = jax.jit(pack, out_shardings=replicated(plan))

    def meet(self) -> None:
        """Waits until all processes have come so far, and opens the connections of their devices.

        These are to be opened within half a minute of each other (measured: gloo gives up then).
        What comes later may take as long as it will: compiling takes longer on one machine than on
        another, and so does a round.
        """
        if self._several:
            hosts.exchange("meet", "")
            zeros = hosts.put(np.zeros((self._plan.devices or 1, 1), np.int32), self._split)
            jax.block_until_ready(self._pack(zeros))

    def ends(self, round: int, stop: Callable[[], bool]) -> bool:
        """Whether the run ends before this round. Ask before each.

        With several processes the first round of which any of them said that it was asked to stop
        is followed by one more, since others may have started that before they read of it.
        """
        if not self._several:
            return stop()
        self._round, self._asked = round, stop()
        return self._last is not None and round > self._last

    def start(self, metrics: RoundMetrics) -> Any:
        """Makes a round's numbers readable here; waits for nothing."""
        if not self._several:
            with jax.transfer_guard_device_to_host("allow"):  # it is meant, as device_get is
                for leaf in jax.tree.leaves(metrics):
                    leaf.copy_to_host_async()  # once it is there, not when it is asked for
            return metrics
        split = metrics._replace(halted=cast(Any, ()))
        slots = metrics.upload.shape[0]
        asked = hosts.put(np.full((slots, 1), self._asked, np.int32), self._split)
        words = self._pack((split, asked))
        return _Shared(self._round, words, metrics.halted, jax.tree.map(jax.typeof, split))

    def read(self, numbers: tuple[Any, Any]) -> tuple[RoundMetrics, Any]:
        """A round's numbers as `start` gave them, and its test, in numpy; waits for them."""
        started, tested = numbers
        if not isinstance(started, _Shared):
            return jax.device_get(numbers)
        words, halted, tested = jax.device_get((started.words, started.halted, tested))
        if self._last is None and words[:, -1].any():
            self._last = started.round + _AHEAD
        return unpack(words, started.shapes)._replace(halted=halted), tested


def pack(tree: PyTree) -> Array:
    """A tree of `[S, ...]` of any numbers -> `i32[S, n]`, the same bits."""
    return jnp.concatenate([_words(leaf) for leaf in jax.tree.leaves(tree)], axis=1)


def unpack(words: np.ndarray, shapes: PyTree) -> PyTree:
    """What `pack` was given, in numpy.

    Args:
      words: `i32[S, n]`; further columns are left aside.
      shapes: tree of shapes and dtypes.
    """
    leaves, treedef = jax.tree.flatten(shapes)
    found, start = [], 0
    for leaf in leaves:
        wide = np.dtype(leaf.dtype).itemsize // 4  # words of a number; 0 = less than one
        stop = start + int(np.prod(leaf.shape[1:])) * max(wide, 1)
        part = np.ascontiguousarray(words[:, start:stop])
        part = part.view(leaf.dtype) if wide else part.astype(leaf.dtype)
        found.append(part.reshape(leaf.shape))
        start = stop
    return jax.tree.unflatten(treedef, found)


def _words(leaf: Array) -> Array:
    """`[S, ...]` -> `i32[S, n]`; a whole number smaller than a word takes one."""
    if leaf.dtype.itemsize < 4:
        assert not jnp.issubdtype(leaf.dtype, jnp.floating), leaf.dtype
        leaf = leaf.astype(jnp.int32)
    return jax.lax.bitcast_convert_type(leaf, jnp.int32).reshape(leaf.shape[0], -1)
