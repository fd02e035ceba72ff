"""supervised: a task from a flax network and a function that measures its outputs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedlp_jax.errors import FedLPError, warner
from fedlp_jax.tasks.network import Network
from fedlp_jax.tasks.padding import mixes_rows
from fedlp_jax.tasks.task import Aux, Task
from fedlp_jax.types import Array, Batch, Mean, Metrics, Normalize, Variables, wide

Augment = Callable[[Array, Array], Array]
Measure = Callable[[Array, Batch], Metrics]


def supervised(
    net: Network,
    measure: Measure,
    check: Callable[[tuple[int, ...], Batch, int], None],
    metrics: tuple[str, ...],
    normalize: Normalize | None = None,
    augment: Augment | None = None,
    heeds_classes: bool = False,
) -> Task:
    """Builds the functions of a task.

    Args:
      net: from `fedlp_jax.tasks.flax_adapter.network`.
      measure: `(outputs [B, ...], batch) -> {name: Mean}` over the valid rows. Training minimises
        `metrics["loss"]`, the total over the weight; no weight at all counts as a loss of 0.
      check: as `Task.check`.
      metrics: the names, as `Task.metrics`.
      normalize: replaces the data set's own `x * gain + shift`.
      augment: `(key, inputs f32[B, ...]) -> inputs`, applied to normalised training batches, row by
        row.
      heeds_classes: as `Task.heeds_classes`.
    """

    def inputs_of(batch: Batch, dtype: Any) -> Array:
        if jnp.issubdtype(batch.inputs.dtype, jnp.signedinteger):
            return batch.inputs  # tokens
        gain, shift = normalize or batch.normalize
        return batch.inputs.astype(dtype) * jnp.asarray(gain, dtype) + jnp.asarray(shift, dtype)

    def init(key: Array, batch: Batch) -> Variables:
        return net.init(key, inputs_of(batch, jnp.float32))

    warn = warner()

    def step(variables: Variables, batch: Batch, key: Array) -> tuple[Array, Aux, Array]:
        inputs = inputs_of(batch, _input_dtype(variables))
        if augment is not None:
            augment_key = jax.random.fold_in(key, 1)
            if batch.valid is not None and mixes_rows(augment, augment_key, inputs):
                warn(
                    "augment combines rows of a batch, and some batches are padded, so padding "
                    "rows may enter; augment row by row, or choose a batch_size that divides the "
                    "number of examples of every client."
                )
            inputs = augment(augment_key, inputs)
        out, statistics = net.apply(variables, inputs, jax.random.fold_in(key, 0), batch.valid)
        measured = measure(_one_array(out), batch)
        total, weight = measured["loss"]
        return total / jnp.maximum(weight, jnp.ones_like(weight)), Aux(statistics, measured), out

    def loss(variables: Variables, batch: Batch, key: Array) -> tuple[Array, Aux]:
        return step(variables, batch, key)[:2]

    def outputs(variables: Variables, batch: Batch) -> Array:
        inputs = inputs_of(batch, _input_dtype(variables))
        return _one_array(net.apply(variables, inputs, None, None)[0])

    def evaluate(variables: Variables, batch: Batch) -> Metrics:
        return measure(outputs(variables, batch), batch)

    def of(part: Callable[[Any], Network] | None) -> Callable[[Any], Task] | None:
        if part is None:
            return None

        @functools.cache  # one object per part, so that jax recognises what it has traced
        def task(size: Any) -> Task:
            of_all = measure, check, metrics, normalize, augment, heeds_classes
            return supervised(part(size), *of_all)

        return task

    functions = init, loss, evaluate, outputs, check, metrics
    return Task(*functions, of(net.at_depth), net.depth, of(net.at_width), step, heeds_classes)


def heeded(logits: Array, batch: Batch) -> Array:
    """`logits: [B, classes]`, 0 where the batch leaves a class out (arXiv:2010.01264).

    0 and not -inf, as in the code of HeteroFL.
    """
    if batch.classes is None:
        return logits
    return jnp.where(batch.classes[None], logits, jnp.zeros_like(logits))


def mean_over_rows(values: Array, valid: Array | None) -> Mean:
    """The mean of `values: [B, ...]` over the valid rows, each element with weight 1.

    Args:
      values: float32 or wider; a short float could not count the rows, as bfloat16 has no integer
        between 256 and 258.
      valid: `bool[B]`; None = all.
    """
    if valid is None:
        return Mean(values.sum(), jnp.full((), values.size, values.dtype))
    # `where`, not a product: NaN in a padding row must not reach the sum.
    rows = valid.reshape(valid.shape + (1,) * (values.ndim - 1))
    total = jnp.where(rows, values, jnp.zeros((), values.dtype)).sum()
    return Mean(total, valid.sum(dtype=values.dtype) * (values.size // values.shape[0]))


def _one_array(outputs: Any) -> Array:
    if not isinstance(outputs, jax.Array):
        raise FedLPError(
            f"the model returns a {type(outputs).__name__}, but its task needs one array "
            "[batch, ...], such as logits; wrap the model in one that returns only that."
        )
    return outputs


def _input_dtype(variables: Variables) -> Any:
    """The widest dtype of the parameters, at least float32: short parameters keep all digits."""
    dtypes = [wide(leaf.dtype) for leaf in jax.tree.leaves(variables["params"])]
    return max(dtypes, key=lambda dtype: dtype.itemsize)
