"""Masked means over clients: how the server combines what was sent.

With `a_k` the weight of client k, `m_{k,l}` its layer mask and `d_k = x_k - x` its update, layer by
layer:

    masked_mean          d = sum a_k m_k d_k / sum a_k m_k      (FedLP; mean over the uploaders)
    cohort_mean          d = sum a_k m_k d_k / sum a_k          (shrinks with the share that sent)
    inverse_probability  d = sum a_k (m_k / p_k) d_k / sum a_k  (unbiased for the full mean)

Updates are summed, not models: a layer that nobody sent has the update zero and keeps its bits.
They are summed in float32 or wider, whatever their dtype: a sum in bfloat16 stands still as soon as
it is 256 times what is added.

With submodels the last two count a client that does not hold a layer as one without a change to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedlp_jax.pruning.layers import LayerTable
from fedlp_jax.types import Array, PyTree, Variables, wide


class Contribution(NamedTuple):
    """What clients add up to. Summable: over clients, chunks, levels and devices."""

    total: Variables  # sum of weighted masked updates, in float32 or wider
    weight: Array  # f32[L], sum of a_k m_{k,l}
    cohort: Array  # f32[], sum of a_k


class Aggregator(NamedTuple):
    """Lift one client to a summable tree; lower the sum to the server's update."""

    init: Callable[[Variables], PyTree]  # variables -> state
    # (update, weight f32[], mask f32[L], keep f32[L], counted bool[], layers) -> contribution
    lift: Callable[[Variables, Array, Array, Array, Array, LayerTable], Contribution]
    # (sum, state, layers) -> (update, state)
    lower: Callable[[Contribution, PyTree, LayerTable], tuple[Variables, PyTree]]


def masked_mean() -> Aggregator:
    """Mean of each layer over the clients that sent it (FedLP, arXiv:2303.06360)."""
    return Aggregator(_no_state, _lift, _lower(lambda c: c.weight, lambda c: c.weight))


def cohort_mean() -> Aggregator:
    """Mean over the whole cohort, a layer not sent counting as no change (CoCoFL, Alg. 2)."""
    return Aggregator(
        _no_state, _lift, _lower(lambda c: jnp.full_like(c.weight, c.cohort), lambda c: c.weight)
    )


def inverse_probability() -> Aggregator:
    """Mean over the cohort of updates divided by their keep probability (Horvitz-Thompson).

    Only parameters are reweighted; batch statistics take the masked mean, since a reweighted
    variance can turn negative.
    """

    def lift(
        update: Variables,
        weight: Array,
        mask: Array,
        keep: Array,
        counted: Array,
        layers: LayerTable,
    ) -> Contribution:
        # A layer that was sent had keep > 0; where keep is 0 the mask is 0 and so is the quotient.
        factor = jnp.where(mask > 0, mask / jnp.where(keep > 0, keep, 1.0), 0.0)
        plain = _lift(update, weight, mask, keep, counted, layers)
        scaled = _lift(
            {"params": update["params"]}, weight, factor, keep, counted, _only_params(layers)
        )
        return plain._replace(total={**plain.total, **scaled.total})

    return Aggregator(
        _no_state, lift, _lower(lambda c: jnp.full_like(c.weight, c.cohort), lambda c: c.weight)
    )


def _no_state(variables: Variables) -> PyTree:
    del variables
    return ()


def _lift(
    update: Variables, weight: Array, mask: Array, keep: Array, counted: Array, layers: LayerTable
) -> Contribution:
    del keep
    zero = jnp.zeros_like(weight)
    factor = jnp.where(counted, weight * mask, jnp.zeros_like(mask))

    def scaled(delta: Array, a: Array) -> Array:
        # `where`, not a product with 0: the update of a client that does not count may be NaN.
        delta = delta.astype(wide(delta.dtype))
        return jnp.where(counted, delta * a.astype(delta.dtype), jnp.zeros_like(delta))

    total = jax.tree.map(scaled, update, layers.expand(factor))
    return Contribution(total, factor, jnp.where(counted, weight, zero))


def _lower(
    of_params: Callable[[Contribution], Array], of_statistics: Callable[[Contribution], Array]
) -> Callable[[Contribution, PyTree, LayerTable], tuple[Variables, PyTree]]:
    """Divides sums by a weight per layer: one for parameters, one for statistics."""

    def lower(
        contribution: Contribution, state: PyTree, layers: LayerTable
    ) -> tuple[Variables, PyTree]:
        def mean(total: Array, weight: Array) -> Array:
            weight = weight.astype(total.dtype)
            return jnp.where(
                weight > 0,
                total / jnp.where(weight > 0, weight, jnp.ones_like(weight)),
                jnp.zeros_like(total),
            )

        update = {
            collection: jax.tree.map(
                mean,
                tree,
                layers.expand(
                    (of_params if collection == "params" else of_statistics)(contribution)
                )[collection],
            )
            for collection, tree in contribution.total.items()
        }
        return update, state

    return lower


def _only_params(layers: LayerTable) -> Any:
    return LayerTable(
        layers.names, {"params": layers.index["params"]}, layers.params, layers.statistics
    )
