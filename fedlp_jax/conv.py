"""Convolutions as matrix products, a drop-in for `jax.lax.conv_general_dilated`.

XLA's CPU backend runs a convolution inside a loop without its threaded library, and under `vmap`
over kernels, as when clients train side by side, turns it into a grouped one; both are many times
slower than the same sums as one matrix product. Its GPU backend has no fast grouped convolution
either. So a convolution is lowered here to patches and one dot, which `vmap` makes a batched dot.
Gradients come from plain differentiation of pad, slice, concatenate and dot: no convolution
appears in them, and forward mode, `vmap` and higher derivatives all work.

Any flax module gets it without its author's help: `conv_interceptor` for linen, `inject` for nnx.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from fedlp_jax.types import Array, FedLPError


class Window(NamedTuple):
    """How the kernel moves over the input, one entry per spatial axis."""

    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]  # zeros before and after; negative crops
    dilation: tuple[int, ...]  # step between the kernel's own elements


# (lhs [B, *spatial, in], rhs [*kernel, in, out], window, precision, preferred element type)
# -> [B, *spatial, out]
Lowering = Callable[[Array, Array, Window, Any, Any], Array]


def conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    *,
    lowering: str = "patches",
) -> Array:
    """`lax.conv_general_dilated` with a choice of how it is computed.

    A lowering covers channels-last convolutions without groups and without input dilation. Every
    other one is passed to `lax.conv_general_dilated` as it is, and so is one that is in error.

    Args:
      lhs: the input, `[B, *spatial, in]` in the case covered.
      rhs: the kernel, `[*kernel, in, out]` in the case covered.
      window_strides: as in lax, like all up to `out_sharding`.
      padding: "SAME", "SAME_LOWER", "VALID" or `(low, high)` for each spatial axis.
      lhs_dilation: of the input (transposed convolution).
      rhs_dilation: of the kernel (atrous convolution).
      dimension_numbers: layouts of input, kernel and output.
      feature_group_count: groups of channels.
      batch_group_count: groups of the batch.
      precision: of the products.
      preferred_element_type: dtype of sums and result. None: the input's, with sums in float32
        where that is shorter.
      out_sharding: of the result.
      lowering: "patches", or "direct" for lax's own.

    Returns:
      What `lax.conv_general_dilated` returns, up to the order of summation.

    Raises:
      FedLPError: the lowering is unknown.
    """
    if lowering != "direct" and lowering not in _LOWERINGS:
        known = ("direct", *_LOWERINGS)
        near = difflib.get_close_matches(lowering, known, 1)
        raise FedLPError(
            f"lowering={lowering!r} is not known"
            + (f"; did you mean {near[0]!r}?" if near else ".")
            + f" There are: {', '.join(known)}."
        )
    plain = feature_group_count == batch_group_count == 1 and out_sharding is None
    undilated = lhs_dilation is None or all(d == 1 for d in lhs_dilation)
    if lowering != "direct" and plain and undilated:
        dilation = (1,) * (lhs.ndim - 2) if rhs_dilation is None else tuple(rhs_dilation)
        if _channels_last(lhs, rhs, window_strides, padding, dilation, dimension_numbers):
            window = _window(lhs, rhs, tuple(window_strides), padding, dilation)
            if all(n > 0 for n in _out_shape(lhs, rhs, window)):
                lower = _LOWERINGS[lowering]
                return lower(lhs, rhs, window, precision, preferred_element_type)
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        precision,
        preferred_element_type,
        out_sharding,
    )


# --- which convolutions are covered ---------------------------------------------------------


def _channels_last(
    lhs: Array,
    rhs: Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    dilation: Sequence[int],
    dimension_numbers: Any,
) -> bool:
    """Whether a lowering can have it: the layout is ours and no argument is in error."""
    rank = lhs.ndim
    axes = tuple(range(1, rank - 1))
    of_rank = [strides, dilation] + ([] if isinstance(padding, str) else [padding])
    if rank < 3 or rhs.ndim != rank or any(len(entries) != len(axes) for entries in of_rank):
        return False
    if lhs.dtype != rhs.dtype or lhs.shape[-1] != rhs.shape[-2]:
        return False
    if min(*strides, *dilation, *rhs.shape) < 1:
        return False
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    last = (0, rank - 1, *axes)
    return numbers == ((last, (rank - 1, rank - 2, *(a - 1 for a in axes)), last))


def _window(
    lhs: Array,
    rhs: Array,
    strides: tuple[int, ...],
    padding: str | Sequence[tuple[int, int]],
    dilation: tuple[int, ...],
) -> Window:
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:-1], _reach(rhs, dilation), strides, padding)
    return Window(strides, tuple((int(low), int(high)) for low, high in padding), dilation)


def _reach(rhs: Array, dilation: Sequence[int]) -> list[int]:
    """Extent of the dilated kernel along each spatial axis."""
    return [(size - 1) * step + 1 for size, step in zip(rhs.shape[:-2], dilation, strict=True)]


def _out_shape(lhs: Array, rhs: Array, window: Window) -> list[int]:
    """Spatial shape of the result; entries below 1 where the kernel does not fit."""
    reach = _reach(rhs, window.dilation)
    each = zip(lhs.shape[1:-1], window.pads, reach, window.strides, strict=True)
    return [(size + sum(pads) - extent) // stride + 1 for size, pads, extent, stride in each]


# --- lowerings ------------------------------------------------------------------------------


def _patches(lhs: Array, rhs: Array, window: Window, precision: Any, preferred: Any) -> Array:
    """One product of all patches `[B * out pixels, kernel * in]` with the kernel.

    Patches are unfolded one axis after the other, the last first: for a 3 x 3 kernel that is 3 + 3
    shifted copies instead of 9, and adding their gradients up takes as few.
    """
    shape = (lhs.shape[0], *_out_shape(lhs, rhs, window), rhs.shape[-1])
    patches = lhs
    for axis in reversed(range(1, lhs.ndim - 1)):
        patches = _unfold(patches, axis, rhs.shape[axis - 1], shape[axis], window)
    rows, depth, features = math.prod(shape[:-1]), math.prod(rhs.shape[:-1]), shape[-1]
    kernel = rhs.reshape(depth, features)
    contract = ((1,), (0,))
    if depth >= features:
        # The gradient of the kernel then is `[out, kernel * in]`, which XLA's CPU backend computes
        # up to twice as fast as its transpose. The barrier keeps XLA from turning it back.
        kernel, contract = lax.optimization_barrier(kernel.T), ((1,), (1,))
    out = lax.dot_general(
        patches.reshape(rows, depth),
        kernel,
        (contract, ((), ())),
        precision=precision,
        preferred_element_type=_sum_dtype(lhs.dtype) if preferred is None else preferred,
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


def _sum_dtype(dtype: Any) -> Any:
    """Short floats are summed in float32; None leaves any other dtype to itself."""
    return jnp.float32 if dtype in (jnp.bfloat16, jnp.float16) else None


_LOWERINGS: dict[str, Lowering] = {"patches": _patches}


# --- into flax modules ----------------------------------------------------------------------

NnxModule = TypeVar("NnxModule", bound=Any)


def conv_interceptor(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext):
    """Makes every `linen.Conv` whose author chose no other function use this file's lowering.

    For `flax.linen.intercept_methods`:

        with nn.intercept_methods(conv_interceptor):
            module.apply(variables, inputs)

    The field is set on the instance that flax bound for this one call, a clone of the user's
    module, and put back when the call ends.
    """
    module = context.module
    if (
        context.method_name != "__call__"
        or not isinstance(module, nn.Conv)
        or module.conv_general_dilated is not None
        or module.conv_general_dilated_cls is not None
    ):
        return next_fun(*args, **kwargs)
    # A call of a second clone instead would run other interceptors and capture outputs twice.
    object.__setattr__(module, "conv_general_dilated", conv_general_dilated)
    try:
        return next_fun(*args, **kwargs)
    finally:
        object.__setattr__(module, "conv_general_dilated", None)


def inject(module: NnxModule) -> NnxModule:
    """A copy of an nnx module whose convolutions use this file's lowering.

    Args:
      module: any nnx module; left as it is. Its arrays are shared with the copy.

    Returns:
      The copy. An `nnx.Conv` that was given a function of its own keeps it.
    """
    from flax import nnx  # imported here for its half second, which linen users need not pay

    copy = nnx.clone(module)
    for _, part in nnx.iter_modules(copy):
        if isinstance(part, nnx.Conv) and part.conv_general_dilated is lax.conv_general_dilated:
            part.conv_general_dilated = conv_general_dilated
    return copy
