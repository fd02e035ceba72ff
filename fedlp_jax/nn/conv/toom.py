"""Cook-Toom matrices: a short one-dimensional convolution in as few products as possible."""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np

# Where the polynomials are evaluated, beside infinity. Small numbers and their inverses keep the
# matrices well conditioned.
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

    The kernel and the data are polynomials. Their product is found from its values at n - 1 points
    and at infinity; transposing that algorithm gives the filter. Computed in exact fractions.

    Args:
      tile: m, results at once.
      kernel: r.

    Raises:
      ValueError: there are not enough points for a tile that large.
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
