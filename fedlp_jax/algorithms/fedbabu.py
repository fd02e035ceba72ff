"""FedBABU: a body under a head that nobody trains (Oh et al., ICLR 2022, arXiv:2106.06042).

All clients hold the head that was drawn first. In federation they train the body alone, so that its
features fit one fixed classifier; the head is fine-tuned per client afterwards.
"""

from __future__ import annotations

from typing import Any

import optax

from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.compose import compose
from fedlp_jax.pruning import masks
from fedlp_jax.tasks.task import Task


def fedbabu(
    task: Task,
    *,
    head: str,
    client_optimizer: optax.GradientTransformation,
    keep: masks.Keep = 1.0,
    **settings: Any,
) -> Algorithm:
    """FedBABU: clients train and share the body; the head stays as it was first drawn.

    `x' = x + sum a_k (x_k - x) / sum a_k` for the body; the head neither moves nor travels.
    `test_accuracy` is that of the model before any fine-tuning, which is not part of the run.

    Args:
      task: what is learnt.
      head: a regular expression for the head's variables, such as "fc2"; whole layers.
      client_optimizer: any optax transform.
      keep: the probability with which a layer of the body is sent, as in `fedlp_homo`.
      **settings: as in `compose` (epochs, batch_size, submodels, server_optimizer, ...).

    Raises:
      FedLPError: (before anything compiles) a head that is no layer, all layers, or part of one.
    """
    policy = masks.fixed(head, masks.bernoulli(keep))
    return compose(task, client_optimizer=client_optimizer, policy=policy, **settings)
