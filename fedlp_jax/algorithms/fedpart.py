"""FedPart: one group of layers at a time (Wang et al., NeurIPS 2024, arXiv:2410.11559).

Rounds of the whole model alternate with rounds in which all clients train and send the same group
of layers, from shallow to deep:

    5 rounds: everything | 2 rounds: group 1 | 2 rounds: group 2 | ... | and again from the start
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import optax

from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.compose import compose
from fedlp_jax.pruning import masks
from fedlp_jax.tasks.task import Task


def fedpart(
    task: Task,
    *,
    client_optimizer: optax.GradientTransformation,
    groups: Sequence[Sequence[str]] | None = None,
    full_rounds: int = 5,
    group_rounds: int = 2,
    download: Literal["model", "group"] = "model",
    **settings: Any,
) -> Algorithm:
    """FedPart: clients train and send one group of layers at a time, the same in all of them.

    `x'_l = x_l + sum a_k (x_{k,l} - x_l) / sum a_k` for the layers l of the round's group; the
    others rest. On CPUs, with `Plan(width=1)`, frozen layers cost no backward pass.

    Args:
      task: what is learnt.
      client_optimizer: any optax transform; its authors take Adam.
      groups: names of the layers of each group, shallow to deep; None = each layer alone, in the
        order in which a forward pass first uses them.
      full_rounds: rounds of the whole model at the start of a cycle.
      group_rounds: rounds of each group.
      download: what a client receives in a round of a group: the model, or the group alone, which
        is enough where every client takes part in every round, as in the paper.
      **settings: as in `compose` (epochs, batch_size, aggregator, layers, ...).

    Raises:
      FedLPError: a number out of range; (before anything compiles) groups that are not the layers.
    """
    policy = masks.in_turn(groups, full_rounds, group_rounds, download)
    return compose(task, client_optimizer=client_optimizer, policy=policy, **settings)
