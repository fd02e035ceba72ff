"""Single arrays told apart: their dtype and shape in words, and sums of their bits."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import numpy as np

from fedlp_jax.types import Array


def is_key(leaf: Array) -> bool:
    """Whether these are typed keys of random numbers."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def raw(leaf: Array) -> Array:
    """The same; of keys the `u32` that they are made of, which numpy can hold."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def kind(leaf: Any) -> str:
    """`"float32[3, 4]"`, of an array or its shape."""
    return f"{leaf.dtype}{list(leaf.shape)}"


def check_sum(array: np.ndarray) -> str:
    """Tells whether arrays are the same, in a second for a gigabyte."""
    array = np.ascontiguousarray(array)
    return f"{kind(array)} of CRC {zlib.crc32(array.reshape(-1).view(np.uint8).data):08x}"
