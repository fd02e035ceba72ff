"""The interface of a task: a network, its inputs, its loss and its metrics, as pure functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fedlp_jax.types import Array, Batch, Metrics, Variables


class Aux(NamedTuple):
    """What a training step reports besides the loss."""

    statistics: Variables  # updated collections other than "params"
    metrics: Metrics  # over valid rows, under the names of `Task.metrics`


class Task(NamedTuple):
    """Pure functions for ONE client. `loss` trains, `evaluate` measures.

    A run reports each metric as `train_NAME` and `test_NAME`. One of them is "loss".
    """

    init: Callable[[Array, Batch], Variables]  # (key, example batch) -> variables
    loss: Callable[[Variables, Batch, Array], tuple[Array, Aux]]  # (variables, batch, key)
    evaluate: Callable[[Variables, Batch], Metrics]  # (variables, batch)
    outputs: Callable[[Variables, Batch], Array]  # (variables, batch) -> [B, ...]
    # (shape of the outputs for a batch of one, that batch, number of classes or 0); raises a
    # FedLPError where they do not fit
    check: Callable[[tuple[int, ...], Batch, int], None] = lambda outputs, example, classes: None
    metrics: tuple[str, ...] = ("loss", "accuracy")
    at_depth: Callable[[int], Task] | None = None  # depth -> submodel, if the model has depths
    depth: int = 1  # number of depths; the deepest is the whole model
    at_width: Callable[[float], Task] | None = None  # rate -> narrower model, if it has widths
    # as `loss`, and the outputs [B, ...] of that training step; None = it does not tell
    loss_and_outputs: Callable[[Variables, Batch, Array], tuple[Array, Aux, Array]] | None = None
    # `outputs` are logits of classes, and `loss` leaves out those that the batch's `classes` omits
    heeds_classes: bool = False
    heeds_round: bool = False  # `loss` reads the batch's `round`
    exits: tuple[Task, ...] = ()  # whose losses `loss` adds, the deepest last; () = it has one
