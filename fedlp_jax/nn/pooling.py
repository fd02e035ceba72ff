"""Max pooling with a gradient that is correct for ties and fast in XLA's CPU backend."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from fedlp_jax.errors import FedLPError
from fedlp_jax.nn.xla import materialize
from fedlp_jax.types import Array


def max_pool(x: Array, window: Sequence[int] = (2, 2)) -> Array:
    """The largest element of every window, without overlap.

    After a ReLU, a third of the windows of a CIFAR-10 image have ties. The gradient goes to the
    first of the largest elements in row-major order, as in `flax.linen.max_pool`.

    Args:
      x: `[B, height, width, channels]`. Rows and columns past the last whole window are dropped.
      window: height and width.

    Returns:
      `[B, height // window height, width // window width, channels]`.

    Raises:
      FedLPError: `x` does not have four axes.
    """
    kh, kw = window
    if x.ndim != 4:
        raise FedLPError(f"max_pool needs images [B, H, W, channels], not {list(x.shape)}.")
    batch, height, width, channels = x.shape
    h, w = height // kh, width // kw
    x = x[:, : h * kh, : w * kw]
    if _recomputes():
        # Its transpose makes XLA write the gradient of `x` once, instead of once per reader.
        x = lax.optimization_barrier(x)
    return _largest(x.reshape(batch, h, kh, w, kw, channels))


@jax.custom_jvp
def _largest(x: Array) -> Array:
    """`[B, h, kh, w, kw, channels] -> [B, h, w, channels]`; NaN counts as the largest."""
    _, _, kh, _, kw, _ = x.shape
    # Maxima only, which vectorize; the backward pass finds the winners.
    rows = [functools.reduce(jnp.maximum, [x[:, :, i, :, j] for j in range(kw)]) for i in range(kh)]
    return _once(functools.reduce(jnp.maximum, rows))


@_largest.defjvp
def _largest_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    index = _once(_winner(x))
    # Select the winner by its place, not by comparison with the maximum: XLA may compute the two in
    # separate fusions that differ in the last bit, and then no element is equal.
    place = jnp.arange(x.shape[2] * x.shape[4], dtype=index.dtype)
    place = place.reshape(1, 1, x.shape[2], 1, x.shape[4], 1)
    won = jnp.expand_dims(index, (2, 4)) == place
    return _largest(x), jnp.where(won, tangent, jnp.zeros((), tangent.dtype)).sum((2, 4))


def _winner(x: Array) -> Array:
    """Row-major index of the largest element of each window; NaN counts as the largest."""
    kh, kw = x.shape[2], x.shape[4]
    short = jnp.int8 if kh * kw < 128 else jnp.int32
    # Floats on a CPU, as wide as the usual data: LLVM does not vectorize a select by integers.
    places = jnp.float32 if _recomputes() else short
    best = x[:, :, 0, :, 0]
    index = jnp.zeros(best.shape, places)
    for place in range(1, kh * kw):
        other = x[:, :, place // kw, :, place % kw]
        better = ~(best >= other) & (best == best)
        best = jnp.where(better, other, best)
        index = jnp.where(better, jnp.asarray(place, places), index)
    return index


def _once(x: Array) -> Array:
    """`[B, h, w, channels]`, computed once.

    Otherwise a dense layer after the pooling recomputes the maximum, and the normalisation before
    it, for every weight: in its product, and again in its kernel's gradient.
    """
    # The dense layer reads batch first. Batch third differs from that, with channels contiguous.
    return materialize(x, (1, 2, 0, 3)) if _recomputes() else x


def _recomputes() -> bool:
    """Whether XLA's backend recomputes a cheap result in every reader."""
    # On accelerators arithmetic is cheap and memory bandwidth is scarce.
    return jax.default_backend() == "cpu"
