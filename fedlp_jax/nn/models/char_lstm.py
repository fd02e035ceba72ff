"""The character-level LSTM of the federated-learning literature."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from fedlp_jax.errors import check_number
from fedlp_jax.nn.embedding import Embedding
from fedlp_jax.nn.initializers import Init, uniform
from fedlp_jax.nn.models.base import Model, check_tokens, dense
from fedlp_jax.types import Array


class LSTM(nn.Module):
    """One LSTM layer over a sequence, from a zero state.

        i, f, o = sigmoid(z_i), sigmoid(z_f), sigmoid(z_o),  g = tanh(z_g)
        z_t = W x_t + U h_{t-1} + b,   c_t = f c_{t-1} + i g,   h_t = o tanh(c_t)

    with input, forget, cell and output gates in this order. `W` and `b` are `input`, `U` is
    `recurrent`.
    """

    features: int
    initial: Init = "flax"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`f32[B, T, in] -> f32[B, T, features]`."""
        gates = 4 * self.features
        # One product for all steps; the scan has only what depends on the step before. PyTorch
        # draws both kernels within 1 / sqrt(features).
        z = dense(gates, self.features, self.initial, "input", self.dtype)(x)
        draw = _orthogonal_gates if self.initial == "flax" else uniform(self.features**-0.5)
        kernel = self.param("recurrent", draw, (self.features, gates))
        return jnp.swapaxes(recur(kernel.astype(z.dtype), jnp.swapaxes(z, 0, 1)), 0, 1)


def _orthogonal_gates(key: Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
    """A square orthogonal matrix for each gate, as in flax's cells."""
    features, gates = shape
    draw = nn.initializers.orthogonal()
    keys = jax.random.split(key, gates // features)
    each = jax.vmap(lambda k: draw(k, (features, features), dtype))(keys)
    return each.transpose(1, 0, 2).reshape(shape)


@jax.custom_vjp
def recur(kernel: Array, z: Array) -> Array:
    """The states of an LSTM layer; differentiable in reverse mode only.

    Args:
      kernel: `U`, `[H, 4 H]`.
      z: `W x_t + b` of every step, `[T, B, 4 H]`.

    Returns:
      `h_1 .. h_T`, `[T, B, H]`.
    """
    return _scan(kernel, z)


def _scan(kernel: Array, z: Array) -> Array:
    def step(carry: tuple[Array, Array], z: Array) -> tuple[tuple[Array, Array], Array]:
        h, c = carry
        i, f, g, o = jnp.split(z + h @ kernel, 4, axis=-1)
        c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
        h = nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros((z.shape[1], kernel.shape[0]), z.dtype)
    return lax.scan(step, (zero, zero), z)[1]


def _forward(kernel: Array, z: Array) -> Any:
    h, pull = jax.vjp(lambda z: _scan(kernel, z), z)
    return h, (h, pull)


def _backward(saved: Any, dh: Array) -> tuple[Array, Array]:
    # A scan would add a product of B rows to the kernel's gradient in each step, and read and write
    # all of it T times. The gradient of z is that of every step's product: one GEMM of T B rows.
    h, pull = saved
    (dz,) = pull(dh)
    before = jnp.concatenate([jnp.zeros_like(h[:1]), h[:-1]])
    return jnp.einsum("tbh,tbz->hz", before, dz), dz


recur.defvjp(_forward, _backward)


class CharLSTM(Model):
    """An embedding, two LSTM layers and a linear layer, applied at every character.

    The model of McMahan et al. (arXiv:1602.05629) and of LEAF (arXiv:1812.01097) for Shakespeare:
    an embedding of 8, two layers of 256 units. Its modules, and so its layers, are `embed`,
    `lstm1`, `lstm2` and `head`. With V classes it has 265 V + 796,672 parameters.

    Raises:
      FedLPError: a size is not a positive integer.
    """

    num_classes: int = 10  # characters, in and out
    embedding: int = 8
    hidden: int = 256

    def __post_init__(self) -> None:
        for name in ("num_classes", "embedding", "hidden"):
            check_number(name, getattr(self, name), ge=1, integer=True)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """`i32[B, T] -> logits f32[B, T, classes]`.

        Raises:
          FedLPError: the inputs are not sequences of tokens.
        """
        del train
        check_tokens("CharLSTM", x)
        settings = (self.initial, self.dtype)
        x = Embedding(self.num_classes, self.embedding, None, *settings, name="embed")(x)
        for i in (1, 2):
            x = LSTM(self.hidden, *settings, name=f"lstm{i}")(x)
        return dense(self.num_classes, self.hidden, self.initial, "head", self.dtype)(x)
