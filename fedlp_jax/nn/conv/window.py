"""Which convolutions a lowering covers, and their geometry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax import lax

from fedlp_jax.types import Array


class Window(NamedTuple):
    """How the kernel moves over the input, one entry per spatial axis."""

    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]  # zeros before and after; negative crops
    dilation: tuple[int, ...]  # step between the kernel's own elements


def channels_last(
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


def window_of(
    lhs: Array,
    rhs: Array,
    strides: tuple[int, ...],
    padding: str | Sequence[tuple[int, int]],
    dilation: tuple[int, ...],
) -> Window:
    """The window of a convolution that `channels_last` lets pass."""
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:-1], _reach(rhs, dilation), strides, padding)
    return Window(strides, tuple((int(low), int(high)) for low, high in padding), dilation)


def _reach(rhs: Array, dilation: Sequence[int]) -> list[int]:
    """Extent of the dilated kernel along each spatial axis."""
    return [(size - 1) * step + 1 for size, step in zip(rhs.shape[:-2], dilation, strict=True)]


def out_shape(lhs: Array, rhs: Array, window: Window) -> list[int]:
    """Spatial shape of the result; entries below 1 where the kernel does not fit."""
    reach = _reach(rhs, window.dilation)
    each = zip(lhs.shape[1:-1], window.pads, reach, window.strides, strict=True)
    return [(size + sum(pads) - extent) // stride + 1 for size, pads, extent, stride in each]
