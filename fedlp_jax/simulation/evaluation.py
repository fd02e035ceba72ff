"""What a run reports: exact evaluation over a split, and the sums of a round as means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.data.batching import example_of, slice_batch
from fedlp_jax.execution.map_clients import Level, map_sum
from fedlp_jax.execution.plan import Plan
from fedlp_jax.pruning.submodels import Submodel
from fedlp_jax.tasks.task import Sums
from fedlp_jax.types import Array, ClientMetrics, Examples, PyTree, Variables

# Rows evaluated at once: small enough for a core's cache, large enough to fill an accelerator.
_EVAL_BATCH = {"cpu": 64}
_ACCELERATOR_EVAL_BATCH = 2048


def tested_levels(
    algorithm: Algorithm, variables: Variables, examples: Examples
) -> dict[str, Submodel]:
    """Metric suffix -> submodel: the deepest model, and each depth where heads are shared."""
    levels = algorithm.levels(variables, example_of(examples))
    tested = {"": levels[-1]}
    if algorithm.shared_heads:
        tested |= {f"_depth_{g}": level for g, level in enumerate(levels, start=1)}
    return tested


def evaluator(algorithm: Algorithm, plan: Plan) -> Callable[[Variables, Examples], dict[str, Sums]]:
    """Builds `evaluate(variables, split) -> {suffix: sums}` for jit, over the devices of a plan.

    Batches of the split take the place of clients, so evaluation is the same map and sum as a
    round: exact for any size of split, one division at the end, on the host.
    """
    batch_size = _EVAL_BATCH.get(jax.default_backend(), _ACCELERATOR_EVAL_BATCH)
    devices = plan.devices or 1

    def evaluate(variables: Variables, examples: Examples) -> dict[str, Sums]:
        batches = -(-examples.labels.shape[0] // batch_size)
        slots = -(-batches // devices)
        first = np.arange(devices * slots, dtype=np.int32) * batch_size
        stop = np.clip(batches - np.arange(devices) * slots, 0, slots)
        segment = np.stack([np.zeros_like(stop), stop], axis=1).astype(np.int32)

        def test(level: Submodel) -> Sums:
            def run(shared: PyTree, first: Array, own: Any, active: Array, bounds: Any) -> Any:
                held, examples = shared
                batch = slice_batch(examples, first, batch_size)
                return level.task.evaluate(held, batch), (), own

            held = level.extract(variables)
            work = Level(run, bounds=lambda first: (), embed=lambda shared, total: total)
            total, _, _ = map_sum(
                [work], (held, examples), jnp.asarray(first), jnp.asarray(segment), Plan(devices, 1)
            )
            return total

        return {
            suffix: test(level)
            for suffix, level in tested_levels(algorithm, variables, examples).items()
        }

    return evaluate


def test_metrics(sums: dict[str, Sums]) -> dict[str, float]:
    """`test_loss` and `test_accuracy`, with the suffix of each tested level."""
    row = {}
    for suffix, s in sums.items():
        row[f"test_loss{suffix}"] = float(s.loss) / float(s.examples)
        row[f"test_accuracy{suffix}"] = float(s.correct) / float(s.examples)
    return row


def train_metrics(
    client: ClientMetrics, level: np.ndarray, levels: int, kind: str
) -> dict[str, Any]:
    """Means over the clients of a round that count, on the host.

    Args:
      client: arrays `[C]`, only slots that ran.
      level: `i32[C]`.
      levels: G; with more than one, means per depth are added.
      kind: "examples" or "batches", see `Algorithm.train_loss`.

    Returns:
      `train_loss`, `train_accuracy`, `clients`, `clients_left_out`; a mean over nobody is None.
    """
    finite = np.asarray(client.finite)
    row = _means(client, finite, kind, "")
    row["clients"] = int(finite.size)
    row["clients_left_out"] = int((~finite).sum())
    if levels > 1:
        for g in range(levels):
            row |= _means(client, finite & (level == g), kind, f"_depth_{g + 1}")
    return row


def _means(client: ClientMetrics, who: np.ndarray, kind: str, suffix: str) -> dict[str, Any]:
    if not who.any():
        return {f"train_loss{suffix}": None, f"train_accuracy{suffix}": None}
    examples = _of(client.examples, who).sum()
    if kind == "batches":
        loss = (_of(client.batch_loss_sum, who) / _of(client.steps, who)).mean()
    else:
        loss = _of(client.loss_sum, who).sum() / examples
    return {
        f"train_loss{suffix}": float(loss),
        f"train_accuracy{suffix}": float(_of(client.correct, who).sum() / examples),
    }


def _of(values: Array, who: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float64)[who]
