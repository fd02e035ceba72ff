"""FedNova: clients that take more steps do not count for more (arXiv:2007.07481).

Wang et al., NeurIPS 2020. S steps of SGD with momentum rho add up to S gradients with weights of
sum a, which grows faster than linearly:

    a = sum_{s=1..S} (1 - rho^s) / (1 - rho)                a = S without momentum
    x' = x + (sum p_k a_k) sum p_k (x_k - x) / a_k          p_k = n_k / sum n_k

A client sends its normalised update and the number a_k. The sums go over the clients that sent a
layer. Where all a_k are equal, as with `steps=`, a round is one of FedAvg.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedlp_jax.aggregation.server import Reduced, ServerRule
from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.compose import compose
from fedlp_jax.clients.local_training import LocalTraining, Trained
from fedlp_jax.clients.sgd import as_sgd
from fedlp_jax.pruning import masks
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import NO_TERMS, Array, PyTree, Terms, Variables


def fednova(
    task: Task,
    *,
    client_optimizer: optax.GradientTransformation,
    keep: masks.Keep = 1.0,
    **settings: Any,
) -> Algorithm:
    """FedNova: each client's update is divided by the steps that it took, and scaled back.

    Args:
      task: what is learnt.
      client_optimizer: `optax.sgd(rate)` or `optax.sgd(rate, momentum)`.
      keep: the probability with which a layer is sent, as in `fedlp_homo`.
      **settings: as in `compose` (epochs, batch_size, submodels, server_optimizer, ...).

    Raises:
      FedLPError: another client optimizer or aggregator.
    """
    sgd = as_sgd(client_optimizer, "fednova", momentum=True)

    def finish(trained: Trained, terms: Terms, own: PyTree) -> tuple[Variables, Terms, PyTree]:
        del terms
        a = jnp.maximum(_weights(trained.steps.astype(jnp.float32), sgd.momentum), 1.0)
        params = jax.tree.map(lambda d: d / a, trained.update["params"])
        return {**trained.update, "params": params}, Terms({"a": a}, {}), own

    return compose(
        task,
        client_optimizer=client_optimizer,
        policy=masks.bernoulli(keep),
        local_training=LocalTraining(finish=finish, sgd=sgd),
        server_rule=ServerRule(
            lambda params, clients: NO_TERMS,
            lambda terms: terms,
            _scaled,
            needs_sender_mean=True,
        ),
        **settings,
    )


def _weights(steps: Array, momentum: float) -> Array:
    """`f32[]`, the sum of the weights of all gradients."""
    if momentum == 0:
        return steps
    return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)


def _scaled(terms: Terms, sent: Reduced) -> tuple[Variables, Terms]:
    scaled = jax.tree.map(lambda d, a: d * a, sent.update["params"], sent.extras.numbers["a"])
    return {**sent.update, "params": scaled}, terms
