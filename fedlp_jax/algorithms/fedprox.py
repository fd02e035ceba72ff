"""FedProx: a proximal term that holds clients near the server's model (arXiv:1812.06127).

Li et al., MLSys 2020. Client k minimises `f_k(w) + mu / 2 |w - x|^2`, so each step has the gradient

    g(w) + mu (w - x)

and the server averages as in FedAvg, which is mu = 0. A private head is not held: the server has
none.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from fedlp_jax.aggregation.server import ServerRule
from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.compose import compose
from fedlp_jax.clients.local_training import LocalTraining, Step, on_common
from fedlp_jax.errors import check_number
from fedlp_jax.pruning import masks
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import Array, PyTree, Terms


def fedprox(
    task: Task,
    *,
    mu: float,
    client_optimizer: optax.GradientTransformation,
    keep: masks.Keep = 1.0,
    **settings: Any,
) -> Algorithm:
    """FedProx: FedAvg whose clients are pulled back to where they started.

    Args:
      task: what is learnt.
      mu: strength of the pull, from 0; its authors tried .001 to 1. Another one compiles nothing.
      client_optimizer: any optax transform.
      keep: the probability with which a layer is sent, as in `fedlp_homo`.
      **settings: as in `compose` (epochs, batch_size, submodels, server_optimizer, ...).

    Raises:
      FedLPError: a negative mu.
    """
    mu = check_number("mu", mu, ge=0)
    return compose(
        task,
        client_optimizer=client_optimizer,
        policy=masks.bernoulli(keep),
        local_training=LocalTraining(gradient=_proximal),
        server_rule=ServerRule(
            lambda params, clients: Terms({"mu": jnp.float32(mu)}, {}), lambda terms: terms
        ),
        **settings,
    )


def _proximal(step: Step, terms: Terms, state: PyTree) -> PyTree:
    del state
    mu = terms.numbers["mu"]

    def pulled(g: Array, x: Array, w: Array) -> Array:
        return g + mu * (w - x)

    return on_common(pulled, step.gradient, step.start, step.params)
