"""A drop-in for `jax.lax.conv_general_dilated` that computes by dots where it can.

Reverse mode needs no convolution either: in "patches" by plain differentiation, so that forward
mode and higher derivatives work too, in the Winograd forms by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax import lax

from fedlp_jax.nn.conv.im2col import patches
from fedlp_jax.nn.conv.lowering import DIRECT, PATCHES, WINOGRAD, choose, note, wanted
from fedlp_jax.nn.conv.window import channels_last, out_shape, window_of
from fedlp_jax.nn.conv.winograd import winograd
from fedlp_jax.types import Array


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
    lowering: str | None = None,
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
        where that is shorter, as accelerators sum unasked.
      out_sharding: of the result.
      lowering: one of `LOWERINGS`; None = as `using` says, which is "auto" unless told otherwise.

    Returns:
      What `lax.conv_general_dilated` returns, up to the order of summation.

    Raises:
      FedLPError: the lowering is unknown.
    """
    name = wanted(lowering)
    plain = feature_group_count == batch_group_count == 1 and out_sharding is None
    undilated = lhs_dilation is None or all(d == 1 for d in lhs_dilation)
    dilation = (1,) * (lhs.ndim - 2) if rhs_dilation is None else tuple(rhs_dilation)
    if (
        name != DIRECT
        and plain
        and undilated
        and channels_last(lhs, rhs, window_strides, padding, dilation, dimension_numbers)
    ):
        window = window_of(lhs, rhs, tuple(window_strides), padding, dilation)
        if all(n > 0 for n in out_shape(lhs, rhs, window)):
            name = choose(name, lhs, rhs, window)
            note(name, lhs, rhs, window)
            if name == PATCHES:
                return patches(lhs, rhs, window, precision, preferred_element_type)
            tiles = WINOGRAD[name]
            return winograd(lhs, rhs, window, precision, preferred_element_type, tiles=tiles)
    note(DIRECT, lhs, rhs)
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
