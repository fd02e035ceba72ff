"""The interface of a task: a network, its inputs, its loss and its metrics, as pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fedlp_jax.types import Array, Batch, Variables


class Aux(NamedTuple):
    """What a training step reports besides the loss."""

    statistics: Variables  # updated collections other than "params"
    loss_sum: Array  # f32[], over valid rows
    correct: Array  # f32[]
    examples: Array  # f32[], valid rows


class Sums(NamedTuple):
    """Evaluation over some rows, as sums: those of several batches add up exactly."""

    loss: Array  # f32[]
    correct: Array  # f32[]
    examples: Array  # f32[]


class Task(NamedTuple):
    """Pure functions for ONE client. `loss` trains, `evaluate` measures."""

    init: Callable[[Array, Batch], Variables]  # (key, example batch) -> variables
    loss: Callable[[Variables, Batch, Array], tuple[Array, Aux]]  # (variables, batch, key)
    evaluate: Callable[[Variables, Batch], Sums]  # (variables, batch)
    outputs: Callable[[Variables, Batch], Array]  # (variables, batch) -> [B, classes]
    at_depth: Callable[[int], Task] | None = None  # depth -> submodel, if the model has depths
    depth: int = 1  # number of depths; the deepest is the whole model
