"""A small decoder-only Transformer, at any depth up to its own."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from fedlp_jax.errors import FedLPError, check_number
from fedlp_jax.nn.embedding import Embedding
from fedlp_jax.nn.initializers import Init
from fedlp_jax.nn.models.base import Model, check_tokens, dense
from fedlp_jax.types import Array, wide

_EXPANSION = 4  # hidden units of a block's perceptron per unit of width


class LayerNorm(nn.Module):
    """`(x - mean) / sqrt(var + 1e-5) * scale + bias` over the last axis, in float32 or wider.

    flax's own mixes dtypes, which strict promotion refuses.
    """

    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[..., features] -> [..., features]`."""
        shape = (1,) * (x.ndim - 1) + x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        dtype = self.dtype or x.dtype
        x = x.astype(wide(dtype))
        x = x - x.mean(-1, keepdims=True)
        x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)
        x = x * scale.reshape(shape).astype(x.dtype) + bias.reshape(shape).astype(x.dtype)
        return x.astype(dtype)


class Block(nn.Module):
    """Causal self-attention, then a perceptron; each normalises its input and adds its result."""

    heads: int
    initial: Init = "flax"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`f32[B, T, width] -> f32[B, T, width]`; position t reads positions up to t."""
        *batch, width = x.shape
        y = LayerNorm(self.dtype, name="attention_norm")(x)
        y = dense(3 * width, width, self.initial, "attention_in", self.dtype)(y)
        y = y.reshape(*batch, 3, self.heads, width // self.heads)
        query, key, value = y[:, :, 0], y[:, :, 1], y[:, :, 2]
        y = causal_attention(query, key, value).reshape(x.shape)
        y = dense(width, width, self.initial, "attention_out", self.dtype)(y)
        x = x + y
        hidden = _EXPANSION * width
        y = LayerNorm(self.dtype, name="mlp_norm")(x)
        y = nn.gelu(dense(hidden, width, self.initial, "mlp_in", self.dtype)(y))
        return x + dense(width, hidden, self.initial, "mlp_out", self.dtype)(y)


def causal_attention(query: Array, key: Array, value: Array) -> Array:
    """`softmax(q k / sqrt(d)) v` of each head, over positions up to the query's.

    Args:
      query: `[B, T, heads, d]`.
      key: likewise.
      value: likewise.

    Returns:
      `[B, T, heads, d]`. The softmax is computed in float32 or wider.
    """
    length, features = query.shape[1], query.shape[3]
    score = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(wide(query.dtype)) * features**-0.5
    seen = jnp.tril(jnp.ones((1, 1, length, length), bool))
    share = jax.nn.softmax(jnp.where(seen, score, -jnp.inf)).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", share, value)


class Head(nn.Module):
    """The last normalisation and the linear layer that predicts the next token."""

    num_classes: int
    initial: Init = "flax"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`f32[B, T, width] -> logits f32[B, T, classes]`."""
        x = LayerNorm(self.dtype, name="norm")(x)
        return dense(self.num_classes, x.shape[-1], self.initial, "linear", self.dtype)(x)


class Transformer(Model):
    """A causal language model of pre-norm blocks (arXiv:2002.04745) with learned positions.

    Its modules, and so its layers, are `embed`, `block1` to `block{depth}` and `head`. The module
    of depth c, `clone(depth=c)`, has the first c blocks and a private exit head `exit{c}_head`, so
    FedLP-Hetero can train it.

    Parameters, with V classes and width w: `V w + length w` in `embed`, `12 w^2 + 13 w` in
    each block, and `2 w + w V + V` in a head.

    Raises:
      FedLPError: a size is not a positive integer, or `heads` does not divide `width`.
    """

    num_classes: int = 10  # tokens, in and out
    width: int = 64
    depth: int = 2  # blocks
    heads: int = 4
    length: int = 80  # the longest sequence, in tokens
    deepest: int | None = None  # blocks of the whole model; a clone of another depth keeps it

    def __post_init__(self) -> None:
        for name in ("num_classes", "width", "depth", "heads", "length"):
            check_number(name, getattr(self, name), ge=1, integer=True)
        if self.width % self.heads:
            raise FedLPError(
                f"width={self.width} must be a multiple of heads={self.heads}; "
                f"{self.heads * -(-self.width // self.heads)} is the next."
            )
        if self.deepest is None:
            self.deepest = self.depth
        if self.depth > self.deepest:
            raise FedLPError(f"depth={self.depth} is more than the {self.deepest} of the model.")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """`i32[B, T]`, T at most `length`, `-> logits f32[B, T, classes]`.

        Raises:
          FedLPError: the inputs are not sequences of tokens, or too long.
        """
        del train
        check_tokens("Transformer", x)
        if x.shape[1] > self.length:
            raise FedLPError(
                f"Transformer has length={self.length} positions, but the sequences have "
                f"{x.shape[1]} tokens; raise `length` or shorten them."
            )
        settings = (self.initial, self.dtype)
        x = Embedding(self.num_classes, self.width, self.length, *settings, name="embed")(x)
        for i in range(1, self.depth + 1):
            x = Block(self.heads, *settings, name=f"block{i}")(x)
        head = "head" if self.depth == self.deepest else f"exit{self.depth}_head"
        return Head(self.num_classes, *settings, name=head)(x)
