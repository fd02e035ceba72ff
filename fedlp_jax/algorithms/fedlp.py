"""FedLP: federated layer-wise pruning (Zhu et al., ICC 2023, arXiv:2303.06360)."""

from __future__ import annotations

from typing import Any, Literal

import optax

from fedlp_jax.aggregation.uploads import quantize
from fedlp_jax.algorithms import presets
from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.compose import compose
from fedlp_jax.pruning import masks
from fedlp_jax.pruning.submodels import Depths, Heads, by_depth
from fedlp_jax.tasks.task import Task


def fedlp_homo(
    task: Task,
    *,
    keep: masks.Keep,
    client_optimizer: optax.GradientTransformation,
    download: float | None = None,
    **settings: Any,
) -> Algorithm:
    """FedLP-Homo: every client trains the whole model and sends each layer with probability keep.

    `x'_l = x_l + sum_{k in U_l} a_k (x_{k,l} - x_l) / sum_{k in U_l} a_k`, U_l the clients that
    sent layer l. A layer nobody sent keeps its value. Uploads shrink; computation does not.

    Args:
      task: what is learnt.
      keep: the layer-preserving rate p: a number, one per client or per layer, a mapping from layer
        name to p, or a function of the round; see `masks.bernoulli`.
      client_optimizer: any optax transform.
      download: the probability with which a client receives each layer; it trains on with its own
        of the others, see `masks.receive`. None = it receives all and keeps none.
      **settings: as in `compose` (epochs, batch_size, behaviour, aggregator, layers, ...).

    Raises:
      FedLPError: a probability outside [0, 1], or `download` with a setting that needs the server's
        model on every client (clip, upload, privacy, asynchrony, ...).
    """
    policy = masks.bernoulli(keep)
    if download is not None:
        policy = masks.receive(download, policy)
    return compose(task, client_optimizer=client_optimizer, policy=policy, **settings)


def fedlp_q(
    task: Task,
    *,
    keep: masks.Keep,
    levels: int,
    client_optimizer: optax.GradientTransformation,
    **settings: Any,
) -> Algorithm:
    """FedLP-Q: FedLP-Homo whose layers are quantised before they are sent (Entropy 25(8), 1205).

    Zhu et al., 2023. `x'_l = x_l + sum_{k in U_l} a_k Q(x_{k,l} - x_l) / sum_{k in U_l} a_k`; Q is
    random and unbiased, has one L2 norm for each layer, and codes its levels by Elias.

    Args:
      task: what is learnt.
      keep: the layer-preserving rate p, as in `fedlp_homo`.
      levels: s, the levels between 0 and the norm of a layer; see `uploads.quantize`.
      client_optimizer: any optax transform.
      **settings: as in `compose` (epochs, batch_size, behaviour, aggregator, layers, ...).
    """
    return compose(
        task,
        client_optimizer=client_optimizer,
        policy=masks.bernoulli(keep),
        upload=quantize(levels),
        **settings,
    )


def fedlp_hetero(
    task: Task,
    *,
    depths: Depths,
    client_optimizer: optax.GradientTransformation,
    behaviour: Literal["layerwise", "reference"] = "layerwise",
    heads: Heads | None = None,
    keep: masks.Keep = 1.0,
    **settings: Any,
) -> Algorithm:
    """FedLP-Hetero: each client holds a prefix of the network's layers and an exit head.

    A client of depth c downloads, trains and sends only its prefix, and runs the shallow network.
    Each layer is averaged over the clients that hold it, by the equation of `fedlp_homo`.

    Args:
      task: what is learnt; its module has depths (`fedlp_jax.tasks.flax_adapter.network`).
      depths: "uniform", a flag 1 to G, G probabilities, or K depths; see
        `submodel.assign_depths`.
      client_optimizer: any optax transform.
      behaviour: as in `compose`; it also sets `heads` where that is None.
      heads: "persist" (layerwise), "reset_to_init" (reference: as in the authors' code) or
        "shared"; see `submodel.by_depth`.
      keep: the probability with which a layer of the prefix is sent, as in FedLP-Homo.
      **settings: as in `compose`.
    """
    if heads is None:
        heads = presets.named(behaviour).heads
    return compose(
        task,
        client_optimizer=client_optimizer,
        submodels=by_depth(depths, heads),
        policy=masks.bernoulli(keep),
        behaviour=behaviour,
        **settings,
    )
