"""Classification: cross-entropy and accuracy of any flax module."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedlp_jax.errors import FedLPError
from fedlp_jax.tasks.flax_adapter import network
from fedlp_jax.tasks.supervised import Augment, heeded, mean_over_rows, supervised
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import Array, Batch, Metrics, Normalize, wide


def classification(
    module: Any, normalize: Normalize | None = None, augment: Augment | None = None
) -> Task:
    """Cross-entropy classification with any flax module.

    Args:
      module: a linen module, an nnx module, or a function of `rngs` that returns one. It maps
        `f32[B, ...]` to logits `f32[B, classes]`. `fedlp_jax.tasks.flax_adapter.network` says how
        it is switched between training and evaluation.
      normalize: replaces the data set's own `x * gain + shift`.
      augment: `(key, inputs f32[B, ...]) -> inputs`, applied to normalised training batches, row by
        row.

    Returns:
      A task whose loss is the mean over the valid rows of a batch; metrics "loss" and "accuracy".
    """
    names = ("loss", "accuracy")
    net = network(module)
    return supervised(net, _measure, _check, names, normalize, augment, heeds_classes=True)


def _measure(logits: Array, batch: Batch) -> Metrics:
    """Cross-entropy and hits over the valid rows of `logits: [B, classes]`."""
    logits = heeded(logits.astype(wide(logits.dtype)), batch)
    # One-hot rather than a gather: its gradient is a subtraction, not a scatter.
    target = jax.nn.one_hot(batch.labels, logits.shape[-1], dtype=logits.dtype)
    loss = optax.softmax_cross_entropy(logits, target)
    guess = jax.lax.argmax(logits, logits.ndim - 1, jnp.int32)
    hit = (guess == batch.labels).astype(logits.dtype)
    return {
        "loss": mean_over_rows(loss, batch.valid),
        "accuracy": mean_over_rows(hit, batch.valid),
    }


def _check(outputs: tuple[int, ...], example: Batch, classes: int) -> None:
    labels = example.labels
    if labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise FedLPError(
            f"classification needs class labels [N], but the targets are {labels.dtype}"
            f"{['N', *labels.shape[1:]]}; make the data set with targets='classes', or choose "
            "another task."
        )
    if len(outputs) != 2:
        raise FedLPError(
            f"the model's outputs have shape {list(outputs)} for a batch of one, but logits must "
            "be [batch, classes]."
        )
    if outputs[-1] < classes:
        raise FedLPError(
            f"the model has {outputs[-1]} outputs but the data set has {classes} classes; set its "
            "num_classes."
        )
