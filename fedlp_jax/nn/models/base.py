"""The base class of the models, and their layers with a choice of initial values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from fedlp_jax.errors import FedLPError, check_choice, check_number
from fedlp_jax.nn.conv import conv_general_dilated
from fedlp_jax.nn.initializers import INITS, Init, initializers
from fedlp_jax.types import Array


class _InitKeyword(type):
    """Accepts `init=` in the constructor: a field of that name would hide the method `init`."""

    def __call__(cls, *args: Any, init: Init | None = None, **kwargs: Any) -> Any:
        if init is not None:
            kwargs["initial"] = init
        return super().__call__(*args, **kwargs)


class Model(nn.Module, kw_only=True, metaclass=_InitKeyword):
    """A network with a choice of initial values, `init=`, and of its activations' dtype, `dtype=`.

    `init` is "flax" or "pytorch", see `fedlp_jax.nn.initializers`.

    `dtype="bfloat16"` halves the bytes of activations and speeds up products on accelerators.
    Parameters, optimizer states, averages, batch statistics and the loss stay float32. None = the
    dtype of the parameters.

    Raises:
      FedLPError: `init` is unknown, or `dtype` is not a floating-point type.
    """

    initial: Init = "flax"  # what `init=` sets
    dtype: Any = None  # of activations and products

    def __post_init__(self) -> None:
        check_choice("init", self.initial, INITS)
        if self.dtype is not None and not _is_float(self.dtype):
            raise FedLPError(
                f"dtype={self.dtype!r} is not a floating-point type; use 'bfloat16', 'float32' or "
                "None, the dtype of the parameters."
            )
        super().__post_init__()


class WidthModel(Model, kw_only=True):
    """A model that also exists with fewer channels: `clone(width_rate=r)`, 0 < r <= 1.

    Every hidden layer then has the first `ceil(r x channels)` of its channels. Inputs and outputs
    are never cut.

    Raises:
      FedLPError: the rate is not in (0, 1].
    """

    width_rate: float = 1.0  # r

    def __post_init__(self) -> None:
        check_number("width_rate", self.width_rate, gt=0, le=1)
        super().__post_init__()

    def scaled(self, channels: int) -> int:
        """The channels of a hidden layer that has so many in the whole model."""
        return channels_at(channels, self.width_rate)


def channels_at(channels: int, rate: float) -> int:
    """`ceil(r x channels)`."""
    # A product such as .7 x 10 may lie a rounding error above a whole number.
    return max(math.ceil(rate * channels - 1e-9), 1)


def dense(features: int, fan_in: int, init: Init, name: str, dtype: Any = None) -> nn.Dense:
    """`nn.Dense`, `[..., fan_in] -> [..., features]`."""
    return nn.Dense(features, dtype=dtype, name=name, **initializers(init, fan_in))


def conv(
    features: int,
    kernel_size: Sequence[int],
    channels: int,
    init: Init,
    name: str,
    *,
    strides: int = 1,
    padding: str | int = "SAME",
    use_bias: bool = True,
    dtype: Any = None,
) -> nn.Conv:
    """`nn.Conv`, `[B, *spatial, channels] -> [B, *spatial, features]`, lowered to products."""
    return nn.Conv(
        features,
        tuple(kernel_size),
        strides=strides,
        padding=padding,
        use_bias=use_bias,
        dtype=dtype,
        conv_general_dilated=conv_general_dilated,
        name=name,
        **initializers(init, channels * math.prod(kernel_size)),
    )


def check_tokens(model: str, x: Array) -> None:
    """Refuses inputs that are not sequences of tokens.

    Raises:
      FedLPError: not integers `[B, T]`.
    """
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.integer):
        raise FedLPError(
            f"{model} needs sequences of tokens, integers [B, T], not {x.dtype}{list(x.shape)}."
        )


def _is_float(dtype: Any) -> bool:
    try:
        return bool(jnp.issubdtype(dtype, jnp.floating))
    except TypeError:  # not the name of a type
        return False
