"""Initial values of layers: flax's or PyTorch's defaults."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedlp_jax.types import Array

Init = str  # one of INITS
INITS = ("flax", "pytorch")


def initializers(init: Init, fan_in: int) -> dict[str, Any]:
    """Keyword arguments of a flax layer with `fan_in` inputs per output.

    "flax": truncated normal kernels of variance 1 / fan_in, zero biases. "pytorch": kernels and
    biases uniform in ±1 / sqrt(fan_in).
    """
    if init == "flax":
        return {}
    initializer = uniform(1 / math.sqrt(fan_in))
    return {"kernel_init": initializer, "bias_init": initializer}


def uniform(bound: float) -> Callable[..., Array]:
    """An initializer that draws from (-bound, bound)."""

    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, tuple(shape), dtype, -bound, bound)

    return init
