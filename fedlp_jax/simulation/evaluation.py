"""What a run reports: exact evaluation over a split, and the sums of a round as means."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.data.batching import example_of, slice_batch
from fedlp_jax.data.dataset import Dataset
from fedlp_jax.data.partition import Partition, dealt_alike, made_for
from fedlp_jax.errors import FedLPError, check_choice
from fedlp_jax.execution.map_clients import Level, map_sum
from fedlp_jax.execution.plan import Plan, resolve
from fedlp_jax.pruning.submodels import Submodel
from fedlp_jax.simulation import personal
from fedlp_jax.simulation.personal import ClientModels
from fedlp_jax.simulation.personal import eval_batch_size as _batch_size
from fedlp_jax.simulation.staging import on_host
from fedlp_jax.simulation.validation import check_complete, check_outputs
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import (
    Array,
    Batch,
    ClientMetrics,
    Examples,
    Mean,
    Metrics,
    PyTree,
    Variables,
)


def tested_levels(
    algorithm: Algorithm, variables: Variables, examples: Examples
) -> dict[str, Submodel]:
    """Metric suffix -> submodel: the deepest model, and each depth where heads are shared.

    None where clients keep layers for themselves.
    """
    if algorithm.personal:
        return {}
    levels = algorithm.levels(variables, example_of(examples))
    tested = {"": levels[-1]}
    if algorithm.shared_heads:
        tested |= {f"_{level.name}": level for level in levels}
    return tested


def evaluator(algorithm: Algorithm, plan: Plan) -> Callable[..., dict[str, Metrics]]:
    """Builds `evaluate(variables, split) -> {suffix: metrics}` for jit, over the devices of a plan.

    Batches of the split take the place of clients, so evaluation is the same map and sum as a
    round: exact for any size of split, one division at the end, on the host. Where clients keep
    layers for themselves, it takes these and the batches of each client too, see
    `fedlp_jax.simulation.personal`.
    """
    batch_size = _batch_size()
    devices = plan.devices or 1
    one_by_one = dataclasses.replace(plan, devices=devices, width=1)

    def evaluate_personal(
        variables: Variables,
        examples: Examples,
        stacks: tuple[PyTree, ...],
        batches: personal.ClientBatches,
    ) -> dict[str, Metrics]:
        levels = algorithm.levels(variables, example_of(examples))
        total, _ = personal.measure(levels, variables, stacks, examples, batches, plan)
        return {"_personal": total}

    def evaluate(variables: Variables, examples: Examples) -> dict[str, Metrics]:
        batches = -(-examples.labels.shape[0] // batch_size)
        slots = -(-batches // devices)
        first = np.arange(devices * slots, dtype=np.int32) * batch_size
        stop = np.clip(batches - np.arange(devices) * slots, 0, slots)
        segment = np.stack([np.zeros_like(stop), stop], axis=1).astype(np.int32)

        def test(level: Submodel) -> Metrics:
            def run(shared: PyTree, first: Array, own: Any, active: Array, bounds: Any) -> Any:
                held, examples = shared
                batch = slice_batch(examples, first, batch_size)
                return level.task.evaluate(held, batch), (), own

            held = level.extract(variables)
            work = Level(run, bounds=lambda first: (), embed=lambda shared, total: total)
            total, _, _ = map_sum(
                [work], (held, examples), jnp.asarray(first), jnp.asarray(segment), one_by_one
            )
            return total

        return {
            suffix: test(level)
            for suffix, level in tested_levels(algorithm, variables, examples).items()
        }

    return evaluate_personal if algorithm.personal else evaluate


def evaluate(
    task: Task,
    variables: Variables | ClientModels,
    data: Dataset,
    clients: Partition | None = None,
    *,
    split: Literal["test", "train"] = "test",
    plan: Plan | None = None,
) -> dict[str, Any]:
    """Measures a model on a split of the data, as a whole or for each client.

    Args:
      task: as in training.
      variables: a model, such as `result.variables`; or `result.models`, and each client is
        measured with its own; on all examples, if there is no partition.
      data: what to measure on.
      clients: a partition of that split, for numbers of each client. For `result.models` on the
        test split it may be the partition of the training split: the test examples are then dealt
        to the clients as in the run, and a client that gets none has NaN.
      split: "test" or "train".
      plan: the devices to use; None = all.

    Returns:
      The mean of each of the task's metrics: a float, or `f64[K]` with one for each client.

    Raises:
      FedLPError: an unknown split, a partition of other examples, or a model that does not fit or
        lacks what clients keep for themselves.
    """
    check_choice("split", split, ("test", "train"))
    examples = getattr(data, split)
    if isinstance(variables, ClientModels):
        return _evaluate_models(variables, data, clients, split, plan)
    count = len(examples.labels)
    if clients is not None and len(clients.labels) != count:
        raise FedLPError(
            f"the partition was made for {len(clients.labels):,} examples but the {split} split of "
            f"'{data.name}' has {count:,}; partition data.{split}.labels, or give split=."
        )
    held = on_host(examples, data.normalize)
    check_complete(task, variables, example_of(held), data)
    check_outputs(task, variables, example_of(held), data)
    order = [np.arange(count, dtype=np.int32)]
    if clients is not None:
        order = np.split(clients.order, clients.offset[1:-1])
    batch_size = min(_batch_size(), max(map(len, order)))
    cuts = [np.split(rows, range(batch_size, len(rows), batch_size)) for rows in order]
    batches = [batch for cut in cuts for batch in cut]
    owner = np.repeat(np.arange(len(order)), [len(cut) for cut in cuts])
    rows = np.stack([np.resize(batch, batch_size) for batch in batches])
    sizes = np.asarray([len(batch) for batch in batches], np.int32)
    sums = _sums_of_batches(task, variables, held, rows, sizes, resolve(plan, len(batches)))
    metrics = {}
    for name, mean in _loss_first(sums):
        total, weight = (np.bincount(owner, np.asarray(x, np.float64)) for x in mean)
        metrics[name] = float(total[0] / weight[0]) if clients is None else total / weight
    return metrics


def _evaluate_models(
    models: ClientModels, data: Dataset, clients: Partition | None, split: str, plan: Plan | None
) -> dict[str, Any]:
    """`evaluate` of every client's own model: `f64[K]` for each metric."""
    examples, count = getattr(data, split), len(models)
    rows = len(examples.labels)
    if clients is None:
        order, offset = np.tile(np.arange(rows, dtype=np.int32), count), rows * np.arange(count + 1)
    elif clients.clients != count:
        raise FedLPError(
            f"the partition has {clients.clients} clients, but there are the models of {count}; "
            "give the partition of the run, or one of as many clients."
        )
    elif made_for(clients, examples.labels):
        order, offset = clients.order, clients.offset
    elif split == "test" and made_for(clients, data.train.labels):
        order, offset = dealt_alike(clients, examples.labels)
    else:
        raise FedLPError(
            f"the partition was not made for the {rows:,} labels of the {split} split of "
            f"'{data.name}'; partition data.{split}.labels, or give split=."
        )
    held = on_host(examples, data.normalize)
    task = models.levels[models.assigned[0]].task
    check_outputs(task, models[0], example_of(held), data)
    plan = resolve(plan, count)
    batches = personal.client_batches(
        order,
        offset,
        models.assigned,
        models.place,
        levels=len(models.levels),
        devices=plan.devices or 1,
        batch_size=_batch_size(),
    )
    mapped = jax.jit(
        lambda variables, stacks, examples, batches: personal.measure(
            models.levels, variables, stacks, examples, batches, plan
        )[1]
    )
    given = jax.device_get((models.variables, models.stacks, held))
    each = jax.device_get(mapped(*given, batches))
    with np.errstate(invalid="ignore"):  # a client without examples
        sums = _loss_first(personal.means_by_client(each, batches, count))
        return {name: total / weight for name, (total, weight) in sums}


