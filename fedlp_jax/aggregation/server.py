"""The server's step: an optax transform fed with the aggregated update as a gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from fedlp_jax.clients.optimizer import updates_of
from fedlp_jax.pruning.layers import LayerTable
from fedlp_jax.types import Array, PyTree, Variables


def server_step(
    optimizer: optax.GradientTransformation,
    state: PyTree,
    variables: Variables,
    update: Variables,
    weight: Array,
    layers: LayerTable,
) -> tuple[Variables, PyTree]:
    """Applies the aggregated update (FedOpt, arXiv:2003.00295, with `-update` as the gradient).

    A layer that nobody sent keeps its value and its optimizer state bit for bit, also under
    momentum and weight decay. Batch statistics take the plain update: an adaptive optimizer could
    turn a variance negative.

    Args:
      optimizer: any optax transform; `optax.sgd(1.0)` adds the update as it is.
      state: its state.
      variables: the server's.
      update: tree like `variables`, from the aggregator, of any float dtype.
      weight: `f32[L]`, total weight of the clients that sent each layer.
      layers: the layer table.

    Returns:
      The new variables and optimizer state.

    Raises:
      FedLPError: the optimizer cannot do without a loss, as `optax.polyak_sgd` and line searches.
    """
    sent = layers.expand(weight > 0)
    # Short floats are summed in float32; the mean is again of what the model computes in.
    update = jax.tree.map(lambda u, x: u.astype(x.dtype), update, variables)
    gradient = jax.tree.map(jnp.negative, update["params"])
    with jax.numpy_dtype_promotion("standard"):
        steps, new_state = updates_of(optimizer, gradient, state, variables["params"], "server")
        params = optax.apply_updates(variables["params"], steps)
    moved = {
        name: params if name == "params" else jax.tree.map(jnp.add, tree, update[name])
        for name, tree in variables.items()
    }
    new = jax.tree.map(lambda s, n, o: jnp.where(s, n, o), sent, moved, variables)
    # Which leaves of the optimizer's state belong to a layer that was sent; counters always move.
    moves = optax.tree_map_params(
        optimizer,
        lambda _, s: s,
        new_state,
        sent["params"],
        transform_non_params=lambda _: jnp.ones((), bool),
    )
    return new, jax.tree.map(lambda s, n, o: jnp.where(s, n, o), moves, new_state, state)
