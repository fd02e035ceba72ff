"""FedCM: momentum of the server in every step of a client (Xu et al., 2021, arXiv:2106.10874).

The server keeps the mean gradient Delta of the last round, zero at first, and clients read it:

    y <- y - eta (alpha g(y) + (1 - alpha) Delta)      each of S_k steps, from y = x
    x' = x + mean (y_k - x)
    Delta' = mean (x - y_k) / (eta mean S_k)           the mean step of the round, by its rate

In the paper all clients take as many steps, and the server has a rate of its own, here that of
`server_optimizer`. Where S_k differ, Delta' is the mean over all steps that were taken, for which a
client sends eta S_k. Means go over the clients that sent a layer, with their weights. A layer that
nobody sent keeps its Delta; a private head has none and takes plain steps. alpha = 1 is FedAvg.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedlp_jax.aggregation.server import Reduced, ServerRule
from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.compose import compose
from fedlp_jax.clients.local_training import LocalTraining, Step, Trained, on_common
from fedlp_jax.clients.sgd import as_sgd
from fedlp_jax.errors import check_number
from fedlp_jax.pruning import masks
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import PyTree, Terms, Variables


def fedcm(
    task: Task,
    *,
    alpha: float,
    client_optimizer: optax.GradientTransformation,
    keep: masks.Keep = 1.0,
    **settings: Any,
) -> Algorithm:
    """FedCM: clients step along their gradient and the mean gradient of the last round.

    A client receives Delta with the model, twice the download of FedAvg, and keeps nothing.

    Args:
      task: what is learnt.
      alpha: share of the client's own gradient, in (0, 1]. Another one compiles nothing.
      client_optimizer: plain `optax.sgd(rate)`; Delta is a move divided by its rate.
      keep: the probability with which a layer is sent, as in `fedlp_homo`.
      **settings: as in `compose` (epochs, batch_size, submodels, server_optimizer, ...).

    Raises:
      FedLPError: an alpha out of range, or another client optimizer or aggregator.
    """
    alpha = check_number("alpha", alpha, gt=0, le=1)
    sgd = as_sgd(client_optimizer, "fedcm", momentum=False)

    def first(params: PyTree, clients: int) -> Terms:
        del clients
        return Terms({"alpha": jnp.float32(alpha)}, {"delta": jax.tree.map(jnp.zeros_like, params)})

    def finish(trained: Trained, terms: Terms, own: PyTree) -> tuple[Variables, Terms, PyTree]:
        del terms
        moved = trained.steps.astype(jnp.float32) * (sgd.rate * trained.scale)  # eta S_k
        return trained.update, Terms({"moved": moved}, {}), own

    return compose(
        task,
        client_optimizer=client_optimizer,
        policy=masks.bernoulli(keep),
        local_training=LocalTraining(gradient=_mixed, finish=finish, sgd=sgd),
        server_rule=ServerRule(first, lambda terms: terms, _mean_gradient, needs_sender_mean=True),
        **settings,
    )


def _mixed(step: Step, terms: Terms, own: PyTree) -> PyTree:
    del own
    alpha = terms.numbers["alpha"]
    return on_common(
        lambda g, delta: alpha * g + (1 - alpha) * delta, step.gradient, terms.trees["delta"]
    )


def _mean_gradient(terms: Terms, sent: Reduced) -> tuple[Variables, Terms]:
    delta = jax.tree.map(
        # d is 0 where nobody sent the layer, or no sender took a step.
        lambda d, moved: -d / jnp.where(moved > 0, moved, 1),
        sent.update["params"],
        sent.extras.numbers["moved"],
    )
    return sent.update, Terms(terms.numbers, {"delta": delta})
