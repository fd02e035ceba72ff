"""Multi-label classification: binary cross-entropy of every label."""

from __future__ import annotations

from typing import Any

import optax

from fedlp_jax.errors import FedLPError
from fedlp_jax.tasks.flax_adapter import network
from fedlp_jax.tasks.supervised import Augment, mean_over_rows, supervised
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import Array, Batch, Metrics, Normalize, wide


def multi_label(
    module: Any, normalize: Normalize | None = None, augment: Augment | None = None
) -> Task:
    """Decides on every label of an example by itself, with any flax module.

    Args:
      module: a linen module, an nnx module, or a function of `rngs` that returns one. It maps
        `f32[B, ...]` to logits `f32[B, labels]`; label d is predicted where its logit is positive.
      normalize: replaces the data set's own `x * gain + shift`.
      augment: `(key, inputs f32[B, ...]) -> inputs`, applied to normalised training batches, row by
        row.

    Returns:
      A task for targets `[B, labels]` of 0 and 1; metrics "loss", the binary cross-entropy, and
      "accuracy", each a mean over rows and labels.
    """
    names = ("loss", "accuracy")
    return supervised(network(module), _measure, _check, names, normalize, augment)


def _measure(logits: Array, batch: Batch) -> Metrics:
    logits = logits.astype(wide(logits.dtype))
    target = batch.labels.astype(logits.dtype)
    hit = (logits > 0) == (target > 0.5)
    return {
        "loss": mean_over_rows(optax.sigmoid_binary_cross_entropy(logits, target), batch.valid),
        "accuracy": mean_over_rows(hit.astype(logits.dtype), batch.valid),
    }


def _check(outputs: tuple[int, ...], example: Batch, classes: int) -> None:
    labels = example.labels
    if labels.ndim != 2 or classes > 2:
        largest = f" that go up to {classes - 1}" if classes > 2 else ""
        raise FedLPError(
            f"multi_label needs targets [N, labels] of 0 and 1, but they are {labels.dtype}"
            f"{['N', *labels.shape[1:]]}{largest}; make the data set with targets='values', or "
            "choose another task."
        )
    if outputs != labels.shape:
        raise FedLPError(
            f"the model's outputs have shape {list(outputs)} for a batch of one, but the targets "
            f"have {labels.shape[1]} labels; give the model [batch, {labels.shape[1]}] outputs. "
            "(For a model of this package, set num_classes.)"
        )
