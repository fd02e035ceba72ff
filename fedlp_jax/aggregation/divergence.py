"""How far the updates of a layer are apart, and means that depend on it or report it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax.aggregation.pipeline import joined, layers_of_payload
from fedlp_jax.aggregation.reducer import Aggregate, Received, Reducer, UploadInfo
from fedlp_jax.aggregation.robust import by_layer
from fedlp_jax.errors import check_number
from fedlp_jax.execution.plan import Plan
from fedlp_jax.pruning.layers import LayerTable, squared_norms
from fedlp_jax.pruning.submodels import Submodel
from fedlp_jax.types import Array, PyTree, Terms, Variables, wide


def largest(clients: int) -> Reducer:
    """The weighted mean, for each layer, of the updates with the largest norms (arXiv:2404.08324).

    `x'_l = x_l + sum_{k in T_l} a_k (x_{k,l} - x_l) / sum_{k in T_l} a_k`, T_l the n clients with
    the largest `|x_{k,l} - x_l|` over the layer's parameters; of equal ones, those of lower id.
    Every client reports its norms first, one number for each layer. Needs the memory of C models.

    Args:
      clients: n, from 1; all that arrive, if those are fewer.

    Raises:
      FedLPError: a number below 1.
    """
    clients = check_number("clients of a layer", clients, ge=1, integer=True)

    def mean(rows: Array, votes: Array, number: PyTree) -> Array:
        del number
        votes = votes.astype(rows.dtype)
        total = votes.sum()
        return (votes[:, None] * rows).sum(axis=0) / jnp.where(total > 0, total, 1.0)

    def select(received: Received, state: PyTree, layers: LayerTable) -> Array:
        ids, counted = received.client[:, None], received.counted[:, None]
        able = (received.uploads.mask > 0) & counted & (ids >= 0)
        params = received.contributions["params"]
        squares = jax.vmap(lambda update: squared_norms(update, layers))(params)
        norms = jnp.where(able, squares, -jnp.inf)
        ids = jnp.broadcast_to(ids, norms.shape)
        place = jnp.argsort(jnp.lexsort((ids, -norms), axis=0), axis=0).astype(jnp.int32)
        return (able & (place < state)).astype(jnp.float32)

    reducer = by_layer(mean, np.int32(clients))
    return reducer._replace(select=select, sender_mean=True, senders=clients)


def with_squares(mean: Reducer) -> Reducer:
    """The mean of updates, and that of their squared norms: `mean |d_k|^2 - |mean d_k|^2` is left.

    Args:
      mean: a masked mean. The tree "squares" of the aggregate's extras has a number for each
        parameter. The server computes it from the updates, so that nobody sends it.
    """

    def squared(update: Variables) -> Variables:
        params = update["params"]
        norms = jax.tree.map(lambda x: jnp.square(x.astype(wide(x.dtype))).sum(), params)
        return joined(update, Terms({}, {"squares": norms}))

    def indexed(layers: LayerTable) -> LayerTable:
        return layers_of_payload(layers, joined({}, Terms({}, {"squares": {}})))

    def prepare(
        update: Variables, upload: UploadInfo, counted: Array, layers: LayerTable
    ) -> PyTree:
        return mean.prepare(squared(update), upload, counted, indexed(layers))

    def embed(
        contribution: PyTree, level: Submodel, variables: Variables, layers: LayerTable
    ) -> PyTree:
        return mean.embed(contribution, level, squared(variables), indexed(layers))

    def reduce(received: Received, state: PyTree, layers: LayerTable, plan: Plan) -> Aggregate:
        return mean.reduce(received, state, indexed(layers), plan)

    return mean._replace(prepare=prepare, embed=embed, reduce=reduce)