def _sums_of_batches(
    task: Task, variables: Variables, examples: Examples, rows: Any, sizes: Any, plan: Plan
) -> Metrics:
    """The metrics of batches of rows, `[N]`, as sums; `rows: i32[N, B]` of which `sizes` count."""
    devices = plan.devices or 1
    slots = -(-len(rows) // devices)
    padding = devices * slots - len(rows)
    rows, sizes = np.pad(rows, ((0, padding), (0, 0))), np.pad(sizes, (0, padding))

    def run(shared: PyTree, batch: Any, own: Any, active: Array, bounds: Any) -> Any:
        (variables, examples), (rows, size) = shared, batch
        valid = jnp.arange(rows.shape[0], dtype=jnp.int32) < size
        inputs, labels = examples.inputs[rows], examples.labels[rows]
        measured = task.evaluate(variables, Batch(inputs, labels, valid, examples.normalize))
        return (), measured, own

    level = Level(run, bounds=lambda batch: (), embed=lambda shared, total: total)
    segment = np.tile(np.asarray([[0, slots]], np.int32), (devices, 1))
    mapped = jax.jit(
        lambda shared, batches: map_sum(
            [level], shared, batches, jnp.asarray(segment), Plan(devices, 1)
        )[1]
    )
    # From the host, because the model may lie on other devices.
    sums = mapped(jax.device_get((variables, examples)), (rows, sizes))
    return jax.tree.map(lambda x: x[: len(x) - padding], jax.device_get(sums))


def test_metrics(tested: dict[str, Metrics]) -> dict[str, float]:
    """`test_NAME` of each metric, with the suffix of each tested level."""
    return {
        f"test_{name}{suffix}": float(mean.total) / float(mean.weight)
        for suffix, metrics in tested.items()
        for name, mean in _loss_first(metrics)
    }


def train_metrics(
    client: ClientMetrics, level: np.ndarray, names: Sequence[str], kind: str
) -> dict[str, Any]:
    """Means over the clients of a round that count, on the host.

    Args:
      client: arrays `[C]`, only slots that ran.
      level: `i32[C]`.
      names: of the levels; with more than one, means of each are added.
      kind: "examples" or "batches", see `Algorithm.train_loss`.

    Returns:
      `train_NAME` of each metric, `clients`, `clients_left_out`; a mean over nobody is None.
    """
    finite = np.asarray(client.finite)
    row = _means(client, finite, kind, "")
    row["clients"] = int(finite.size)
    row["clients_left_out"] = int((~finite).sum())
    if len(names) > 1:
        for g, name in enumerate(names):
            row |= _means(client, finite & (level == g), kind, f"_{name}")
    return row


def _means(client: ClientMetrics, who: np.ndarray, kind: str, suffix: str) -> dict[str, Any]:
    if not who.any():
        return {f"train_{name}{suffix}": None for name, _ in _loss_first(client.means)}
    row = {
        f"train_{name}{suffix}": float(_of(mean.total, who).sum() / _of(mean.weight, who).sum())
        for name, mean in _loss_first(client.means)
    }
    if kind == "batches":
        loss = (_of(client.batch_loss_sum, who) / _of(client.steps, who)).mean()
        row[f"train_loss{suffix}"] = float(loss)
    return row


def _loss_first(metrics: Metrics) -> list[tuple[str, Mean]]:
    return sorted(metrics.items(), key=lambda item: (item[0] != "loss", item[0]))


def _of(values: Array, who: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float64)[who]
