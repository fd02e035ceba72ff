"""FjORD: ordered dropout over the widths that clients can afford (arXiv:2102.13451).

Horvath et al., NeurIPS 2021. A client of largest width p_max holds the first `ceil(p_max C)` of the
C units of every hidden layer. Slices are nested, so the mean of the paper, slice by slice over the
clients with p_max >= p, is the mean of each entry over the clients that hold it.

Every batch trains a width p that is drawn from those up to p_max. Units beyond p have weights 0, so
a batch costs as much as at p_max, in time and in the ledger. Left out: batch statistics of their
own for each p, and distillation from p_max to p.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optax

from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.compose import compose
from fedlp_jax.pruning import masks
from fedlp_jax.pruning.widths import by_width
from fedlp_jax.tasks.task import Task


def fjord(
    task: Task,
    *,
    widths: float | Sequence[float] = (0.2, 0.4, 0.6, 0.8, 1.0),
    shares: Sequence[float] | None = None,
    per_batch: bool = True,
    client_optimizer: optax.GradientTransformation,
    keep: masks.Keep = 1.0,
    **settings: Any,
) -> Algorithm:
    """FjORD: each batch trains the first units of every layer, up to the client's largest width.

    The mean is that of `heterofl`, and a_k the examples of client k by default.

    Args:
      task: what is learnt; its module has widths (`fedlp_jax.tasks.flax_adapter.network`).
      widths: p_max: one rate in (0, 1], several that clients draw from, or K, one per client.
      shares: the probability of each of several rates; None = all alike.
      per_batch: draw a width for each batch; False = p_max in all of them.
      client_optimizer: any optax transform.
      keep: the probability with which a layer is sent, as in `fedlp_homo`.
      **settings: as in `compose` (epochs, batch_size, weighting, ...).
    """
    return compose(
        task,
        client_optimizer=client_optimizer,
        submodels=by_width(widths, shares, per_batch=per_batch),
        policy=masks.bernoulli(keep),
        **settings,
    )
