"""The server's step: an optax transform fed with the aggregated update as a gradient.

Before it, an algorithm may have a `ServerRule` of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedlp_jax.clients.local_training import optimizer_step
from fedlp_jax.pruning.layers import LayerTable
from fedlp_jax.types import Array, PyTree, Terms, Variables


class Reduced(NamedTuple):
    """What a cohort sent, reduced to one, as a server rule sees it."""

    update: Variables  # the aggregate, of any float dtype; 0 in a layer that nobody sent
    # What was sent with the update, averaged as the update's layers are, with the weights of the
    # clients that sent the layer: a number becomes a tree of scalars, one for each parameter.
    extras: Terms
    senders: PyTree  # f32[] for each parameter: clients that sent its layer and count


class ServerRule(NamedTuple):
    """What an algorithm keeps on the server, lets clients read, and makes of the aggregate.

    The engine sees to the rest: a layer that nobody sent keeps its value, unless it rests and the
    rule `moves_resting`, and its part of every tree; a run that halted keeps all; and the server
    optimizer gets the update that `step` returns.
    """

    init: Callable[[PyTree, int], Terms]  # (params, K) -> terms before the first round
    # terms -> what clients read; its trees are downloaded with the layers that a client receives
    broadcast: Callable[[Terms], Terms]
    # (terms, what the cohort sent) -> (update, terms); None = the update as it is, fixed terms
    step: Callable[[Terms, Reduced], tuple[Variables, Terms]] | None = None
    # The update of `step` also moves layers that clients of the cohort hold, but that the mask
    # policy let none of them send.
    moves_resting: bool = False
    needs_sender_mean: bool = False  # `step` is defined for no other mean
    # `step` adds up the clients' moves, and each client its own: uploads may lose nothing for good
    whole_moves: bool = False


def gated(terms: Terms, old: Terms, opened: PyTree) -> Terms:
    """The new terms where a layer was sent, the old ones elsewhere.

    Args:
      terms: after the rule's step.
      old: before it.
      opened: `bool[]` for each parameter.
    """

    def kept(new: PyTree, before: PyTree) -> PyTree:
        return jax.tree.map(lambda s, n, o: jnp.where(s, n, o), opened, new, before)

    return Terms(terms.numbers, {name: kept(x, old.trees[name]) for name, x in terms.trees.items()})


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
