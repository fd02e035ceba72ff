"""FedLP whose layers are drawn before the training: what will not be sent is not trained.

The mask of FedLP-Homo (arXiv:2303.06360) comes first, and the client freezes what it leaves out. It
still computes the whole forward pass, as CoCoFL does for its frozen blocks (Pfeiffer et al., TMLR
2023), but no gradient of a frozen layer.
"""

from __future__ import annotations

from typing import Any

import optax

from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.compose import compose
from fedlp_jax.pruning import masks
from fedlp_jax.tasks.task import Task


def freeze(
    task: Task,
    *,
    keep: masks.Keep,
    client_optimizer: optax.GradientTransformation,
    **settings: Any,
) -> Algorithm:
    """FedLP-Homo that draws its mask first: a client trains and sends each layer with chance keep.

    `x'_l = x_l + sum_{k in U_l} a_k (x_{k,l} - x_l) / sum_{k in U_l} a_k`, where client k takes
    steps in its layers `{l: k in U_l}` alone. Unlike FedLP-Homo it saves computation: on CPUs, with
    `Plan(width=1)`, the wall time of a round falls; vmapped clients take as long as before.

    Args:
      task: what is learnt.
      keep: the layer-preserving rate p, as in `fedlp_homo`.
      client_optimizer: any optax transform; its state of a frozen layer stands still.
      **settings: as in `compose` (epochs, batch_size, behaviour, aggregator, layers, ...).
    """
    policy = masks.freeze(masks.bernoulli(keep))
    return compose(task, client_optimizer=client_optimizer, policy=policy, **settings)
