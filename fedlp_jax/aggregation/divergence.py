"""The clients that moved a layer most send it: layer divergence feedback (arXiv:2404.08324)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax.aggregation.reducer import Reducer, UploadInfo
from fedlp_jax.aggregation.robust import by_layer
from fedlp_jax.errors import check_number
from fedlp_jax.pruning.layers import LayerTable, squared_norms
from fedlp_jax.types import Array, PyTree, Variables


def largest(clients: int) -> Reducer:
    """The weighted mean, for each layer, of the updates with the largest norms.

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

    def select(
        stacked: Variables,
        uploads: UploadInfo,
        counted: Array,
        client: Array,
        state: PyTree,
        layers: LayerTable,
    ) -> Array:
        able = (uploads.mask > 0) & counted[:, None] & (client >= 0)[:, None]
        squares = jax.vmap(lambda update: squared_norms(update, layers))(stacked["params"])
        norms = jnp.where(able, squares, -jnp.inf)
        ids = jnp.broadcast_to(client[:, None], norms.shape)
        place = jnp.argsort(jnp.lexsort((ids, -norms), axis=0), axis=0).astype(jnp.int32)
        return (able & (place < state)).astype(jnp.float32)

    reducer = by_layer(mean, np.int32(clients))
    return reducer._replace(select=select, senders=clients)
