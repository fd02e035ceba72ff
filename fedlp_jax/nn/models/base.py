"""Networks and layers with a choice of initial values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedlp_jax.errors import FedLPError, nearest
from fedlp_jax.nn.conv import conv_general_dilated
from fedlp_jax.types import Array

Init = str  # "flax" or "pytorch"
_KNOWN = ("flax", "pytorch")


class _InitKeyword(type):
    """Lets a constructor take `init=`, which as a field would hide linen's method of that name."""

    def __call__(cls, *args: Any, init: Init | None = None, **kwargs: Any) -> Any:
        if init is not None:
            kwargs["initial"] = init
        return super().__call__(*args, **kwargs)


class Model(nn.Module, kw_only=True, metaclass=_InitKeyword):
    """A network that is made with `init="flax"` or `init="pytorch"`, and computes in `dtype`.

    Flax: kernels are truncated normal of variance 1 / fan_in, biases 0. PyTorch: kernels and biases
    are uniform in ±1 / sqrt(fan_in).

    With `dtype="bfloat16"` layers put out half the bytes, and accelerators multiply faster.
    Parameters, what optimizers keep, averages, the statistics of normalisation and the loss stay
    float32. None = the dtype of the parameters.

    Raises:
      FedLPError: another `init`, or a `dtype` that is no float.
    """

    initial: Init = "flax"  # what `init=` sets
    dtype: Any = None  # of activations and products

    def __post_init__(self) -> None:
        if self.initial not in _KNOWN:
            hint = nearest(self.initial, _KNOWN) or "."
            raise FedLPError(
                f"init={self.initial!r} is not known{hint} There are: {', '.join(_KNOWN)}."
            )
        if self.dtype is not None and not _is_float(self.dtype):
            raise FedLPError(
                f"dtype={self.dtype!r} is no floating-point type; give 'bfloat16', 'float32' or "
                "None, the dtype of the parameters."
            )
        super().__post_init__()


def dense(features: int, fan_in: int, init: Init, name: str, dtype: Any = None) -> nn.Dense:
    """`nn.Dense` from `fan_in` inputs to `features` outputs."""
    return nn.Dense(features, dtype=dtype, name=name, **_initializers(init, fan_in))


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
    """`nn.Conv` from `channels` to `features`, in this package's lowering."""
    return nn.Conv(
        features,
        tuple(kernel_size),
        strides=strides,
        padding=padding,
        use_bias=use_bias,
        dtype=dtype,
        conv_general_dilated=conv_general_dilated,
        name=name,
        **_initializers(init, channels * math.prod(kernel_size)),
    )


def _is_float(dtype: Any) -> bool:
    try:
        return bool(jnp.issubdtype(dtype, jnp.floating))
    except TypeError:  # a word that names no type
        return False


def _initializers(init: Init, fan_in: int) -> dict[str, Any]:
    """Arguments of a flax layer; flax's own are its defaults. See `Model`."""
    if init == "flax":
        return {}
    uniform = _uniform(1 / math.sqrt(fan_in))
    return {"kernel_init": uniform, "bias_init": uniform}


def _uniform(bound: float) -> Callable[..., Array]:
    def init(key: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, tuple(shape), dtype, -bound, bound)

    return init
