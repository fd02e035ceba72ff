"""A convolution as one matrix product: all patches of the input (im2col) times the kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fedlp_jax.types import Array


class Window(NamedTuple):
    """How the kernel moves over the input, one entry per spatial axis."""

    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]  # zeros before and after; negative crops
    dilation: tuple[int, ...]  # step between the kernel's own elements


def reach(rhs: Array, dilation: Sequence[int]) -> list[int]:
    """Extent of the dilated kernel `[*kernel, in, out]` along each spatial axis."""
    return [(size - 1) * step + 1 for size, step in zip(rhs.shape[:-2], dilation, strict=True)]


def out_shape(lhs: Array, rhs: Array, window: Window) -> list[int]:
    """Spatial shape of the result; entries below 1 where the kernel does not fit."""
    axes = zip(
        lhs.shape[1:-1], window.pads, reach(rhs, window.dilation), window.strides, strict=True
    )
    return [(size + sum(pads) - extent) // stride + 1 for size, pads, extent, stride in axes]


def patches(lhs: Array, rhs: Array, window: Window, precision: Any, preferred: Any) -> Array:
    """Multiplies all patches `[B * out pixels, kernel * in]` by the kernel.

    Unfolds one axis after the other, the last first: a 3 x 3 kernel takes 3 + 3 shifted copies
    instead of 9, and its gradient as few additions. Plain differentiation gives reverse mode,
    forward mode and higher derivatives.
    """
    shape = (lhs.shape[0], *out_shape(lhs, rhs, window), rhs.shape[-1])
    unfolded = lhs
    for axis in reversed(range(1, lhs.ndim - 1)):
        unfolded = _unfold(unfolded, axis, rhs.shape[axis - 1], shape[axis], window)
    rows, depth, features = math.prod(shape[:-1]), math.prod(rhs.shape[:-1]), shape[-1]
    kernel = rhs.reshape(depth, features)
    contract = ((1,), (0,))
    if depth >= features:
        # The kernel's gradient then is `[out, kernel * in]`, which XLA's CPU backend computes up
        # to twice as fast as its transpose. The barrier keeps XLA from transposing it back.
        kernel, contract = lax.optimization_barrier(kernel.T), ((1,), (1,))
    out = lax.dot_general(
        unfolded.reshape(rows, depth),
        kernel,
        (contract, ((), ())),
        precision=precision,
        preferred_element_type=_sum_dtype(lhs.dtype) if preferred is None else preferred,
    )
    return out.astype(lhs.dtype if preferred is None else preferred).reshape(shape)


def _unfold(x: Array, axis: int, size: int, out: int, window: Window) -> Array:
    """Stacks the `size` elements that a kernel covers along `axis` on the channel axis.

    `x: [..., n, ..., channels] -> [..., out, ..., size * channels]`, kernel element major.
    """
    strides, all_pads, dilation = window
    stride, pads, step = strides[axis - 1], all_pads[axis - 1], dilation[axis - 1]
    if any(pads):
        margins = [(0, 0, 0)] * x.ndim
        margins[axis] = (*pads, 0)
        x = lax.pad(x, jnp.zeros((), x.dtype), margins)
    last = (out - 1) * stride + 1
    parts = [lax.slice_in_dim(x, i * step, i * step + last, stride, axis) for i in range(size)]
    return parts[0] if size == 1 else lax.concatenate(parts, x.ndim - 1)


def _sum_dtype(dtype: Any) -> Any:
    """The dtype requested for sums: float32 for short floats on a CPU, else None.

    Accelerators sum short floats in float32 anyway. If requested, they would also write float32 and
    multiply float32 in the backward pass.
    """
    short = dtype in (jnp.bfloat16, jnp.float16)
    return jnp.float32 if short and jax.default_backend() == "cpu" else None
