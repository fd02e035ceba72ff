"""Winograd convolutions: fewer multiplications, in tiles of 4 x 4 results.

Each spatial axis is cut into tiles of m = 4 results, computed by n = m + r - 1 products instead of
m r. For 3 x 3 kernels that takes a quarter of the multiplications of `patches` and writes a quarter
of its unfolded inputs.

Every product is a separate dot, `[pixels, channels] @ [channels, features]`, also under `vmap`: one
batched dot would write its operands twice. Reverse mode is written by hand, so that it reads and
writes tiles as the forward pass does. There is no forward mode.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fedlp_jax.nn.conv.im2col import Window, out_shape
from fedlp_jax.nn.xla import materialize
from fedlp_jax.types import Array

TILE = 4  # m, the fastest of 2 and 4 on one axis and on both (`benchmarks.convolutions`)
Grid = list[list[Array]]  # one array for each product of the vertical and the horizontal axis


@dataclasses.dataclass(frozen=True)
class Axis:
    """One spatial axis of a convolution of stride 1."""

    axis: int
    size: int  # inputs
    kernel: int  # r
    out: int
    low: int  # zeros before the first input; negative crops

    @property
    def tiles(self) -> int:
        """Number of tiles that cover the results."""
        return -(-self.out // TILE)

    @property
    def matrices(self) -> Toom:
        """The matrices of F(4, r)."""
        return toom(TILE, self.kernel)

    def split(self, x: Array) -> list[Array]:
        """Inputs -> one operand per product, `tiles` long on this axis."""
        reach = TILE + self.kernel - 1
        x = _pad(x, self.axis, self.low, self.tiles * TILE + self.kernel - 1)
        parts = [_every(x, self.axis, i, self.tiles, TILE) for i in range(reach)]
        return _mix(self.matrices.data, parts)

    def split_transposed(self, products: Sequence[Array]) -> Array:
        """The transpose of `split`."""
        phases = []
        weights = self.matrices.data.T
        for i in range(TILE):
            phase = _pad(_combine(weights[i], products), self.axis, 0, self.tiles + 1)
            if i < self.kernel - 1:  # a tile's last r - 1 inputs are the first of the next tile
                tail = _combine(weights[i + TILE], products)
                phase = phase + _pad(tail, self.axis, 1, self.tiles + 1)
            phases.append(phase)
        return _pad(_interleave(phases, self.axis), self.axis, -self.low, self.size)

    def join(self, products: Sequence[Array]) -> Array:
        """Products -> results."""
        phases = _mix(self.matrices.inverse, products)
        return _pad(_interleave(phases, self.axis), self.axis, 0, self.out)

    def join_transposed(self, y: Array) -> list[Array]:
        """The transpose of `join`."""
        y = _pad(y, self.axis, 0, self.tiles * TILE)
        return self.join_phases([_every(y, self.axis, i, self.tiles, TILE) for i in range(TILE)])

    def join_phases(self, phases: list[Array]) -> list[Array]:
        """`join_transposed` of results split into phases: phase i holds the i-th of every tile."""
        return _mix(self.matrices.inverse.T, phases)


def supported(lhs: Array, rhs: Array, window: Window) -> bool:
    """Whether tiles can compute a convolution that `patches` covers."""
    if lhs.ndim != 4 or lhs.dtype not in (jnp.float32, jnp.float64):
        return False  # short floats would lose most of their digits in the transforms
    if window.strides != (1, 1) or window.dilation != (1, 1):
        return False
    # Overlaps reach the next tile only, and there are points for n up to 8.
    return all(2 <= r <= TILE + 1 for r in rhs.shape[:2])


def winograd(lhs: Array, rhs: Array, window: Window, precision: Any, preferred: Any) -> Array:
    """A convolution `[B, H, W, in] x [kh, kw, in, out]` in tiles."""
    out = out_shape(lhs, rhs, window)
    vertical, horizontal = (
        Axis(1 + i, lhs.shape[1 + i], rhs.shape[i], out[i], window.pads[i][0]) for i in (0, 1)
    )
    if precision is None and jax.default_backend() != "cpu":
        # A TPU multiplies float32 in bfloat16, a recent GPU in TF32: the transforms would lose too
        # many digits.
        precision = lax.Precision.HIGHEST
    y = _convolution(vertical, horizontal, precision)(lhs, rhs)
    return y if preferred is None else y.astype(preferred)


@functools.cache
def _convolution(vertical: Axis, horizontal: Axis, precision: Any) -> Callable[..., Array]:
    """The convolution over these axes, with its gradients."""
    dot = functools.partial(lax.dot_general, precision=precision)
    depth, features = (((3,), (0,)), ((), ())), (((3,), (1,)), ((), ()))
    pixels = (((1,), (0,)), ((), ()))

    def forward(x: Array, kernel: Array) -> tuple[Array, Any]:
        # In memory once, or XLA would repeat the vertical sums for each product.
        tiles = [horizontal.split(materialize(row)) for row in vertical.split(x)]
        filters = _filters(vertical, horizontal, kernel)
        grid = _each(lambda tile, i, j: dot(tile, filters[i][j], depth), tiles)
        y = vertical.join([horizontal.join(row) for row in grid])
        return y, (tiles, filters)

    def backward(saved: Any, dy: Array) -> tuple[Array, Array]:
        tiles, filters = saved
        # XLA's CPU backend computes a filter's gradient as [out, depth] twice as fast as its
        # transpose, unless it transposes every product: so dy is transposed once.
        turned = _turned(vertical, horizontal, dy)
        grid = [
            horizontal.join_phases(list(materialize(row)))
            for row in vertical.join_phases(list(turned))
        ]
        d_filters = _each(lambda d, i, j: dot(d, tiles[i][j].reshape(d.shape[1], -1), pixels), grid)
        grid = [
            horizontal.join_transposed(materialize(row)) for row in vertical.join_transposed(dy)
        ]
        d_tiles = _each(lambda d, i, j: dot(d, filters[i][j], features), grid)
        dx = vertical.split_transposed([horizontal.split_transposed(row) for row in d_tiles])
        return dx, _filters_transposed(vertical, horizontal, d_filters)

    @jax.custom_vjp
    def convolution(x: Array, kernel: Array) -> Array:
        return forward(x, kernel)[0]

    convolution.defvjp(forward, backward)
    return convolution


def _turned(vertical: Axis, horizontal: Axis, y: Array) -> Array:
    """`[B, H, W, out] -> [m, m, out, B * tiles of H * tiles of W]`: the phases of both axes first.

    In this memory order a phase is contiguous, so that sums of phases stream through memory.
    Transposed slices of tiles would be read number by number.
    """
    for axis in (vertical, horizontal):
        y = _pad(y, axis.axis, 0, axis.tiles * TILE)
    y = y.reshape(y.shape[0], vertical.tiles, TILE, horizontal.tiles, TILE, y.shape[-1])
    y = materialize(jnp.transpose(y, (2, 4, 5, 0, 1, 3)))
    return y.reshape(*y.shape[:3], -1)


def _filters(vertical: Axis, horizontal: Axis, kernel: Array) -> Grid:
    """`[kh, kw, in, out]` -> `[in, out]` per product."""
    rows = _mix(vertical.matrices.kernel, list(kernel))
    return [_mix(horizontal.matrices.kernel, list(row)) for row in rows]


def _filters_transposed(vertical: Axis, horizontal: Axis, grid: Grid) -> Array:
    """The transpose of `_filters`, from `[out, in]`."""
    weights = horizontal.matrices.kernel.T
    rows = [jnp.concatenate(_mix(weights, row), axis=1) for row in grid]
    kernel = jnp.stack(_mix(vertical.matrices.kernel.T, rows))
    return kernel.reshape(*kernel.shape[:2], horizontal.kernel, -1).transpose(0, 2, 3, 1)


def _each(f: Callable[[Array, int, int], Array], grid: Grid) -> Grid:
    return [[f(entry, i, j) for j, entry in enumerate(row)] for i, row in enumerate(grid)]


def _mix(matrix: np.ndarray, parts: Sequence[Array]) -> list[Array]:
    return [_combine(row, parts) for row in matrix]


def _combine(weights: np.ndarray, parts: Sequence[Array]) -> Array:
    """A weighted sum of arrays, with no operation for weight 0 and no product for 1 and -1."""
    total = None
    for weight, part in zip(weights.tolist(), parts, strict=True):
        if weight == 0:
            continue
        if abs(weight) != 1:
            part = part * jnp.asarray(abs(weight), part.dtype)
        if total is None:
            total = part if weight > 0 else -part
        else:
            total = total + part if weight > 0 else total - part
    assert total is not None
    return total


def _pad(x: Array, axis: int, low: int, size: int) -> Array:
    """Zeros before and after along one axis, or cropped, to `size`."""
    high = size - x.shape[axis] - low
    if low == high == 0:
        return x
    margins = [(0, 0, 0)] * x.ndim
    margins[axis] = (low, high, 0)
    return lax.pad(x, jnp.zeros((), x.dtype), margins)


def _every(x: Array, axis: int, first: int, count: int, step: int) -> Array:
    return lax.slice_in_dim(x, first, first + (count - 1) * step + 1, step, axis)


def _interleave(phases: Sequence[Array], axis: int) -> Array:
    """Element i of tile t becomes element t m + i."""
    stacked = jnp.stack(phases, axis + 1)
    shape = list(phases[0].shape)
    shape[axis] *= len(phases)
    return stacked.reshape(shape)


# --- Cook-Toom matrices ----------------------------------------------------------------------

# Evaluation points besides infinity. Small numbers and their inverses keep the matrices well
# conditioned.
_POINTS = (0, 1, -1, 2, -2, Fraction(1, 2), Fraction(-1, 2))


class Toom(NamedTuple):
    """F(m, r): `y = inverse @ ((kernel @ g) * (data @ d))` is `y_i = sum_k g_k d_{i+k}`.

    m results of a kernel of r elements take n = m + r - 1 products instead of m r.
    """

    data: np.ndarray  # f64[n, n]
    kernel: np.ndarray  # f64[n, r]
    inverse: np.ndarray  # f64[m, n]


@functools.cache
def toom(tile: int, kernel: int) -> Toom:
    """The matrices of F(m, r) (Winograd 1980; as filters in arXiv:1509.09308, section 4).

    Kernel and data are polynomials. The values at n - 1 points and at infinity determine their
    product; the transpose of that algorithm is the filter. Computed in exact fractions.

    Args:
      tile: m, results per tile.
      kernel: r.

    Raises:
      ValueError: the tile needs more points than there are.
    """
    products = tile + kernel - 1
    if products - 1 > len(_POINTS):
        raise ValueError(f"F({tile}, {kernel}) needs {products - 1} points, of {len(_POINTS)}.")
    points = [Fraction(p) for p in _POINTS[: products - 1]]
    data = np.zeros((products, products))
    evaluate = np.zeros((products, kernel))
    inverse = np.zeros((tile, products))
    for i, point in enumerate(points):
        others = points[:i] + points[i + 1 :]
        scale = math.prod((point - other for other in others), start=Fraction(1))
        evaluate[i] = [float(point**k / scale) for k in range(kernel)]
        inverse[:, i] = [float(point**k) for k in range(tile)]
        data[i, : products - 1] = _with_roots(others)
    evaluate[-1, -1] = inverse[-1, -1] = 1.0
    data[-1] = _with_roots(points)
    return Toom(data, evaluate, inverse)


def _with_roots(roots: list[Fraction]) -> list[float]:
    """Coefficients of the product of (x - root), lowest power first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        scaled = [-root * c for c in coefficients] + [Fraction(0)]
        coefficients = [a + b for a, b in zip(shifted, scaled, strict=True)]
    return [float(c) for c in coefficients]
