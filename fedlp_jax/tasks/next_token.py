"""Next-token prediction: cross-entropy and accuracy at every position of a sequence."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedlp_jax.errors import FedLPError, check_number
from fedlp_jax.tasks.flax_adapter import network
from fedlp_jax.tasks.supervised import supervised
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import Array, Batch, Mean, Metrics, wide


def next_token(module: Any, padding: int | None = None) -> Task:
    """Predicts the next token at every position, with any flax module.

    The loss of a batch is the mean over its tokens, and so is the accuracy. A client still counts
    by its examples, which are sequences.

    Args:
      module: a linen module, an nnx module, or a function of `rngs` that returns one. It maps
        tokens `i32[B, T]` to logits `f32[B, T, classes]`; position t must not read later ones.
      padding: targets of this token do not count; None = all count.

    Returns:
      A task for targets `i32[B, T]`; metrics "loss" and "accuracy".

    Raises:
      FedLPError: padding is not an integer.
    """
    if padding is not None:
        check_number("padding", padding, ge=-(2**31), lt=2**31, integer=True, optional=True)

    def measure(logits: Array, batch: Batch) -> Metrics:
        logits = logits.astype(wide(logits.dtype))
        # One-hot rather than a gather: its gradient is a subtraction, not a scatter.
        target = jax.nn.one_hot(batch.labels, logits.shape[-1], dtype=logits.dtype)
        loss = optax.softmax_cross_entropy(logits, target)
        guess = jax.lax.argmax(logits, logits.ndim - 1, jnp.int32)
        counts = jnp.ones(loss.shape, bool) if padding is None else batch.labels != padding
        if batch.valid is not None:
            counts = counts & batch.valid[:, None]
        # `where`, not a product: NaN in a padding row must not reach the sum.
        zero = jnp.zeros((), loss.dtype)
        hit = jnp.where(counts & (guess == batch.labels), jnp.ones_like(zero), zero)
        tokens = counts.sum(dtype=loss.dtype)
        return {
            "loss": Mean(jnp.where(counts, loss, zero).sum(), tokens),
            "accuracy": Mean(hit.sum(), tokens),
        }

    return supervised(network(module), measure, _check, ("loss", "accuracy"))


def _check(outputs: tuple[int, ...], example: Batch, classes: int) -> None:
    inputs, labels = example.inputs, example.labels
    tokens = jnp.issubdtype(inputs.dtype, jnp.signedinteger) and labels.dtype == jnp.int32
    if not tokens or inputs.ndim != 2 or labels.shape != inputs.shape:
        raise FedLPError(
            "next_token needs inputs and targets int32[N, T], the targets one token later, but the "
            f"inputs are {inputs.dtype}{['N', *inputs.shape[1:]]} and the targets "
            f"{labels.dtype}{['N', *labels.shape[1:]]}; make the data set with targets='values', "
            "or choose another task."
        )
    if outputs[:-1] != labels.shape:
        raise FedLPError(
            f"the model's outputs have shape {list(outputs)} for a batch of one, but logits of "
            f"{labels.shape[1]} tokens must be [batch, {labels.shape[1]}, classes]."
        )
    if outputs[-1] < classes:
        raise FedLPError(
            f"the model has {outputs[-1]} outputs but the data set has {classes} tokens; set its "
            "num_classes."
        )
