"""FedExP: the server goes further where clients disagree (Jhunjhunwala et al., ICLR 2023).

arXiv:2301.09604. With d_k = x_k - x the update of client k and p_k = a_k / sum a_k its weight:

    d = sum p_k d_k
    eta = max(1, sum p_k |d_k|^2 / (2 (|d|^2 + epsilon)))
    x' = x + eta d                                             eta = 1 is FedAvg

The paper has p_k = 1 / M; its authors' code (github.com/Divyansh03/FedExP) weighs both means by
examples, as `weighting` does here. One eta is computed for the whole model. Under layer masks both
norms are sums over the layers that were sent, each with its own mean over the clients that sent it.
A layer with one sender adds as much to one as to the other, which pulls eta to its floor of 1.

Iterates oscillate where eta is large. The paper therefore reports the mean of the last two models;
a run here reports the last.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedlp_jax.aggregation.divergence import with_squares
from fedlp_jax.aggregation.means import masked_mean
from fedlp_jax.aggregation.server import Reduced, ServerRule
from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.compose import compose
from fedlp_jax.errors import FedLPError, check_number
from fedlp_jax.pruning import masks
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import NO_TERMS, Terms, Variables


def fedexp(
    task: Task,
    *,
    client_optimizer: optax.GradientTransformation,
    epsilon: float = 1e-3,
    keep: masks.Keep = 1.0,
    **settings: Any,
) -> Algorithm:
    """FedExP: a server step that is the longer, the more the updates of clients cancel out.

    The server computes its step from the updates, so the traffic is that of FedAvg.

    Args:
      task: what is learnt.
      client_optimizer: any optax transform.
      epsilon: keeps the step short where the mean update vanishes, above 0; a large one is FedAvg.
        The authors' code has 1e-3 for CIFAR and .1 for EMNIST, times the clients of the cohort.
        Another one compiles nothing.
      keep: the probability with which a layer is sent, as in `fedlp_homo`.
      **settings: as in `compose` (epochs, batch_size, server_optimizer, ...), but not `aggregator`,
        widths or privacy.

    Raises:
      FedLPError: an epsilon of 0 or below, or one of these settings.
    """
    epsilon = check_number("epsilon", epsilon, gt=0)
    submodels = settings.get("submodels")
    refused = {
        "aggregator": settings.get("aggregator") is not None,
        "privacy": settings.get("privacy") is not None,
        "submodels of several widths": submodels is not None and submodels.slices,
    }
    found = [name for name, given in refused.items() if given]
    if found:
        raise FedLPError(
            "fedexp takes its step from the norms of updates and of their masked mean, so it has "
            f"no {found[0]} of the user's choice; omit it, or use it with fl.fedlp_homo."
        )
    return compose(
        task,
        client_optimizer=client_optimizer,
        policy=masks.bernoulli(keep),
        server_rule=ServerRule(
            lambda params, clients: Terms({"epsilon": jnp.float32(epsilon)}, {}),
            lambda terms: NO_TERMS,
            _extrapolated,
        ),
        **settings | {"aggregator": with_squares(masked_mean())},
    )


def _extrapolated(terms: Terms, sent: Reduced) -> tuple[Variables, Terms]:
    update = sent.update["params"]
    of_clients = jax.tree.leaves(sent.extras.trees["squares"])
    of_mean = [jnp.square(d).sum() for d in jax.tree.leaves(update)]
    eta = jnp.maximum(1, sum(of_clients) / (2 * (sum(of_mean) + terms.numbers["epsilon"])))
    return {**sent.update, "params": jax.tree.map(lambda d: eta * d, update)}, terms
