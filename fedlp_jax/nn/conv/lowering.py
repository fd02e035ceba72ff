"""Which lowering a convolution takes: the one asked for, or the fastest measured at its shape."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedlp_jax.errors import check_choice
from fedlp_jax.nn.conv import table
from fedlp_jax.nn.conv.window import Window, out_shape
from fedlp_jax.nn.conv.winograd import supported
from fedlp_jax.types import Array

AUTO, DIRECT, PATCHES = "auto", "direct", "patches"
WINOGRAD = {f"winograd_{h}x{w}": (h, w) for h in (1, 2, 4) for w in (1, 2, 4) if (h, w) != (1, 1)}
LOWERINGS = (AUTO, DIRECT, PATCHES, *WINOGRAD)
FORMS = (PATCHES, *WINOGRAD)  # what "auto" chooses from
_WORTH = 1.1  # a form may be this much slower than the fastest if it compiles sooner

_wanted: contextvars.ContextVar[str] = contextvars.ContextVar("lowering", default=AUTO)
_record: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar(
    "record", default=None
)
_met: contextvars.ContextVar[dict[str, Convolution] | None] = contextvars.ContextVar(
    "met", default=None
)
_earlier: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar("earlier")


class Convolution(NamedTuple):
    """One that a form can compute, as it is traced: without the axis of clients."""

    lhs: tuple[int, ...]  # [B, *spatial, in]
    rhs: tuple[int, ...]  # [*kernel, in, out]
    window: Window


@contextlib.contextmanager
def using(lowering: str) -> Iterator[None]:
    """Makes every convolution that is traced within take one lowering, where it covers it.

        with conv.using("patches"), dense.as_written():
            jax.jvp(...)  # other forms have no forward mode

    What was traced before, and is cached by `jax.jit`, stays as it is.

    Args:
      lowering: "auto", "direct" (lax's own), "patches" or "winograd_HxW" with tiles of 1, 2 or 4.

    Raises:
      FedLPError: the lowering is unknown.
    """
    check_choice("lowering", lowering, LOWERINGS)
    token = _wanted.set(lowering)
    try:
        yield
    finally:
        _wanted.reset(token)


@contextlib.contextmanager
def recording() -> Iterator[dict[str, str]]:
    """Collects what convolutions traced within take: `{"10x32x32x3 * 3x3x3x32": "patches"}`."""
    token = _record.set({})
    try:
        found = _record.get()
        assert found is not None
        yield found
    finally:
        _record.reset(token)


@contextlib.contextmanager
def meeting() -> Iterator[dict[str, Convolution]]:
    """Collects the convolutions traced within that have a choice of forms, by their shapes.

    Those are of two spatial axes and of float32, in which alone times are measured.
    """
    token = _met.set({})
    try:
        found = _met.get()
        assert found is not None
        yield found
    finally:
        _met.reset(token)


@contextlib.contextmanager
def repeating(record: Mapping[str, str]) -> Iterator[None]:
    """Makes "auto" take what `recording` has found before, so that a resumed run keeps its bits."""
    token = _earlier.set(record)
    try:
        yield
    finally:
        _earlier.reset(token)


def settings() -> tuple[Hashable, ...]:
    """What `using` and `repeating` say here, for caches of traced programs; jax sees neither."""
    return _wanted.get(), tuple(sorted(_earlier.get({}).items()))


def wanted(lowering: str | None) -> str:
    """What a caller asks for; None = what `using` says.

    Raises:
      FedLPError: the lowering is unknown.
    """
    if lowering is None:
        return _wanted.get()
    check_choice("lowering", lowering, LOWERINGS)
    return lowering


def choose(name: str, lhs: Array, rhs: Array, window: Window) -> str:
    """The form of a convolution that `patches` covers: "patches", or one of `WINOGRAD`.

    Args:
      name: one of `LOWERINGS` but "direct"; a Winograd form that cannot do it becomes "patches".
      lhs: `[B, *spatial, in]`.
      rhs: `[*kernel, in, out]`.
      window: geometry.
    """
    met = _met.get()
    if met is not None and lhs.ndim == 4 and lhs.dtype == jnp.float32 and lhs.size:
        met[_shapes(lhs, rhs, window)] = Convolution(lhs.shape, rhs.shape, window)
    if name == AUTO:
        name = _earlier.get({}).get(_shapes(lhs, rhs, window)) or _fastest(lhs, rhs, window)
    if name not in WINOGRAD or not supported(lhs, rhs, window, WINOGRAD[name]):
        name = PATCHES
    return name


def note(name: str, lhs: Array, rhs: Array, window: Window | None = None) -> None:
    """Tells `recording` what a convolution took; the window is that of a form of ours."""
    record = _record.get()
    if record is not None:
        record[_shapes(lhs, rhs, window)] = name


def _shapes(lhs: Array, rhs: Array, window: Window | None) -> str:
    """`"10x32x32x3 * 3x3x3x32"`, and `" > 16x16"` where the output has fewer pixels than that."""
    shapes = " * ".join("x".join(map(str, x.shape)) for x in (lhs, rhs))
    out = lhs.shape[1:-1] if window is None else tuple(out_shape(lhs, rhs, window))
    return shapes if out == lhs.shape[1:-1] else f"{shapes} > {'x'.join(map(str, out))}"


def _fastest(lhs: Array, rhs: Array, window: Window) -> str:
    """The quickest form at this shape by the user's table, else at the nearest by the package's."""
    if lhs.dtype != jnp.float32:
        return PATCHES  # who computes in float64 wants all its digits
    if lhs.ndim != 4 or not lhs.size:
        return PATCHES  # others were not measured
    times = table.own(FORMS).get(_shapes(lhs, rhs, window)) or _nearest(lhs, rhs, window)
    return PATCHES if times is None else quickest(times)


def quickest(times: table.Times) -> str:
    """The quickest form, or the one that compiles soonest among those nearly as quick."""
    enough = _WORTH * min(times.values())
    quick = (name for name, time in times.items() if time <= enough)
    return min(quick, key=lambda name: (_products(name), times[name]))


def _nearest(lhs: Array, rhs: Array, window: Window) -> table.Times | None:
    """The package's times at the nearest pixels, channels and features; only of 3 x 3 kernels."""
    rows = table.committed().get(jax.default_backend(), [])
    if rhs.shape[:2] != (3, 3) or not rows:
        return None
    here = (lhs.shape[0] * math.prod(out_shape(lhs, rhs, window)), *rhs.shape[2:])

    def distance(row: dict[str, Any]) -> float:
        there = (row["pixels"], row["channels"], row["features"])
        return sum(math.log2(a / b) ** 2 for a, b in zip(here, there, strict=True))

    times: table.Times = min(rows, key=distance)["milliseconds"]
    return times


def _products(name: str) -> int:
    """Dots of a form for a 3 x 3 kernel, by which the time to compile it grows."""
    return math.prod(m + 2 if m > 1 else 1 for m in WINOGRAD.get(name, (1, 1)))
