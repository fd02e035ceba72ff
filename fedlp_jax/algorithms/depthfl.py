"""DepthFL: clients of different depths train all exits they hold (ICLR 2023).

Kim et al., "Depthwise federated learning for heterogeneous clients". A client of depth d minimises

    sum_{i <= d} [CE_i + consistency / (d - 1) sum_{j <= d, j != i} KL(p_j || p_i)]

p_i the class probabilities of exit i, constants where they come first in KL. The exit heads lie on
the server, and each layer is averaged over the clients that hold it.

With `alpha` clients and server are those of FedDyn, layer by layer, as in the paper.

Left out is the test of all exits as one ensemble. Each exit runs the layers below it by itself, so
a step of depth d takes about as long as the steps of depths 1 to d, though XLA may compute once
what they share. The ledger's MACs count once what exits share.
"""

from __future__ import annotations

from typing import Any, Literal

import optax

from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.compose import compose
from fedlp_jax.algorithms.feddyn import feddyn
from fedlp_jax.errors import FedLPError, check_number
from fedlp_jax.pruning import masks
from fedlp_jax.pruning.submodels import Depths, by_depth
from fedlp_jax.tasks.exits import with_all_exits
from fedlp_jax.tasks.task import Task


def depthfl(
    task: Task,
    *,
    depths: Depths,
    consistency: float = 0.0,
    ramp: int = 0,
    alpha: float = 0.0,
    client_optimizer: optax.GradientTransformation,
    weighting: Literal["examples", "uniform"] = "uniform",
    keep: masks.Keep = 1.0,
    **settings: Any,
) -> Algorithm:
    """DepthFL: each client trains a prefix of the model and every exit in it.

    The mean is that of `inclusivefl`. If all clients have the full depth and consistency and alpha
    are 0, this is FedAvg of one network with all exits, whose losses are added; if all have depth 1
    and alpha is 0, it is `inclusivefl`.

    Args:
      task: what is learnt; its module has depths (`fedlp_jax.tasks.flax_adapter.network`).
      depths: as in `fedlp_hetero`.
      consistency: weight of the divergence between exits, from 0; above 0 for classification only.
      ramp: rounds R in which it rises, as exp(-5 (1 - round / R)^2); 300 in the authors' code, and
        0 = none.
      alpha: strength of FedDyn's regulariser, .1 in the paper, see `feddyn`; 0 = without it.
      client_optimizer: any optax transform.
      weighting: a_k; by default all clients count alike, as in the authors' code.
      keep: the probability with which a layer is sent, as in `fedlp_homo`.
      **settings: as in `compose` (epochs, batch_size, layers, ...).

    Raises:
      FedLPError: a negative number, a consistency above 0 for a task that is no classification, or
        what `feddyn` refuses where alpha is above 0.
    """
    consistency = check_number("consistency", consistency, ge=0)
    ramp = check_number("ramp", ramp, ge=0, integer=True)
    alpha = check_number("alpha", alpha, ge=0)
    if ramp and not consistency:
        raise FedLPError(f"ramp={ramp} raises consistency, which is 0; set it, or omit ramp.")
    exits = with_all_exits(task, consistency, ramp)
    common: dict[str, Any] = {
        "client_optimizer": client_optimizer,
        "submodels": by_depth(depths, "shared"),
        "weighting": weighting,
    }
    if alpha:
        return feddyn(exits, alpha=alpha, keep=keep, **common, **settings)
    return compose(exits, policy=masks.bernoulli(keep), **common, **settings)
