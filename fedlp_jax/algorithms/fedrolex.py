"""FedRolex: clients of different widths train a window that rolls over the model.

Alam et al., NeurIPS 2022, "FedRolex: model-heterogeneous federated learning with rolling sub-model
extraction". As HeteroFL, but in round t (from 0) a client of rate r holds, of C channels, those
from t mod C on, `ceil(r C)` of them with wrap-around. So all of a model is trained that is wider
than every client.

The window moves forward, as in the paper; in the authors' code it moves backward. As there, updates
count alike by default. Rates are drawn once, not in every round. Batch statistics are cut and
averaged like parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import optax

from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.compose import compose
from fedlp_jax.pruning import masks
from fedlp_jax.pruning.widths import by_width, rolling
from fedlp_jax.tasks.task import Task


def fedrolex(
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
    """FedRolex: each client trains a window of every layer's channels, which rolls on every round.

    The mean is that of `heterofl`.

    Args:
      task: what is learnt; its module has widths (`fedlp_jax.tasks.flax_adapter.network`).
      widths: one rate in (0, 1], several that clients draw from, or K, one per client.
      shares: the probability of each of several rates; None = all alike.
      client_optimizer: any optax transform.
      rescale: divide the outputs of cut layers by r in training.
      own_classes: as in `heterofl`; so does the authors' code.
      weighting: a_k.
      keep: the probability with which a layer is sent, as in `fedlp_homo`.
      **settings: as in `compose` (epochs, batch_size, layers, ...).
    """
    return compose(
        task,
        client_optimizer=client_optimizer,
        submodels=by_width(widths, shares, rolling, rescale=rescale),
        policy=masks.bernoulli(keep),
        weighting=weighting,
        own_classes=own_classes,
        **settings,
    )
