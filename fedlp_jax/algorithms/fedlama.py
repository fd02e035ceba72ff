"""FedLAMA: layers in which clients agree are averaged less often (Lee, Zhang and Avestimehr, 2023).

AAAI 2023, arXiv:2110.10302. A cohort stays for a block of phi rounds. In these, the server averages
some layers in every round and the others, on which clients differ little for their size, in the
last round of the block alone. Between two averages of a layer each client trains its own.

Here a layer is a module, and is averaged with its bias, its norm and its batch statistics. The
authors choose among single weights and average biases and norms in every round:
`layers="by_tensor"`. They begin to choose after their sixth round, this does after the first block.
"""

from __future__ import annotations

from typing import Any

import optax

from fedlp_jax.aggregation.divergence import with_squares
from fedlp_jax.aggregation.means import masked_mean
from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.compose import compose
from fedlp_jax.errors import FedLPError
from fedlp_jax.pruning import masks
from fedlp_jax.tasks.task import Task


def fedlama(
    task: Task,
    *,
    interval: int,
    client_optimizer: optax.GradientTransformation,
    **settings: Any,
) -> Algorithm:
    """FedLAMA: layers in which clients agree are averaged once in `interval` rounds only.

    `x'_l = sum a_k w_{k,l} / sum a_k` in the rounds that average layer l, after which clients train
    on from `x'_l`, and from their own `w_{k,l}` otherwise; see `masks.lazy`. Both uploads and
    downloads shrink. The server's model is whole after the last round of a block; in between, it
    has lazy layers of the block before, as has `result.variables` unless `interval` divides the
    rounds. `KeepBest` and `EarlyStop` see such mixtures too, unless it divides `eval_every`.

    Args:
      task: what is learnt.
      interval: phi, rounds in which a drawn cohort stays and a lazy layer is averaged once; 1 is
        FedAvg. A cohort that is a function of the round should stay for as long.
      client_optimizer: any optax transform.
      **settings: as in `compose` (epochs, batch_size, server_optimizer, layers, ...), but not
        `aggregator`, nor what needs the server's model on every client (clip, upload, privacy,
        asynchrony).

    Raises:
      FedLPError: an interval below 1, or one of these settings.
    """
    if settings.get("aggregator") is not None:
        raise FedLPError(
            "fedlama measures how far clients are from their masked mean, so that is its "
            "aggregator; omit aggregator, or use it with fl.fedlp_homo."
        )
    return compose(
        task,
        client_optimizer=client_optimizer,
        policy=masks.lazy(interval),
        **settings | {"aggregator": with_squares(masked_mean())},
    )
