"""FedAvg: federated averaging (McMahan et al., AISTATS 2017, arXiv:1602.05629)."""

from __future__ import annotations

from typing import Any

import optax

from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.compose import compose
from fedlp_jax.pruning import masks
from fedlp_jax.tasks.task import Task


def fedavg(
    task: Task, *, client_optimizer: optax.GradientTransformation, **settings: Any
) -> Algorithm:
    """FedAvg: every client trains and sends the whole model.

    `x' = x + sum n_k (x_k - x) / sum n_k`, n_k the examples of client k. The compiled program is
    that of `fedlp_homo` with every layer kept.

    Args:
      task: what is learnt.
      client_optimizer: any optax transform.
      **settings: as in `compose` (epochs, batch_size, behaviour, server_optimizer, ...).
    """
    return compose(task, client_optimizer=client_optimizer, policy=masks.full(), **settings)
