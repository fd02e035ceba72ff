"""FedDyn: a dynamic regulariser that makes clients agree in the limit (arXiv:2111.04263).

Acar et al., ICLR 2021. Client k keeps a gradient h_k and the server a sum h, all zero at first:

    client   minimises f_k(w) - <h_k, w> + alpha / 2 |w - x|^2      and then h_k -= alpha (x_k - x)
    server   h -= alpha / K sum_{k in U} (x_k - x)                  x' = mean_{U} x_k - h / alpha

U are the clients of the cohort that sent a layer, K all. Kept here are u_k = h_k / alpha and
u = -h / alpha, sums of moves that do not depend on alpha: the gradient of a step is then
`g(w) + alpha (w - x - u_k)`. At alpha = 0 clients train as in FedAvg; the server still adds u.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from fedlp_jax.aggregation.server import Reduced, ServerRule
from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.compose import compose
from fedlp_jax.clients.local_training import LocalTraining, Step, Trained, on_common
from fedlp_jax.errors import check_choice, check_number
from fedlp_jax.pruning import masks
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import NO_TERMS, Array, PyTree, Terms, Variables


def feddyn(
    task: Task,
    *,
    alpha: float,
    client_optimizer: optax.GradientTransformation,
    keep: masks.Keep = 1.0,
    weighting: Literal["uniform"] = "uniform",
    **settings: Any,
) -> Algorithm:
    """FedDyn: clients remember how far they moved. The traffic is that of FedAvg.

    On the devices lies a model per client of the population.

    Args:
      task: what is learnt.
      alpha: strength of the regulariser, from 0; another one compiles nothing.
      client_optimizer: any optax transform.
      keep: the probability with which a layer is sent, as in `fedlp_homo`. A layer that a client
        does not send keeps its u_k.
      weighting: all clients count alike.
      **settings: as in `compose` (epochs, batch_size, submodels, ...).

    Raises:
      FedLPError: a negative alpha, another weighting or aggregator, `clip`, or an upload that loses
        a part of the update for good.
    """
    alpha = check_number("alpha", alpha, ge=0)
    check_choice("feddyn's weighting", weighting, ("uniform",))

    def first(params: PyTree, clients: int) -> Terms:
        numbers = {"alpha": jnp.float32(alpha), "clients": jnp.float32(clients)}
        return Terms(numbers, {"u": _zeros(params)})

    return compose(
        task,
        client_optimizer=client_optimizer,
        policy=masks.bernoulli(keep),
        local_training=LocalTraining(_zeros, _regularised, _moved),
        server_rule=ServerRule(
            first,
            lambda terms: Terms(terms.numbers, {}),
            _corrected,
            needs_sender_mean=True,
            whole_moves=True,
        ),
        weighting=weighting,
        **settings,
    )


def _zeros(params: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)


def _regularised(step: Step, terms: Terms, own: PyTree) -> PyTree:
    alpha = terms.numbers["alpha"]

    def rule(g: Array, x: Array, w: Array, u: Array) -> Array:
        return g + alpha * (w - x - u)

    return on_common(rule, step.gradient, step.start, step.params, own)


def _moved(trained: Trained, terms: Terms, own: PyTree) -> tuple[Variables, Terms, PyTree]:
    del terms
    moves = trained.update["params"]
    own = jax.tree.map(lambda u, d, sent: jnp.where(sent, u - d, u), own, moves, trained.sent)
    return trained.update, NO_TERMS, own


def _corrected(terms: Terms, sent: Reduced) -> tuple[Variables, Terms]:
    population, moves = terms.numbers["clients"], sent.update["params"]
    u = jax.tree.map(lambda u, d, n: u + n * d / population, terms.trees["u"], moves, sent.senders)
    update = {**sent.update, "params": jax.tree.map(jnp.add, moves, u)}
    return update, Terms(terms.numbers, {"u": u})
