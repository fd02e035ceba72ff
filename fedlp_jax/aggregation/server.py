"""The server's step: an optax transform fed with the aggregated update as a gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from fedlp_jax.clients.local_training import optimizer_step
from fedlp_jax.pruning.layers import LayerTable
from fedlp_jax.types import Array, PyTree, Variables


def server_step(
    optimizer: optax.GradientTransformation,
    state: PyTree,
    variables: Variables,
    update: Variables,
    gate: Array,
    layers: LayerTable,
) -> tuple[Variables, PyTree]:
    """Applies the aggregated update (FedOpt, arXiv:2003.00295, with `-update` as the gradient).

    A closed layer keeps its value and its optimizer state bit for bit, even under momentum and
    weight decay. Batch statistics take the plain update, because an adaptive optimizer could make a
    variance negative.

    Args:
      optimizer: any optax transform; `optax.sgd(1.0)` adds the update as it is.
      state: its state.
      variables: the server's.
      update: tree like `variables`, of any float dtype.
      gate: `bool[L]`, False = the layer is closed: nobody sent it.
      layers: the layer table.

    Returns:
      The new variables and optimizer state.

    Raises:
      FedLPError: the optimizer needs a loss, as `optax.polyak_sgd` and line searches do.
    """
    opened = layers.expand(gate)
    # Short floats were summed in float32; the update returns to the dtype of the model.
    update = jax.tree.map(lambda u, x: u.astype(x.dtype), update, variables)
    gradient = jax.tree.map(jnp.negative, update["params"])
    with jax.numpy_dtype_promotion("standard"):
        steps, new_state = optimizer_step("server", optimizer, gradient, state, variables["params"])
        params = optax.apply_updates(variables["params"], steps)
    moved = {
        name: params if name == "params" else jax.tree.map(jnp.add, tree, update[name])
        for name, tree in variables.items()
    }
    new = jax.tree.map(lambda s, n, o: jnp.where(s, n, o), opened, moved, variables)
    # Leaves of the optimizer's state move with their layer; counters always move.
    moves = optax.tree_map_params(
        optimizer,
        lambda _, s: s,
        new_state,
        opened["params"],
        transform_non_params=lambda _: jnp.ones((), bool),
    )
    return new, jax.tree.map(lambda s, n, o: jnp.where(s, n, o), moves, new_state, state)
