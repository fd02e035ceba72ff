"""Regression: squared and absolute error of any flax module."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from fedlp_jax.errors import FedLPError
from fedlp_jax.tasks.flax_adapter import network
from fedlp_jax.tasks.supervised import Augment, mean_over_rows, supervised
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import Array, Batch, Metrics, Normalize, wide


def regression(
    module: Any, normalize: Normalize | None = None, augment: Augment | None = None
) -> Task:
    """Least squares with any flax module.

    Args:
      module: a linen module, an nnx module, or a function of `rngs` that returns one. It maps
        `f32[B, ...]` to predictions of the targets' shape, or to `[B, 1]` for targets `[B]`.
      normalize: replaces the data set's own `x * gain + shift`.
      augment: `(key, inputs f32[B, ...]) -> inputs`, applied to normalised training batches, row by
        row.

    Returns:
      A task for targets `f32[B]` or `f32[B, ...]`; metrics "loss", the squared error, and
      "absolute_error", each a mean over rows and outputs.
    """
    names = ("loss", "absolute_error")
    return supervised(network(module), _measure, _check, names, normalize, augment)


def _measure(outputs: Array, batch: Batch) -> Metrics:
    outputs = outputs.astype(wide(outputs.dtype)).reshape(batch.labels.shape)
    error = outputs - batch.labels.astype(outputs.dtype)
    return {
        "loss": mean_over_rows(jnp.square(error), batch.valid),
        "absolute_error": mean_over_rows(jnp.abs(error), batch.valid),
    }


def _check(outputs: tuple[int, ...], example: Batch, classes: int) -> None:
    del classes
    shape = example.labels.shape
    fits = outputs == shape or (len(shape) == 1 and outputs == (*shape, 1))
    if not fits:
        raise FedLPError(
            f"the model's outputs have shape {list(outputs)} for a batch of one, but the targets "
            f"are {example.labels.dtype}{['N', *shape[1:]]}; give the model outputs of the "
            "targets' shape. (A model of this package has num_classes outputs.)"
        )
