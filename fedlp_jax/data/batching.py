"""Shuffled, padded batches of ONE client's rows, inside jit."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedlp_jax.types import Array, Batch, Examples


def shuffled_rows(key: Array, rows: Array, size: Array, batch_size: int) -> Array:
    """Shuffles a client's rows for one epoch; the valid ones come first.

    Padding repeats the client's own first row: another client's example must not enter this
    gradient, not even times zero.

    A sort of uniform draws makes the order independent of M, the padded size, since a
    one-dimensional uniform draw is a prefix of a longer one. `jax.random.permutation` would not.

    Args:
      key: consumed.
      rows: `i32[M]`, rows of the split, valid up to `size`.
      size: `i32[]`, number of valid rows.
      batch_size: B.

    Returns:
      `i32[ceil(M / B) * B]`; rows past `size` are padding.
    """
    (width,) = rows.shape
    # Always float32, so that a run in float64 draws the same order.
    draw = jax.random.uniform(key, (width,), jnp.float32)
    order = jnp.argsort(
        jnp.where(jnp.arange(width, dtype=jnp.int32) < size, draw, jnp.float32(2.0))
    )
    rows = rows[jnp.pad(order, (0, -width % batch_size))]
    own = jnp.arange(rows.shape[0], dtype=jnp.int32) < size
    return jnp.where(own, rows, rows[0])


def take_batch(
    examples: Examples, order: Array, step: Array, size: Array, batch_size: int, full: bool
) -> Batch:
    """Gathers batch `step` of an epoch; the last one may be partial.

    Args:
      examples: the split, inputs `uint8|f32|i32[N, ...]`.
      order: `i32[ceil(M / B) * B]` from `shuffled_rows`.
      step: `i32[]`, batch within the epoch.
      size: `i32[]`, the client's number of examples.
      batch_size: B.
      full: True if every batch of every client is full; the batch then has no mask.

    Returns:
      A batch of B rows.
    """
    first = step * batch_size
    rows = jax.lax.dynamic_slice_in_dim(order, first, batch_size)
    valid = None if full else first + jnp.arange(batch_size, dtype=jnp.int32) < size
    return Batch(examples.inputs[rows], examples.labels[rows], valid, examples.normalize)


def slice_batch(examples: Examples, first: Array, batch_size: int) -> Batch:
    """Rows `first` to `first + B` of a split, unshuffled and masked past its end."""
    last = examples.labels.shape[0] - 1
    rows = first + jnp.arange(batch_size, dtype=jnp.int32)
    valid = rows <= last
    rows = jnp.minimum(rows, last)
    return Batch(examples.inputs[rows], examples.labels[rows], valid, examples.normalize)


def example_of(examples: Examples) -> Batch:
    """A batch of one zero row, for shapes."""
    return Batch(
        jnp.zeros((1, *examples.inputs.shape[1:]), examples.inputs.dtype),
        jnp.zeros((1, *examples.labels.shape[1:]), examples.labels.dtype),
        None,
        examples.normalize,
    )
