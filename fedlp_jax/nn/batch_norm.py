"""Batch normalisation with PyTorch's semantics."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from fedlp_jax.types import Array


class BatchNorm(nn.Module):
    """Normalises every channel over all other axes, as `torch.nn.BatchNorm2d` does.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Training normalises with the biased variance of the batch. The running variance, which
    evaluation uses, tracks the unbiased variance, n / (n - 1) times as large. Only in this does
    `flax.linen.BatchNorm` differ; it takes the same `mask`.

    Parameters are `scale` and `bias`, statistics `mean` and `var` in the collection `batch_stats`,
    computed in float32 or wider for any input dtype.
    """

    use_running_average: bool | None = None
    momentum: float = 0.9  # running = momentum * running + (1 - momentum) * batch
    epsilon: float = 1e-5
    unbiased: bool = True  # False: track the biased variance, as flax does
    param_dtype: Any = jnp.float32
    dtype: Any = None  # of the result; None: the wider of the input's and the parameters'

    @nn.compact
    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        """Normalises `x`, and updates the running statistics unless it uses them.

        Args:
          x: `[..., channels]`.
          use_running_average: normalise with the running statistics; an argument or a field.
          mask: bool, broadcastable to `x`; False excludes an element from the statistics. If all
            are False, the running statistics stay unchanged.

        Returns:
          The shape of `x`, in `dtype`.
        """
        evaluate = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, channels, self.param_dtype)
        dtype = self.dtype or _widest(x.dtype, scale.dtype)
        compute = _widest(x.dtype, scale.dtype, jnp.float32)
        running = _widest(self.param_dtype, jnp.float32)
        ra_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, running)
        ra_var = self.variable("batch_stats", "var", jnp.ones, channels, running)

        shape = (1,) * (x.ndim - 1) + channels
        x, scale, bias = (t.astype(compute) for t in (x, scale.reshape(shape), bias.reshape(shape)))
        if evaluate:
            mean, var = (t.value.astype(compute).reshape(shape) for t in (ra_mean, ra_var))
            return ((x - mean) * (scale * lax.rsqrt(var + self.epsilon)) + bias).astype(dtype)

        count = _count(x, mask)
        mean, centred, var = _moments(x, count, mask)
        if not self.is_initializing():
            # One element has no unbiased variance; use the biased one, 0.
            spread = count / jnp.maximum(count - 1, 1) if self.unbiased else jnp.ones_like(count)
            for average, batch in ((ra_mean, mean), (ra_var, var * spread)):
                old = average.value
                new = self.momentum * old + (1 - self.momentum) * _flat(batch, old.dtype)
                average.value = jnp.where(_flat(count, count.dtype) > 0, new, old)
        gain = scale * lax.rsqrt(var + self.epsilon)
        # `centred` treats the mean as a constant. Its gradient enters through a zero term, one
        # channel wide, so that the backward pass takes only two reductions over the batch.
        return (centred * gain + (bias + (lax.stop_gradient(mean) - mean) * gain)).astype(dtype)


def _count(x: Array, mask: Array | None) -> Array:
    """Number of unmasked elements per channel, `[1, ..., 1 or channels]` in the dtype of `x`."""
    everything = math.prod(x.shape[:-1])
    if mask is None:
        return jnp.full((1,) * x.ndim, everything, x.dtype)
    mask = _aligned(mask, x)
    kept = mask.sum(range(x.ndim - 1), dtype=x.dtype, keepdims=True)
    return kept * (everything // math.prod(mask.shape[:-1]))


def _moments(x: Array, count: Array, mask: Array | None) -> tuple[Array, Array, Array]:
    """`(mean, x - mean, biased variance)`; the second treats the mean as a constant.

    Two passes: the mean of squares minus the squared mean would cancel for channels with a large
    mean. d var / d mean is 0, so the constant does not change the gradient of the variance.
    """
    axes, elements = tuple(range(x.ndim - 1)), jnp.maximum(count, 1)
    keep = (lambda t: t) if mask is None else lambda t: jnp.where(_aligned(mask, x), t, 0)
    mean = keep(x).sum(axes, keepdims=True) / elements
    centred = x - lax.stop_gradient(mean)
    var = jnp.square(keep(centred)).sum(axes, keepdims=True) / elements
    return mean, centred, var


def _aligned(mask: Array, x: Array) -> Array:
    return mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)


def _flat(x: Array, dtype: Any) -> Array:
    return x.reshape(-1).astype(dtype)


def _widest(*dtypes: Any) -> Any:
    # Explicit, since a process may forbid implicit promotion.
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)
