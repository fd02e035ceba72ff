"""Trees of any structure as flat vectors, one per dtype.

What clients keep at different depths, such as an exit head, has different structures. Packed, a
slot of a cohort has room for the largest of them; otherwise it would hold one of every depth and
use only its own. (jax's `ravel_pytree` makes one vector of one dtype, in which an int32 of over 24
bits loses digits.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from fedlp_jax.types import Array, PyTree

Packed = dict[str, Array]  # dtype -> [..., n], the raveled leaves of a tree, then zeros


def room(shapes: Iterable[PyTree]) -> dict[str, int]:
    """For each dtype, the most numbers that any of the trees (or trees of shapes) holds."""
    most: dict[str, int] = {}
    for tree in shapes:
        for dtype, leaves in _by_dtype(tree).items():
            most[dtype] = max(most.get(dtype, 0), sum(math.prod(x.shape) for x in leaves))
    return most


def room_bytes(room: dict[str, int]) -> int:
    """Bytes of a packed tree of these sizes."""
    return sum(n * jnp.dtype(dtype).itemsize for dtype, n in room.items())


def pack(tree: PyTree, room: dict[str, int]) -> Packed:
    """Packs a tree into vectors of the sizes in `room`, which must suffice."""
    leaves, packed = _by_dtype(tree), {}
    assert leaves.keys() <= room.keys(), (leaves.keys(), room.keys())
    for dtype, n in room.items():
        flat = [x.ravel() for x in leaves.get(dtype, ())]
        rest = n - sum(x.size for x in flat)
        packed[dtype] = jnp.concatenate([*flat, jnp.zeros(rest, dtype)])
    return packed


def unpack(packed: Packed, shapes: PyTree) -> PyTree:
    """The inverse of `pack`, for a tree of these shapes and dtypes."""
    leaves, treedef = jax.tree.flatten(shapes)
    start = dict.fromkeys(packed, 0)
    parts = []
    for leaf in leaves:
        dtype, size = str(leaf.dtype), math.prod(leaf.shape)
        flat = packed[dtype][start[dtype] : start[dtype] + size]
        parts.append(flat.reshape(leaf.shape))
        start[dtype] += size
    return jax.tree.unflatten(treedef, parts)


def size_bytes(tree: PyTree) -> int:
    """Bytes of all leaves of a tree, or of a tree of shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _by_dtype(tree: PyTree) -> dict[str, list[Array]]:
    leaves: dict[str, list[Array]] = {}
    for leaf in jax.tree.leaves(tree):
        leaves.setdefault(str(leaf.dtype), []).append(leaf)
    return leaves
