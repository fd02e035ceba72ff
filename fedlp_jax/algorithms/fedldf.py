"""FedLDF: of each layer, only those who moved it most send it (Wang et al., arXiv:2404.08324).

Clients train the whole model and report how far each layer moved, `|x_{k,l} - x_l|`. For each layer
the server asks the n clients with the largest numbers for it, and averages those by their examples.
"""

from __future__ import annotations

from typing import Any

import optax

from fedlp_jax.aggregation.divergence import largest
from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.compose import compose
from fedlp_jax.errors import FedLPError
from fedlp_jax.tasks.task import Task


def fedldf(
    task: Task,
    *,
    senders: int,
    client_optimizer: optax.GradientTransformation,
    **settings: Any,
) -> Algorithm:
    """FedLDF: for each layer, the clients whose update of it is largest send it.

    `x'_l = x_l + sum_{k in T_l} a_k (x_{k,l} - x_l) / sum_{k in T_l} a_k`, T_l the `senders`
    clients with the largest `|x_{k,l} - x_l|`. The report, 4 bytes a layer, is booked with the
    upload. A run keeps the updates of all clients of a round side by side.

    Args:
      task: what is learnt.
      senders: n, clients that send a layer, at most those of a cohort; all of them is FedAvg.
      client_optimizer: any optax transform.
      **settings: as in `compose` (epochs, batch_size, server_optimizer, ...), but not `aggregator`,
        `upload` or `privacy`.

    Raises:
      FedLPError: senders below 1, or compressed uploads.
    """
    if settings.get("upload") is not None:
        raise FedLPError(
            "fedldf chooses who sends a layer after the training, so what a compressed upload "
            "leaves behind is unknown to the client; omit upload, or use fl.fedlp_q."
        )
    return compose(task, client_optimizer=client_optimizer, aggregator=largest(senders), **settings)
