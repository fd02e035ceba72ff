"""Classification: cross-entropy and accuracy of any flax module."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedlp_jax.errors import FedLPError
from fedlp_jax.tasks.flax_adapter import Network, network
from fedlp_jax.tasks.padding import mixes_rows
from fedlp_jax.tasks.task import Aux, Sums, Task
from fedlp_jax.types import Array, Batch, Normalize, Variables, wide

Augment = Callable[[Array, Array], Array]


def classification(
    module: Any, normalize: Normalize | None = None, augment: Augment | None = None
) -> Task:
    """Cross-entropy classification with any flax module.

    Args:
      module: a linen module, an nnx module, or a function of `rngs` that returns one. It maps
        `f32[B, ...]` to logits `f32[B, classes]`. `fedlp_jax.tasks.flax_adapter.network` says how
        it is switched between training and evaluation.
      normalize: replaces the data set's own `x * gain + shift`.
      augment: `(key, inputs f32[B, ...]) -> inputs`, applied to normalised training batches, row by
        row.

    Returns:
      A task whose loss is the mean over the valid rows of a batch.
    """
    return _classification(network(module), normalize, augment)


def _classification(net: Network, normalize: Normalize | None, augment: Augment | None) -> Task:
    def inputs_of(batch: Batch, dtype: Any) -> Array:
        gain, shift = normalize or batch.normalize
        return batch.inputs.astype(dtype) * jnp.asarray(gain, dtype) + jnp.asarray(shift, dtype)

    def init(key: Array, batch: Batch) -> Variables:
        return net.init(key, inputs_of(batch, jnp.float32))

    @functools.cache
    def warn(sentence: str) -> None:
        warnings.warn(sentence, stacklevel=2)

    def loss(variables: Variables, batch: Batch, key: Array) -> tuple[Array, Aux]:
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
        logits, statistics = net.apply(variables, inputs, jax.random.fold_in(key, 0), batch.valid)
        sums = _sums(logits, batch)
        mean = sums.loss / jnp.maximum(sums.examples, jnp.ones_like(sums.examples))
        return mean, Aux(statistics, sums.loss, sums.correct, sums.examples)

    def outputs(variables: Variables, batch: Batch) -> Array:
        inputs = inputs_of(batch, _input_dtype(variables))
        return _checked(net.apply(variables, inputs, None, None)[0])

    def evaluate(variables: Variables, batch: Batch) -> Sums:
        return _sums(outputs(variables, batch), batch)

    at_depth = None
    if net.at_depth is not None:
        submodel = net.at_depth

        @functools.cache  # one object per depth, so that jax recognises what it has traced
        def at_depth(depth: int) -> Task:
            return _classification(submodel(depth), normalize, augment)

    return Task(init, loss, evaluate, outputs, at_depth, net.depth)


def _checked(logits: Any) -> Array:
    if not isinstance(logits, jax.Array):
        raise FedLPError(
            f"the model returns a {type(logits).__name__}, but classification needs one array of "
            "logits [batch, classes]; wrap the model in one that returns its logits."
        )
    return logits


def _sums(logits: Any, batch: Batch) -> Sums:
    """Loss, hits and rows over the valid rows of `logits: [B, classes]`, in float32 or wider.

    A short float could not count the rows: bfloat16 has no integer between 256 and 258.
    """
    logits = _checked(logits)
    logits = logits.astype(wide(logits.dtype))
    # One-hot rather than a gather: its gradient is a subtraction, not a scatter.
    target = jax.nn.one_hot(batch.labels, logits.shape[-1], dtype=logits.dtype)
    loss = optax.softmax_cross_entropy(logits, target)
    guess = jax.lax.argmax(logits, logits.ndim - 1, jnp.int32)
    hit = (guess == batch.labels).astype(logits.dtype)
    if batch.valid is None:
        return Sums(loss.sum(), hit.sum(), jnp.full((), loss.size, loss.dtype))
    # `where`, not a product: NaN in a padding row must not reach the sum.
    zero = jnp.zeros((), loss.dtype)
    loss, hit = jnp.where(batch.valid, loss, zero), jnp.where(batch.valid, hit, zero)
    return Sums(loss.sum(), hit.sum(), batch.valid.sum(dtype=loss.dtype))


def _input_dtype(variables: Variables) -> Any:
    """The widest dtype of the parameters, at least float32: short parameters keep all digits."""
    dtypes = [wide(leaf.dtype) for leaf in jax.tree.leaves(variables["params"])]
    return max(dtypes, key=lambda dtype: dtype.itemsize)
