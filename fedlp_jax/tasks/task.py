"""What is learnt: a network, how its inputs are made, its loss and its measure of success."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedlp_jax.tasks.flax_adapter import Network, network
from fedlp_jax.types import Array, Batch, Normalize, Variables, wide


class Aux(NamedTuple):
    """What a training step yields beside the loss."""

    statistics: Variables  # updated collections other than "params"
    loss_sum: Array  # f32[], over valid rows
    correct: Array  # f32[]
    examples: Array  # f32[], valid rows


class Sums(NamedTuple):
    """Evaluation over some rows, as sums: any set of batches adds up to the exact whole."""

    loss: Array  # f32[]
    correct: Array  # f32[]
    examples: Array  # f32[]


class Task(NamedTuple):
    """Pure functions for ONE client. `loss` trains, `evaluate` measures."""

    init: Callable[[Array, Batch], Variables]  # (key, example batch) -> variables
    loss: Callable[[Variables, Batch, Array], tuple[Array, Aux]]  # (variables, batch, key)
    evaluate: Callable[[Variables, Batch], Sums]  # (variables, batch)
    outputs: Callable[[Variables, Batch], Array]  # (variables, batch) -> [B, classes]
    at_depth: Callable[[int], Task] | None = None  # the submodel of a depth, where offered
    depth: int = 1  # number of depths; the last is the whole model


def classification(
    module: Any,
    normalize: Normalize | None = None,
    augment: Callable[[Array, Array], Array] | None = None,
) -> Task:
    """Cross-entropy classification with any flax module.

    Args:
      module: a linen module, an nnx module, or a function of `rngs` that makes one (see
        `fedlp_jax.tasks.flax_adapter.network`); it maps `f32[B, ...]` to logits
        `f32[B, classes]`. The argument that switches training on is passed if its
        signature has one of `train`, `training`, `deterministic`, `use_running_average`.
      normalize: replaces the data set's own `x * gain + shift`.
      augment: `(key, inputs f32[B, ...]) -> inputs`, applied to normalised training batches.

    Returns:
      A task whose loss is the mean over the valid rows of a batch.
    """
    return _classification(network(module), normalize, augment)


def _classification(
    net: Network,
    normalize: Normalize | None,
    augment: Callable[[Array, Array], Array] | None,
) -> Task:
    def inputs_of(batch: Batch, dtype: Any) -> Array:
        gain, shift = normalize or batch.normalize
        return batch.inputs.astype(dtype) * jnp.asarray(gain, dtype) + jnp.asarray(shift, dtype)

    def init(key: Array, batch: Batch) -> Variables:
        return net.init(key, inputs_of(batch, jnp.float32))

    def loss(variables: Variables, batch: Batch, key: Array) -> tuple[Array, Aux]:
        inputs = inputs_of(batch, _dtype(variables))
        if augment is not None:
            inputs = augment(jax.random.fold_in(key, 1), inputs)
        logits, statistics = net.apply(variables, inputs, jax.random.fold_in(key, 0), batch.valid)
        sums = _sums(logits, batch)
        mean = sums.loss / jnp.maximum(sums.examples, jnp.ones_like(sums.examples))
        return mean, Aux(statistics, sums.loss, sums.correct, sums.examples)

    def outputs(variables: Variables, batch: Batch) -> Array:
        return net.apply(variables, inputs_of(batch, _dtype(variables)), None, None)[0]

    def evaluate(variables: Variables, batch: Batch) -> Sums:
        return _sums(outputs(variables, batch), batch)

    at_depth = None
    if net.at_depth is not None:
        submodel = net.at_depth

        @functools.cache  # one object a depth, so that what jax has traced of it is found again
        def at_depth(depth: int) -> Task:
            return _classification(submodel(depth), normalize, augment)

    return Task(init, loss, evaluate, outputs, at_depth, net.depth)


def _sums(logits: Array, batch: Batch) -> Sums:
    """Loss, hits and rows over the valid rows of `logits: [B, classes]`, in float32 or wider.

    A short float could not even count the rows: bfloat16 has no whole number between 256 and 258.
    """
    logits = logits.astype(wide(logits.dtype))
    # One-hot rather than a gather: its gradient is a subtraction, not a scatter.
    target = jax.nn.one_hot(batch.labels, logits.shape[-1], dtype=logits.dtype)
    loss = optax.softmax_cross_entropy(logits, target)
    guess = jax.lax.argmax(logits, logits.ndim - 1, jnp.int32)
    hit = (guess == batch.labels).astype(logits.dtype)
    if batch.valid is None:
        return Sums(loss.sum(), hit.sum(), jnp.full((), loss.size, loss.dtype))
    # `where`, not a product: whatever a padding row computed must not reach the sum.
    zero = jnp.zeros((), loss.dtype)
    loss, hit = jnp.where(batch.valid, loss, zero), jnp.where(batch.valid, hit, zero)
    return Sums(loss.sum(), hit.sum(), batch.valid.sum(dtype=loss.dtype))


def _dtype(variables: Variables) -> Any:
    """The dtype of the parameters: code computes in what it is given."""
    return jax.tree.leaves(variables["params"])[0].dtype
