"""What `simulate` refuses, before anything is compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax.algorithms.algorithm import Algorithm
from fedlp_jax.data.datasets import Dataset
from fedlp_jax.data.partition import Partition
from fedlp_jax.task import Task
from fedlp_jax.types import Array, Batch, FedLPError, ServerState, Variables


def initial_shapes(task: Task, root: Array, example: Batch) -> Variables:
    """The shapes of a task's variables, without computing them."""
    return jax.eval_shape(task.init, root, example)


def check_numbers(rounds: int, seed: int, eval_every: int | None) -> None:
    """Refuses numbers that are not whole or too small.

    Raises:
      FedLPError: with the name, the value and the least it may be.
    """
    for name, value, least in (
        ("rounds", rounds, 0),
        ("seed", seed, 0),
        ("eval_every", eval_every, 1),
    ):
        if value is None and name == "eval_every":
            continue
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise FedLPError(f"{name}={value!r} must be a whole number of at least {least}.")
    if seed >= 2**32:
        raise FedLPError(f"seed={seed} must be below 2**32.")


def check_partition(clients: Partition, data: Dataset) -> None:
    """Refuses a partition of other examples than the training split's.

    Raises:
      FedLPError: with both numbers.
    """
    examples = len(data.train.labels)
    if len(clients.labels) != examples:
        raise FedLPError(
            f"the partition was made for {len(clients.labels)} examples but the training split of "
            f"'{data.name}' has {examples}; partition its own labels."
        )


def check_model(algorithm: Algorithm, example: Batch, data: Dataset, root: Array) -> None:
    """Refuses a model that cannot take the inputs or has too few outputs.

    Raises:
      FedLPError: with the shape, or both numbers.
    """
    with _taking(data, example):
        variables = initial_shapes(algorithm.task, root, example)
        outputs = jax.eval_shape(algorithm.task.outputs, variables, example)
    if outputs.ndim != 2:
        raise FedLPError(
            f"the model's outputs have shape {list(outputs.shape)} for a batch of one, but logits "
            "must be [batch, classes]."
        )
    if outputs.shape[-1] < data.num_classes:
        raise FedLPError(
            f"the model has {outputs.shape[-1]} outputs but '{data.name}' has {data.num_classes} "
            "classes; set its num_classes."
        )
    with _taking(data, example):
        jax.eval_shape(algorithm.task.loss, variables, example, root)


@contextlib.contextmanager
def _taking(data: Dataset, example: Batch) -> Iterator[None]:
    """Turns whatever a model says while it is traced into a sentence about the data."""
    try:
        yield
    except FedLPError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FedLPError(
            f"the model cannot take the inputs of '{data.name}', of shape "
            f"{list(example.inputs.shape[1:])}: {reason}"
        ) from error


def initial_state(algorithm: Algorithm, example: Batch, root: Array, clients: int) -> ServerState:
    """The shapes of an algorithm's first state; what it refuses, it refuses before compiling."""
    return jax.eval_shape(lambda key: algorithm.init(key, example, clients, None), root)


def check_variables(variables: Variables, wanted: Variables) -> None:
    """Compares given variables with those the server would have made.

    Raises:
      FedLPError: with the first path that differs and both shapes.
    """
    have, want = _leaves(variables), _leaves(wanted)
    for path in sorted(set(have) | set(want)):
        shape = have[path].shape if path in have else "nothing"
        needs = want[path].shape if path in want else "nothing"
        if shape != needs:
            raise FedLPError(
                f"variables{path} has shape {shape} but the server of this algorithm holds {needs} "
                "there. Give a tree like `result.state.variables` of such a run."
            )
        if not jnp.issubdtype(have[path].dtype, jnp.floating):
            raise FedLPError(f"variables{path} has dtype {have[path].dtype}; give floats.")


def _leaves(tree: Variables) -> dict[str, Any]:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): jnp.asarray(leaf) if not hasattr(leaf, "dtype") else leaf
        for path, leaf in found
    }
