"""LG-FedAvg: personal bodies under a shared head (Liang et al., arXiv:2001.01523).

A client trains its body and the head together, sends the head and keeps the body: local
representations, global classifier. The authors begin with a model that FedAvg has trained, which
`fl.simulate(variables=...)` takes whole.
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


def lg_fedavg(
    task: Task,
    *,
    head: str,
    client_optimizer: optax.GradientTransformation,
    keep: masks.Keep = 1.0,
    submodels: Submodels | None = None,
    **settings: Any,
) -> Algorithm:
    """LG-FedAvg: clients share the head and keep a body of their own.

    `x' = x + sum a_k (x_k - x) / sum a_k` for the head alone; the authors weigh all clients alike
    (`weighting="uniform"`). Runs report `test_accuracy_personal`, see `fl.submodel.personal`.

    Args:
      task: what is learnt.
      head: a regular expression for the variables that are shared, such as "fc2"; the authors share
        the last two layers.
      client_optimizer: any optax transform.
      keep: the probability with which a layer of the head is sent, as in `fedlp_homo`.
      submodels: which part of the model each client holds; None = the whole.
      **settings: as in `compose` (epochs, batch_size, server_optimizer, ...).

    Raises:
      FedLPError: (before anything compiles) a head that is no part of the model, or all of it.
    """
    return compose(
        task,
        client_optimizer=client_optimizer,
        submodels=submodel.shared(head, submodels),
        policy=masks.bernoulli(keep),
        **settings,
    )
