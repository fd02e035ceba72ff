"""HeteroFL: clients of different widths train parts of one model (arXiv:2010.01264).

Diao et al., ICLR 2021. A client of rate r holds the first `ceil(r C)` of the C channels of every
hidden layer, and each entry is averaged over the clients that hold it.

Four points differ from the paper. Batch statistics are cut and averaged like parameters, where the
paper normalises by the batch and estimates them again before a test ("static BN"). The rows of the
last layer are averaged over all who sent it, not over those who have examples of the row's class.
Rates are drawn once, not in every round. All test numbers are those of the whole model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import optax

from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.compose import compose
from fedlp_jax.pruning import masks
from fedlp_jax.pruning.widths import by_width
from fedlp_jax.tasks.task import Task


def heterofl(
    task: Task,
    *,
    widths: float | Sequence[float],
    shares: Sequence[float] | None = None,
    client_optimizer: optax.GradientTransformation,
    rescale: bool = True,
    own_classes: bool = True,
    weighting: Literal["examples", "uniform"] = "uniform",
    keep: masks.Keep = 1.0,
    **settings: Any,
) -> Algorithm:
    """HeteroFL: each client trains the first channels of every layer, as a smaller dense network.

    `x'_e = x_e + sum_{k in U_e} a_k (x_{k,e} - x_e) / sum_{k in U_e} a_k` for every entry e, U_e
    the clients that hold and sent it. An entry nobody sent keeps its value.

    Args:
      task: what is learnt; its module has widths (`fedlp_jax.tasks.flax_adapter.network`).
      widths: one rate in (0, 1], several that clients draw from, or K, one per client. In the paper
        1, .5, .25, .125 and .0625.
      shares: the probability of each of several rates; None = all alike.
      client_optimizer: any optax transform.
      rescale: divide the outputs of cut layers by r in training, the paper's Scaler.
      own_classes: leave the logits of classes without examples out of a client's loss, as the paper
        does (`compose`); False for a task that is no classification.
      weighting: a_k; in the paper all clients count alike.
      keep: the probability with which a layer is sent, as in `fedlp_homo`.
      **settings: as in `compose` (epochs, batch_size, layers, ...).
    """
    return compose(
        task,
        client_optimizer=client_optimizer,
        submodels=by_width(widths, shares, rescale=rescale),
        policy=masks.bernoulli(keep),
        weighting=weighting,
        own_classes=own_classes,
        **settings,
    )
