"""A drop-in for `jax.lax.conv_general_dilated` that chooses a lowering for each convolution.

"patches" and "winograd_4x4" are products of matrices, forward and backward. "auto" takes the faster
one at the nearest shape of `table.json`, which `benchmarks/convolutions.py` writes.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import math
from collections.abc import Iterator, Sequence
from importlib import resources
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fedlp_jax.errors import check_choice
from fedlp_jax.nn.conv.im2col import Window, out_shape, patches, reach
from fedlp_jax.nn.conv.winograd import supported, winograd
from fedlp_jax.types import Array

LOWERINGS = AUTO, DIRECT, PATCHES, WINOGRAD = ("auto", "direct", "patches", "winograd_4x4")
_TOLERANCE = 1.1  # "patches" compiles sooner, and may be this much slower


class _Tracing(NamedTuple):
    """What applies to everything that is traced in the current context."""

    lowering: str = AUTO
    record: dict[str, str] | None = None  # collects the choices


_DEFAULT = _Tracing()
_tracing: contextvars.ContextVar[_Tracing] = contextvars.ContextVar("tracing", default=_DEFAULT)


@contextlib.contextmanager
def using(lowering: str) -> Iterator[None]:
    """Sets the lowering of all convolutions traced inside the block, where it covers them.

        with conv.using("patches"):
            jax.jvp(...)  # the Winograd form has no forward mode

    `jax.jit` keeps what it traced earlier. A `recording` outside the block does not see inside.

    Args:
      lowering: "auto", "patches", "winograd_4x4", or "direct": plain `lax` for convolutions, and
        for dense layers too (`fedlp_jax.nn.dense`).

    Raises:
      FedLPError: the lowering is unknown.
    """
    check_choice("lowering", lowering, LOWERINGS)
    with _set(_Tracing(lowering)):
        yield


@contextlib.contextmanager
def recording() -> Iterator[dict[str, str]]:
    """Collects the choices made inside the block: `{"10x32x32x3 * 3x3x3x32": "patches"}`."""
    record: dict[str, str] = {}
    with _set(_tracing.get()._replace(record=record)):
        yield record


@contextlib.contextmanager
def _set(tracing: _Tracing) -> Iterator[None]:
    token = _tracing.set(tracing)
    try:
        yield
    finally:
        _tracing.reset(token)


def current() -> str:
    """The lowering that `using` set; "auto" outside any block. Caches of programs depend on it."""
    return _tracing.get().lowering


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
    """`lax.conv_general_dilated` with a choice of lowering.

    The lowerings cover channels-last convolutions without groups or input dilation. All others,
    and invalid ones, go to `lax.conv_general_dilated` unchanged.

    Args:
      lhs: the input; covered: `[B, *spatial, in]`.
      rhs: the kernel; covered: `[*kernel, in, out]`.
      window_strides: as in lax, like all arguments up to `out_sharding`.
      padding: "SAME", "SAME_LOWER", "VALID" or `(low, high)` for each spatial axis.
      lhs_dilation: of the input (transposed convolution).
      rhs_dilation: of the kernel (atrous convolution).
      dimension_numbers: layouts of input, kernel and output.
      feature_group_count: groups of channels.
      batch_group_count: groups of the batch.
      precision: of the products.
      preferred_element_type: dtype of the sums and the result. None: the input's dtype, with sums
        in float32 if that is wider.
      out_sharding: of the result.
      lowering: one of `LOWERINGS`; None = what `using` set.

    Returns:
      The result of `lax.conv_general_dilated`, up to the order of summation.

    Raises:
      FedLPError: the lowering is unknown.
    """
    if lowering is not None:
        check_choice("lowering", lowering, LOWERINGS)
    name = lowering or current()
    plain = feature_group_count == batch_group_count == 1 and out_sharding is None
    undilated = lhs_dilation is None or all(d == 1 for d in lhs_dilation)
    window = None
    if name != DIRECT and plain and undilated:
        window = _window(lhs, rhs, window_strides, padding, rhs_dilation, dimension_numbers)
    form = DIRECT if window is None else _choose(name, lhs, rhs, window)
    record = _tracing.get().record
    if record is not None:
        record[_shapes(lhs, rhs, window)] = form
    if window is None:
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
    if form == PATCHES:
        return patches(lhs, rhs, window, precision, preferred_element_type)
    return winograd(lhs, rhs, window, precision, preferred_element_type)


def _window(
    lhs: Array,
    rhs: Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    dilation: Sequence[int] | None,
    dimension_numbers: Any,
) -> Window | None:
    """The geometry of a convolution, or None if no lowering covers it."""
    rank = lhs.ndim
    axes = tuple(range(1, rank - 1))
    dilation = (1,) * len(axes) if dilation is None else tuple(dilation)
    per_axis = [strides, dilation] + ([] if isinstance(padding, str) else [padding])
    if rank < 3 or rhs.ndim != rank or any(len(entries) != len(axes) for entries in per_axis):
        return None
    if lhs.dtype != rhs.dtype or lhs.shape[-1] != rhs.shape[-2]:
        return None
    if min(*strides, *dilation, *rhs.shape) < 1:
        return None
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    last = (0, rank - 1, *axes)
    if numbers != (last, (rank - 1, rank - 2, *(a - 1 for a in axes)), last):
        return None
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:-1], reach(rhs, dilation), strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    window = Window(tuple(strides), pads, dilation)
    return window if all(n > 0 for n in out_shape(lhs, rhs, window)) else None


def _choose(name: str, lhs: Array, rhs: Array, window: Window) -> str:
    """The form of a covered convolution; "patches" where the Winograd form does not apply."""
    if name == AUTO:
        name = _fastest(lhs, rhs, window)
    return name if name == WINOGRAD and supported(lhs, rhs, window) else PATCHES


def _fastest(lhs: Array, rhs: Array, window: Window) -> str:
    """The faster form at the nearest pixels, channels and features of the table.

    The table holds 3 x 3 kernels in float32; in float64 "patches" keeps more digits.
    """
    rows = _table().get(jax.default_backend(), [])
    measured = lhs.dtype == jnp.float32 and lhs.ndim == 4 and rhs.shape[:2] == (3, 3)
    if not (rows and measured and lhs.size):
        return PATCHES
    here = (lhs.shape[0] * math.prod(out_shape(lhs, rhs, window)), *rhs.shape[2:])

    def distance(row: dict[str, Any]) -> float:
        there = (row["pixels"], row["channels"], row["features"])
        return sum(math.log2(a / b) ** 2 for a, b in zip(here, there, strict=True))

    times: dict[str, float] = min(rows, key=distance)["milliseconds"]
    return PATCHES if times[PATCHES] <= _TOLERANCE * times[WINOGRAD] else WINOGRAD


@functools.cache
def _table() -> dict[str, list[dict[str, Any]]]:
    """Measured times: `{backend: rows}`."""
    text = resources.files("fedlp_jax.nn.conv").joinpath("table.json").read_text()
    rows: dict[str, list[dict[str, Any]]] = json.loads(text)["backends"]
    return rows


def _shapes(lhs: Array, rhs: Array, window: Window | None) -> str:
    """`"10x32x32x3 * 3x3x3x32"`, plus `" > 16x16"` where the output has another size."""
    shapes = " * ".join("x".join(map(str, x.shape)) for x in (lhs, rhs))
    out = lhs.shape[1:-1] if window is None else tuple(out_shape(lhs, rhs, window))
    return shapes if out == lhs.shape[1:-1] else f"{shapes} > {'x'.join(map(str, out))}"
