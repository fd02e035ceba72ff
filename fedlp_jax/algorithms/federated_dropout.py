"""Federated Dropout: clients train a random part of the model (arXiv:1812.07210).

Caldas et al., 2018. In every round each client gets `ceil(r C)` of the C units of each hidden
layer, drawn without replacement, as a smaller dense network.

Layers with the same number of units lose the same ones, so that a shortcut may add the outputs of
two; in the paper each layer is drawn by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optax

from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.compose import compose
from fedlp_jax.pruning import masks
from fedlp_jax.pruning.widths import by_width, drawn
from fedlp_jax.tasks.task import Task


def federated_dropout(
    task: Task,
    *,
    widths: float | Sequence[float],
    shares: Sequence[float] | None = None,
    client_optimizer: optax.GradientTransformation,
    rescale: bool = False,
    keep: masks.Keep = 1.0,
    **settings: Any,
) -> Algorithm:
    """Federated Dropout: each client trains units drawn anew in every round.

    The mean is that of `heterofl`, and a_k the examples of client k by default.

    Args:
      task: what is learnt; its module has widths (`fedlp_jax.tasks.flax_adapter.network`).
      widths: one rate in (0, 1], several that clients draw from, or K, one per client.
      shares: the probability of each of several rates; None = all alike.
      client_optimizer: any optax transform.
      rescale: divide the outputs of cut layers by r in training, as dropout does.
      keep: the probability with which a layer is sent, as in `fedlp_homo`.
      **settings: as in `compose` (epochs, batch_size, weighting, ...).
    """
    return compose(
        task,
        client_optimizer=client_optimizer,
        submodels=by_width(widths, shares, drawn, rescale=rescale),
        policy=masks.bernoulli(keep),
        **settings,
    )
