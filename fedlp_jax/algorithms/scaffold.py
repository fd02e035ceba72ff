"""SCAFFOLD: control variates against drift (Karimireddy et al., ICML 2020, arXiv:1910.06378).

Algorithm 1 with option II. Each client k keeps a control variate c_k and the server keeps c, all
zero at first, c the mean of c_k over the population:

    y <- y - eta (g(y) - c_k + c)                        each of S steps, from y = x
    c_k' = c_k - c + (x - y) / (S eta)                   option II: the mean gradient of the round
    x' = x + mean (y_k - x),   c' = c + |U| / K mean (c_k' - c_k)

The means go over the clients U of the cohort that sent a layer. A layer that a client does not send
keeps its c_k, so that c stays the mean, and all clients count alike, whatever their examples.
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
from fedlp_jax.clients.sgd import as_sgd
from fedlp_jax.errors import check_choice
from fedlp_jax.pruning import masks
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import PyTree, Terms, Variables


def scaffold(
    task: Task,
    *,
    client_optimizer: optax.GradientTransformation,
    keep: masks.Keep = 1.0,
    weighting: Literal["uniform"] = "uniform",
    **settings: Any,
) -> Algorithm:
    """SCAFFOLD: clients correct each step by what the others' gradients were.

    A client receives c with the model and sends c_k' - c_k with its update: twice the traffic of
    FedAvg. On the devices lies a model per client of the population.

    Args:
      task: what is learnt.
      client_optimizer: plain `optax.sgd(rate)`; option II divides by its rate.
      keep: the probability with which a layer is sent, as in `fedlp_homo`.
      weighting: all clients count alike.
      **settings: as in `compose` (epochs, batch_size, server_optimizer, ...).

    Raises:
      FedLPError: another client optimizer, weighting or aggregator.
    """
    check_choice("scaffold's weighting", weighting, ("uniform",))
    sgd = as_sgd(client_optimizer, "scaffold", momentum=False)
    return compose(
        task,
        client_optimizer=client_optimizer,
        policy=masks.bernoulli(keep),
        local_training=LocalTraining(_zeros, _corrected, _option_ii(sgd.rate), sgd=sgd),
        server_rule=ServerRule(_first, lambda t: Terms({}, t.trees), _mean, needs_sender_mean=True),
        weighting=weighting,
        **settings,
    )


def _zeros(params: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)


def _first(params: PyTree, clients: int) -> Terms:
    return Terms({"clients": jnp.float32(clients)}, {"c": _zeros(params)})


def _corrected(step: Step, terms: Terms, own: PyTree) -> PyTree:
    return on_common(lambda g, c_k, c: g - c_k + c, step.gradient, own, terms.trees["c"])


def _option_ii(rate: float) -> Any:
    def finish(trained: Trained, terms: Terms, own: PyTree) -> tuple[Variables, Terms, PyTree]:
        whole = trained.steps.astype(jnp.float32) * (rate * trained.scale)  # S eta
        divisor = jnp.where(whole > 0, whole, 1.0)  # without examples there are no steps
        change = jax.tree.map(
            lambda d, c, sent: jnp.where(sent & (whole > 0), -d / divisor - c, 0.0),
            trained.update["params"],
            terms.trees["c"],
            trained.sent,
        )
        return trained.update, Terms({}, {"change": change}), jax.tree.map(jnp.add, own, change)

    return finish


def _mean(terms: Terms, sent: Reduced) -> tuple[Variables, Terms]:
    population, change = terms.numbers["clients"], sent.extras.trees["change"]
    c = jax.tree.map(lambda c, d, n: c + n * d / population, terms.trees["c"], change, sent.senders)
    return sent.update, Terms(terms.numbers, {"c": c})
