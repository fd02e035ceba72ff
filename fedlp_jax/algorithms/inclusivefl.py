"""InclusiveFL: clients of different depths, each with the exit at its own end (KDD 2022).

Liu et al., "No One Left Behind". A client of depth d trains the first d blocks by the loss of exit
d alone, and each layer is averaged over the clients that hold it. It is FedLP-Hetero whose exit
heads lie on the server, where all clients of one depth share theirs.

The momentum distillation of the paper, from the deeper blocks of large models into the last block
of small ones, is left out.
"""

from __future__ import annotations

from typing import Any, Literal

import optax

from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.compose import compose
from fedlp_jax.pruning import masks
from fedlp_jax.pruning.submodels import Depths, by_depth
from fedlp_jax.tasks.task import Task


def inclusivefl(
    task: Task,
    *,
    depths: Depths,
    client_optimizer: optax.GradientTransformation,
    weighting: Literal["examples", "uniform"] = "uniform",
    keep: masks.Keep = 1.0,
    **settings: Any,
) -> Algorithm:
    """InclusiveFL without its distillation: each client trains a prefix and its last exit.

    `x'_l = x_l + sum_{k in U_l} a_k (x_{k,l} - x_l) / sum_{k in U_l} a_k`, U_l the clients that
    hold layer l and sent it. If all clients have the full depth, this is FedAvg, and the other
    exits stay as they were drawn.

    Args:
      task: what is learnt; its module has depths (`fedlp_jax.tasks.flax_adapter.network`).
      depths: as in `fedlp_hetero`.
      client_optimizer: any optax transform.
      weighting: a_k; by default all clients count alike.
      keep: the probability with which a layer is sent, as in `fedlp_homo`.
      **settings: as in `compose` (epochs, batch_size, layers, ...).
    """
    return compose(
        task,
        client_optimizer=client_optimizer,
        submodels=by_depth(depths, "shared"),
        policy=masks.bernoulli(keep),
        weighting=weighting,
        **settings,
    )
