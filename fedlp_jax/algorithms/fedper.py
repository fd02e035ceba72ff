"""FedPer: a shared body under personal heads (Arivazhagan et al., arXiv:1912.00818).

A client trains body and head together, sends the body and keeps the head. The server averages the
bodies as in FedAvg; it never sees a head.
"""

from __future__ import annotations

from typing import Any

import optax

from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.compose import compose
from fedlp_jax.pruning import masks
from fedlp_jax.pruning import submodels as submodel
from fedlp_jax.pruning.submodels import Submodels
from fedlp_jax.tasks.task import Task


def fedper(
    task: Task,
    *,
    head: str,
    client_optimizer: optax.GradientTransformation,
    keep: masks.Keep = 1.0,
    submodels: Submodels | None = None,
    **settings: Any,
) -> Algorithm:
    """FedPer: clients share the body and keep a head of their own.

    `x' = x + sum a_k (x_k - x) / sum a_k` for the body alone. Runs report
    `test_accuracy_personal`, see `fl.submodel.personal`.

    Args:
      task: what is learnt.
      head: a regular expression for the head's variables, such as "fc2".
      client_optimizer: any optax transform.
      keep: the probability with which a layer of the body is sent, as in `fedlp_homo`.
      submodels: which part of the model each client holds; None = the whole.
      **settings: as in `compose` (epochs, batch_size, server_optimizer, ...).

    Raises:
      FedLPError: (before anything compiles) a head that is no part of the model, or all of it.
    """
    return compose(
        task,
        client_optimizer=client_optimizer,
        submodels=submodel.personal(head, submodels),
        policy=masks.bernoulli(keep),
        **settings,
    )
