"""Exits: a task whose submodels train the exit heads of all shallower depths as well."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from fedlp_jax.errors import FedLPError
from fedlp_jax.prng import root_key
from fedlp_jax.tasks.supervised import heeded, mean_over_rows
from fedlp_jax.tasks.task import Aux, Task
from fedlp_jax.types import Array, Batch, Metrics, Variables, wide


def with_all_exits(task: Task, consistency: float = 0.0, ramp: int = 0) -> Task:
    """The task in which depth d holds exits 1 to d and adds their losses.

    Metrics and outputs are those of exit d. All exits of a step see the same key, so the layers
    they share drop the same units.

    Args:
      task: its module has depths; any other task is returned as it is.
      consistency: weight of the mean divergence of an exit from the others, for classification.
      ramp: rounds in which that weight rises to `consistency`; 0 = it stands there from the first.
    """
    at_depth = getattr(task, "at_depth", None)
    if at_depth is None:
        return task

    @functools.cache  # one object per depth, so that jax recognises what it has traced
    def part(depth: int) -> Task:
        return _exits(task, [at_depth(d) for d in range(1, depth + 1)], consistency, ramp)

    return part(task.depth)._replace(at_depth=part, depth=task.depth)


def _exits(whole: Task, exits: Sequence[Task], consistency: float, ramp: int) -> Task:
    last = exits[-1]

    def init(key: Array, batch: Batch) -> Variables:
        found: dict[tuple[str, ...], Array] = {}
        for one in exits:  # the deepest last, whose draws stay
            found |= flatten_dict(one.init(key, batch))
        return unflatten_dict(found)

    def loss(variables: Variables, batch: Batch, key: Array) -> tuple[Array, Aux]:
        losses, logits = [], []
        statistics: dict[tuple[str, ...], Array] = {}
        for one in exits:
            held = _held(one, variables, batch)
            if consistency and one.loss_and_outputs is not None:
                value, aux, outputs = one.loss_and_outputs(held, batch, key)
                logits.append(heeded(outputs, batch))
            else:
                value, aux = one.loss(held, batch, key)
            losses.append(value)
            statistics |= flatten_dict(aux.statistics)
        if consistency and len(exits) > 1:
            divergence = _divergence(logits, batch.valid)
            weight = consistency * _ramped(batch.round, ramp, divergence.dtype)
            losses.append((weight * divergence).astype(losses[0].dtype))
        return sum(losses[1:], losses[0]), Aux(unflatten_dict(statistics), aux.metrics)

    def evaluate(variables: Variables, batch: Batch) -> Metrics:
        return last.evaluate(_held(last, variables, batch), batch)

    def outputs(variables: Variables, batch: Batch) -> Array:
        return last.outputs(_held(last, variables, batch), batch)

    def check(shape: tuple[int, ...], example: Batch, classes: int) -> None:
        # Labels do not tell: the targets of a regression may be whole numbers.
        if consistency and not (whole.heeds_classes and last.loss_and_outputs is not None):
            raise FedLPError(
                f"consistency={consistency:g} compares the class probabilities of exits, which "
                "this task does not have; use fl.classification, a task of your own with "
                "heeds_classes and loss_and_outputs, or consistency=0."
            )
        last.check(shape, example, classes)

    return Task(
        init,
        loss,
        evaluate,
        outputs,
        check,
        whole.metrics,
        heeds_classes=whole.heeds_classes,
        heeds_round=bool(consistency and ramp),
        exits=tuple(exits),
    )


def _ramped(round: Array | None, ramp: int, dtype: jnp.dtype) -> Array:
    """`f[]`, exp(-5 (1 - round / ramp)^2) up to round `ramp`, then 1."""
    if round is None or not ramp:  # None outside a round, such as where MACs are counted
        return jnp.ones((), dtype)
    left = 1 - jnp.minimum(round, ramp).astype(dtype) / ramp
    return jnp.exp(-5 * left**2)


def _held(exit: Task, variables: Variables, batch: Batch) -> Variables:
    """The variables of one exit: its head and the layers below."""
    paths = flatten_dict(jax.eval_shape(exit.init, root_key(0), batch))
    return unflatten_dict({p: x for p, x in flatten_dict(variables).items() if p in paths})


def _divergence(logits: Sequence[Array], valid: Array | None) -> Array:
    """`sum_i 1 / (d - 1) sum_{j != i} KL(p_j || p_i)`, p_j constant, a mean over valid rows."""
    logs = [jax.nn.log_softmax(x.astype(wide(x.dtype))) for x in logits]
    total = jnp.zeros(logs[0].shape[0], logs[0].dtype)
    for i, log in enumerate(logs):
        for other in map(jax.lax.stop_gradient, logs[:i] + logs[i + 1 :]):
            total = total + (jnp.exp(other) * (other - log)).sum(axis=-1)
    mean, rows = mean_over_rows(total, valid)
    return mean / jnp.maximum(rows, jnp.ones_like(rows)) / (len(logs) - 1)
