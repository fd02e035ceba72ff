"""Many trees in one: stacks of alike trees, and trees of any structure as flat vectors.

Exit heads of different depths have different structures. Packed, a slot of a cohort has room for
the largest of them; without, it would hold one of every depth, and all but its own for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from fedlp_jax.types import Array, PyTree

Packed = dict[str, Array]  # dtype -> [..., n], the leaves of a tree one after the other, then zeros


def room(shapes: Iterable[PyTree]) -> dict[str, int]:
    """The most numbers of each dtype that one of some trees, or of their shapes, has."""
    most: dict[str, int] = {}
    for tree in shapes:
        for dtype, leaves in _by_dtype(tree).items():
            most[dtype] = max(most.get(dtype, 0), sum(math.prod(x.shape) for x in leaves))
    return most


def room_bytes(room: dict[str, int]) -> int:
    """Bytes of a packed tree with this room."""
    return sum(n * jnp.dtype(dtype).itemsize for dtype, n in room.items())


def pack(tree: PyTree, room: dict[str, int]) -> Packed:
    """The leaves of a tree, dtype -> `[n]` for n of `room`, which has room for it."""
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
    found = []
    for leaf in leaves:
        dtype, size = str(leaf.dtype), math.prod(leaf.shape)
        flat = packed[dtype][start[dtype] : start[dtype] + size]
        found.append(flat.reshape(leaf.shape))
        start[dtype] += size
    return jax.tree.unflatten(treedef, found)


def entry(stack: PyTree, index: Array | int) -> PyTree:
    """The tree at `index` (`i32[]`) of a stack of trees, `[N, ...]`."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stack)


def with_entry(stack: PyTree, index: Array, tree: PyTree) -> PyTree:
    """A stack `[N, ...]` with `tree` at `index` (`i32[]`); in place where the stack is a carry."""
    return jax.tree.map(
        lambda s, x: jax.lax.dynamic_update_index_in_dim(s, x, index, 0), stack, tree
    )


def size_bytes(tree: PyTree) -> int:
    """Bytes of all leaves of a tree, or of one of shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _by_dtype(tree: PyTree) -> dict[str, list[Array]]:
    found: dict[str, list[Array]] = {}
    for leaf in jax.tree.leaves(tree):
        found.setdefault(str(leaf.dtype), []).append(leaf)
    return found
