"""A convolution as one product of all patches with the kernel."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fedlp_jax.nn.conv.window import Window, out_shape
from fedlp_jax.types import Array


def patches(lhs: Array, rhs: Array, window: Window, precision: Any, preferred: Any) -> Array:
    """One product of all patches `[B * out pixels, kernel * in]` with the kernel.

    Patches are unfolded one axis after the other, the last first: for a 3 x 3 kernel that is 3 + 3
    shifted copies instead of 9, and adding their gradients up takes as few.
    """
    shape = (lhs.shape[0], *out_shape(lhs, rhs, window), rhs.shape[-1])
    unfolded = lhs
    for axis in reversed(range(1, lhs.ndim - 1)):
        unfolded = _unfold(unfolded, axis, rhs.shape[axis - 1], shape[axis], window)
    rows, depth, features = math.prod(shape[:-1]), math.prod(rhs.shape[:-1]), shape[-1]
    kernel = rhs.reshape(depth, features)
    contract = ((1,), (0,))
    if depth >= features:
        # The gradient of the kernel then is `[out, kernel * in]`, which XLA's CPU backend computes
        # up to twice as fast as its transpose. The barrier keeps XLA from turning it back.
        kernel, contract = lax.optimization_barrier(kernel.T), ((1,), (1,))
    out = lax.dot_general(
        unfolded.reshape(rows, depth),
        kernel,
        (contract, ((), ())),
        precision=precision,
        preferred_element_type=sum_dtype(lhs.dtype) if preferred is None else preferred,
    )
    return out.astype(lhs.dtype if preferred is None else preferred).reshape(shape)


def _unfold(x: Array, axis: int, size: int, out: int, window: Window) -> Array:
    """Puts the `size` elements a kernel meets along `axis` side by side on the channels.

    `x: [..., n, ..., channels] -> [..., out, ..., size * channels]`, kernel element major.
    """
    stride, pads, step = (
        window.strides[axis - 1],
        window.pads[axis - 1],
        window.dilation[axis - 1],
    )
    if any(pads):
        margins = [(0, 0, 0)] * x.ndim
        margins[axis] = (*pads, 0)
        x = lax.pad(x, jnp.zeros((), x.dtype), margins)
    last = (out - 1) * stride + 1
    starts = [i * step for i in range(size)]
    parts = [lax.slice_in_dim(x, i, i + last, stride, axis) for i in starts]
    return parts[0] if size == 1 else lax.concatenate(parts, x.ndim - 1)


def sum_dtype(dtype: Any) -> Any:
    """What XLA is asked to sum products in: short floats in float32, others in themselves (None).

    Accelerators sum short floats in float32 unasked, and asked would write the sums as such and
    make the gradients' products ones of float32.
    """
    short = dtype in (jnp.bfloat16, jnp.float16)
    return jnp.float32 if short and jax.default_backend() == "cpu" else None
