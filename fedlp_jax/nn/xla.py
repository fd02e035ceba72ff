"""Controls what XLA keeps in memory, and in which order it computes.

XLA's CPU backend fuses a cheap computation into every reader of its result: a loop that reads a
number a hundred times computes it a hundred times. It also copies an array that is updated in
place, unless all its readers are known to come first.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from fedlp_jax.types import Array


def materialize(x: Array, order: Sequence[int] | None = None) -> Array:
    """Writes `x` to memory once, with its axes in this order, the last one contiguous.

    If XLA would choose the same order by itself, it may still fuse.

    Args:
      x: any array.
      order: a permutation of its axes, slowest first; None = unchanged.

    Returns:
      The same numbers in the same shape.
    """
    layout = Layout(tuple(range(x.ndim) if order is None else order))
    return lax.optimization_barrier(with_layout_constraint(x, layout))


def order_after(first: Array, x: Array) -> Array:
    """`x`, which XLA computes after `first`, since the result seems to depend on it.

    Args:
      first: at least one float.
      x: any array.

    Returns:
      `x`; zeros if the first number of `first` were less than minus infinity, which never holds.
    """
    never = first.ravel()[0] < -jnp.inf
    return jnp.where(never, jnp.zeros((), x.dtype), x)
