"""Max-pooling whose gradient is fast in XLA's CPU backend, and right where elements tie."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from fedlp_jax.errors import FedLPError
from fedlp_jax.nn.xla import in_memory
from fedlp_jax.types import Array


def max_pool(x: Array, window: Sequence[int] = (2, 2)) -> Array:
    """The largest element of every window; windows do not overlap.

    After a ReLU a third of the windows of a CIFAR-10 image have ties. The gradient goes to the
    first of the largest elements in row-major order, as that of `flax.linen.max_pool` does.

    Args:
      x: `[B, height, width, channels]`. Rows and columns past the last whole window are left out.
      window: its height and width.

    Returns:
      `[B, height // window height, width // window width, channels]`.

    Raises:
      FedLPError: `x` has not four axes.
    """
    kh, kw = window
    if x.ndim != 4:
        raise FedLPError(f"max_pool needs images [B, H, W, channels], not {list(x.shape)}.")
    batch, height, width, channels = x.shape
    h, w = height // kh, width // kw
    x = x[:, : h * kh, : w * kw]
    if _fuses_anew():
        # Its transpose makes XLA write the gradient of `x` once, not work it out in each reader.
        x = lax.optimization_barrier(x)
    return _largest(x.reshape(batch, h, kh, w, kw, channels))


@jax.custom_jvp
def _largest(x: Array) -> Array:
    """`[B, h, kh, w, kw, channels] -> [B, h, w, channels]`; NaN counts as the largest."""
    _, _, kh, _, kw, _ = x.shape
    # Maxima alone, which vectorize; which element it was is worked out for the way back.
    rows = [functools.reduce(jnp.maximum, [x[:, :, i, :, j] for j in range(kw)]) for i in range(kh)]
    return _once(functools.reduce(jnp.maximum, rows))


@_largest.defjvp
def _largest_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    index = _once(_winner(x))
    # One element of a window is selected by its place, never by a comparison with the maximum: XLA
    # may compute the two in separate fusions that differ in the last bit, and then none is equal.
    place = jnp.arange(x.shape[2] * x.shape[4], dtype=index.dtype)
    place = place.reshape(1, 1, x.shape[2], 1, x.shape[4], 1)
    won = jnp.expand_dims(index, (2, 4)) == place
    return _largest(x), jnp.where(won, tangent, jnp.zeros((), tangent.dtype)).sum((2, 4))


def _winner(x: Array) -> Array:
    """The place of the largest element of each window, row-major; NaN counts as the largest."""
    kh, kw = x.shape[2], x.shape[4]
    short = jnp.int8 if kh * kw < 128 else jnp.int32
    # On a CPU floats, as wide as what is usually selected by them: LLVM does not vectorize a select
    # by integers.
    places = jnp.float32 if _fuses_anew() else short
    best = x[:, :, 0, :, 0]
    index = jnp.zeros(best.shape, places)
    for place in range(1, kh * kw):
        other = x[:, :, place // kw, :, place % kw]
        better = ~(best >= other) & (best == best)
        best = jnp.where(better, other, best)
        index = jnp.where(better, jnp.asarray(place, places), index)
    return index


def _once(x: Array) -> Array:
    """`[B, h, w, channels]`, computed but once.

    The dense layer behind a pooling would compute a maximum, and the normalisation before it, for
    every weight: first in its product, again where its kernel's gradient is used.
    """
    # That layer reads them in order, the batch first; the batch third is an order of our own, with
    # channels still contiguous.
    return in_memory(x, (1, 2, 0, 3)) if _fuses_anew() else x


def _fuses_anew() -> bool:
    """Whether XLA's backend here computes in every reader what could be read from memory."""
    # On accelerators memory is what is short, and arithmetic is free.
    return jax.default_backend() == "cpu"
