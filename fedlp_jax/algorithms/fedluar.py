"""FedLUAR: layers that hardly move reuse their last update (Kim et al., NeurIPS 2025).

arXiv:2503.11146. In every round the server draws some layers, those whose updates are small for
their weights most often. Nobody sends them, and the server applies their last update again:

    s_l = |d_l| / |x_l|                                  of the round in which layer l was last sent
    R drawn without replacement, P(l) proportional to 1 / s_l         as many layers as are recycled
    x'_l = x_l + d_l                           d_l the mean over the cohort, for l in R its last one

The paper divides by the weights of the newest model; here a layer that rests keeps its score. A
layer that no client of the cohort holds, or whose senders are lost, stands still.

Here a layer is a module, and rests with its bias and its norm. The authors draw single weights and
always send biases and norms: `layers="by_tensor"`. Batch statistics of a layer that rests stand
still, because a variance that moves on by itself may turn negative.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedlp_jax.aggregation.server import Reduced, ServerRule
from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.compose import compose
from fedlp_jax.errors import FedLPError
from fedlp_jax.pruning import masks
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import NO_TERMS, PyTree, Terms, Variables


def fedluar(
    task: Task,
    *,
    recycled: int,
    client_optimizer: optax.GradientTransformation,
    **settings: Any,
) -> Algorithm:
    """FedLUAR: in every round some layers are not sent, and their last update is applied again.

    Clients train all that they hold, and uploads shrink. The server keeps a second model of last
    updates. An update that is applied again passes through `server_optimizer` as a new one would,
    momentum included.

    Args:
      task: what is learnt.
      recycled: layers that nobody sends in a round, the delta of the paper; 0 is FedAvg. See
        `masks.recycling`.
      client_optimizer: any optax transform.
      **settings: as in `compose` (epochs, batch_size, server_optimizer, layers, ...), but not
        `privacy` and no upload with error feedback.

    Raises:
      FedLPError: `recycled` below 0, privacy, or error feedback; (before anything compiles) so
        many layers that nothing is left to send.
    """
    if settings.get("privacy") is not None:
        raise FedLPError(
            "fedluar applies updates again, which privacy counts once; use fl.fedlp_homo with "
            "privacy."
        )
    return compose(
        task,
        client_optimizer=client_optimizer,
        policy=masks.recycling(recycled),
        server_rule=ServerRule(_first, lambda terms: NO_TERMS, _again, moves_resting=True),
        **settings,
    )


def _first(params: PyTree, clients: int) -> Terms:
    del clients
    return Terms({}, {"last": jax.tree.map(jnp.zeros_like, params)})


def _again(terms: Terms, sent: Reduced) -> tuple[Variables, Terms]:
    last = jax.tree.map(
        lambda d, old, senders: jnp.where(senders > 0, d, old),
        sent.update["params"],
        terms.trees["last"],
        sent.senders,
    )
    return {**sent.update, "params": last}, Terms({}, {"last": last})
