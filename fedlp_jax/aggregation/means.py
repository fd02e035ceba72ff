"""Masked means over clients.

With `a_k` the weight of client k, `m_{k,l}` its layer mask and `d_k = x_k - x` its update, layer by
layer:

    masked_mean          d = sum a_k m_k d_k / sum a_k m_k      (FedLP; mean over the senders)
    cohort_mean          d = sum a_k m_k d_k / sum a_k          (shrinks with the share that sent)
    inverse_probability  d = sum a_k (m_k / p_k) d_k / sum a_k  (unbiased for the full mean)

Updates are summed, not models: a layer that nobody sent has a zero update and keeps its bits. Sums
are float32 or wider whatever the dtype of the updates: a bfloat16 sum stops growing once it is 256
times as large as what is added.

In a scheme with submodels, the last two count a client without a layer as one that did not change
it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedlp_jax.aggregation.reducer import Aggregate, Received, Reducer, UploadInfo
from fedlp_jax.execution.plan import Plan
from fedlp_jax.pruning.layers import LayerTable
from fedlp_jax.pruning.submodels import Submodel
from fedlp_jax.types import Array, PyTree, Variables, wide


class WeightedSum(NamedTuple):
    """What clients add up. Summable over clients, chunks, levels and devices."""

    total: Variables  # sum of a_k m_{k,l} d_k, in float32 or wider
    total_weight: Array  # f32[L], sum of a_k m_{k,l}
    cohort_weight: Array  # f32[], sum of a_k
    # Sum of a_k m_{k,l} over the clients that hold the entry, a tree like `total`; () = levels hold
    # layers whole, so that it is `total_weight`.
    entry_weight: PyTree = ()


def masked_mean() -> Reducer:
    """Mean of each layer over the clients that sent it (FedLP, arXiv:2303.06360)."""
    return _mean(_weighted, _sent_weight)._replace(sender_mean=True)


def cohort_mean() -> Reducer:
    """Mean over the whole cohort; a layer not sent counts as no change (CoCoFL, Alg. 2)."""

    def sensitivity(keep: Array, chosen: Array) -> Array:
        del chosen
        return jnp.ones_like(keep[0])

    return _mean(_weighted, _cohort_weight, sensitivity)


def inverse_probability() -> Reducer:
    """Mean over the cohort of updates divided by their keep probability (Horvitz-Thompson).

    Only parameters are reweighted. Batch statistics take the masked mean, because a reweighted
    variance can become negative.
    """

    def prepare(
        update: Variables, upload: UploadInfo, counted: Array, layers: LayerTable
    ) -> WeightedSum:
        # A layer that was sent had keep > 0; where keep is 0 the mask is 0 and so is the quotient.
        keep = jnp.where(upload.keep > 0, upload.keep, 1.0)
        factor = jnp.where(upload.mask > 0, upload.mask / keep, 0.0)
        plain = _weighted(update, upload, counted, layers)
        scaled = _weighted(
            {"params": update["params"]},
            upload._replace(mask=factor),
            counted,
            layers.only("params"),
        )
        return plain._replace(total={**plain.total, **scaled.total})

    def sensitivity(keep: Array, chosen: Array) -> Array:
        sent = chosen & (keep > 0)
        return jnp.where(sent, 1.0 / jnp.where(sent, keep, 1.0), 0.0).max(axis=0)

    return _mean(prepare, _cohort_weight, sensitivity)


def _mean(
    prepare: Callable[[Variables, UploadInfo, Array, LayerTable], WeightedSum],
    divisor: Callable[[WeightedSum], PyTree],
    sensitivity: Callable[[Array, Array], Array] | None = None,
) -> Reducer:
    """A mean whose parameters are divided by `divisor(sum)`, `f32[L]` or a tree of weights."""

    def reduce(received: Received, state: PyTree, layers: LayerTable, plan: Plan) -> Aggregate:
        del state, plan
        summed: WeightedSum = received.contributions
        update = _divided(summed, divisor(summed), layers)
        gate = jax.tree.map(lambda weight: weight > 0, _sent_weight(summed))
        return Aggregate(update, gate, summed.cohort_weight)

    return Reducer(lambda variables: (), prepare, _embed, reduce, sensitivity=sensitivity)


def _weighted(
    update: Variables, upload: UploadInfo, counted: Array, layers: LayerTable
) -> WeightedSum:
    """ONE client's term of each sum."""
    factor = jnp.where(counted, upload.weight * upload.mask, jnp.zeros_like(upload.mask))

    def scaled(delta: Array, a: Array) -> Array:
        # `where`, not a product with 0: the update of a client that does not count may be NaN.
        delta = delta.astype(wide(delta.dtype))
        return jnp.where(counted, delta * a.astype(delta.dtype), jnp.zeros_like(delta))

    total = jax.tree.map(scaled, update, layers.expand(factor))
    return WeightedSum(
        total, factor, jnp.where(counted, upload.weight, jnp.zeros_like(upload.weight))
    )


def _embed(
    contribution: WeightedSum, level: Submodel, variables: Variables, layers: LayerTable
) -> WeightedSum:
    like = jax.tree.map(lambda x: x.astype(wide(x.dtype)), variables)  # the dtype of sums
    total = contribution.total
    embedded = contribution._replace(total=level.embed(total, like))
    if not level.slices:
        return embedded
    weight = layers.expand(contribution.total_weight)
    held = jax.tree.map(lambda x, a: jnp.full_like(x, a.astype(x.dtype)), total, weight)
    return embedded._replace(entry_weight=level.embed(held, like))


def _sent_weight(contributions: WeightedSum) -> PyTree:
    """The weight of those who sent a layer, `f32[L]`, or an entry."""
    no_slices = isinstance(contributions.entry_weight, tuple)
    return contributions.total_weight if no_slices else contributions.entry_weight


def _cohort_weight(contributions: WeightedSum) -> Array:
    return jnp.full_like(contributions.total_weight, contributions.cohort_weight)


def _divided(contributions: WeightedSum, divisor: PyTree, layers: LayerTable) -> Variables:
    """The sums of parameters divided by `divisor`, those of statistics by the senders' weight."""

    def mean(total: Array, weight: Array) -> Array:
        weight = weight.astype(total.dtype)
        return jnp.where(
            weight > 0,
            total / jnp.where(weight > 0, weight, jnp.ones_like(weight)),
            jnp.zeros_like(total),
        )

    sent = _sent_weight(contributions)
    of_params, of_statistics = layers.expand(divisor), layers.expand(sent)
    return {
        name: jax.tree.map(mean, tree, (of_params if name == "params" else of_statistics)[name])
        for name, tree in contributions.total.items()
    }
