"""Token embeddings as a product with one-hot rows.

A gather has a scatter as its gradient: several tokens of a batch add to one row, so a GPU that must
repeat to the bit adds them one after the other. The product costs as many operations as the layer
that predicts the next token, and its gradient is a product too.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fedlp_jax.nn.initializers import Init
from fedlp_jax.types import Array


class Embedding(nn.Module):
    """A learned vector for each token, and one for each position if `length` is given.

    `initial` "flax" draws normal vectors of variance 1 / features, "pytorch" of variance 1.
    """

    tokens: int
    features: int
    length: int | None = None  # longest sequence; None = no positions
    initial: Init = "flax"
    dtype: Any = None

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        """`i32[B, T] -> f32[B, T, features]`. A token outside 0 .. tokens - 1 gives zeros."""
        scale = self.features**-0.5 if self.initial == "flax" else 1.0
        normal = nn.initializers.normal(scale)
        table = self.param("token", normal, (self.tokens, self.features), jnp.float32)
        dtype = self.dtype or table.dtype
        # A look-up in the highest precision: TensorFloat-32 would round the vectors.
        one_hot = jax.nn.one_hot(ids, self.tokens, dtype=dtype)
        x = jnp.matmul(one_hot, table.astype(dtype), precision=jax.lax.Precision.HIGHEST)
        if self.length is None:
            return x
        position = self.param("position", normal, (self.length, self.features), jnp.float32)
        return x + position[None, : jnp.shape(ids)[1]].astype(dtype)
