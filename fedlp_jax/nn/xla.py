"""What XLA may compute anew where it is used, what must be in memory once, and in which order.

XLA's CPU backend fuses a cheap computation into everything that reads its result, however often
that does. A loop that reads each number a hundred times then computes it a hundred times. And it
copies what one computation changes in place unless all that read it are known to come before.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from fedlp_jax.types import Array


def in_memory(x: Array, order: Sequence[int] | None = None) -> Array:
    """`x`, laid out in memory with its axes in this order, the last one contiguous.

    In another order than XLA would choose it is written once, and whatever reads it reads that. In
    the order that XLA would choose by itself, that is not sure: it may fuse as before.

    Args:
      x: any array.
      order: a permutation of its axes, the slowest first; None = as they are.

    Returns:
      The same numbers in the same shape.
    """
    layout = Layout(tuple(range(x.ndim) if order is None else order))
    return lax.optimization_barrier(with_layout_constraint(x, layout))


def after(first: Array, x: Array) -> Array:
    """`x`, of which XLA believes that it depends on `first`: an order between two computations.

    Args:
      first: of one float at least.
      x: any array.

    Returns:
      `x`; zeros if the first number of `first` were less than minus infinity, which none is.
    """
    never = first.ravel()[0] < -jnp.inf
    return jnp.where(never, jnp.zeros((), x.dtype), x)
