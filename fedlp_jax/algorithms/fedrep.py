"""FedRep: first the head, then the body (Collins et al., ICML 2021, arXiv:2102.07078).

A client has a head of its own, as in FedPer. In each round it first trains the head under the body
it received, and then the body under that head:

    head_epochs epochs: h <- h - eta grad_h f(x, h)      then epochs epochs: x <- x - eta grad_x f

and sends the body alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.compose import compose
from fedlp_jax.clients.local_training import LocalTraining
from fedlp_jax.errors import FedLPError, check_number
from fedlp_jax.nn.gated import Gate
from fedlp_jax.pruning import masks
from fedlp_jax.pruning import submodels as submodel
from fedlp_jax.pruning.submodels import Submodel, Submodels
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import Array, Batch, Variables


def fedrep(
    task: Task,
    *,
    head: str,
    client_optimizer: optax.GradientTransformation,
    head_epochs: int = 10,
    epochs: int = 1,
    keep: masks.Keep = 1.0,
    submodels: Submodels | None = None,
    **settings: Any,
) -> Algorithm:
    """FedRep: clients train a head of their own first, and then the shared body under it.

    `x' = x + sum a_k (x_k - x) / sum a_k` for the body alone. Runs report
    `test_accuracy_personal`, see `fl.submodel.personal`.

    Args:
      task: what is learnt.
      head: a regular expression for the head's variables, such as "fc2". The exit heads that
        shallow clients keep for themselves belong to it.
      client_optimizer: any optax transform; its state of what a phase freezes stands still.
      head_epochs: passes over a client's data that train the head; its authors take 10.
      epochs: passes that train the body, after those.
      keep: the probability with which a layer of the body is sent, as in `fedlp_homo`.
      submodels: which part of the model each client holds; None = the whole.
      **settings: as in `compose` (batch_size, server_optimizer, ...), but not `steps`.

    Raises:
      FedLPError: epochs below 1; (before anything compiles) a head that is no part of the model or
        of a depth, or all of it.
    """
    head_epochs = check_number("head_epochs", head_epochs, ge=1, integer=True)
    total = head_epochs + check_number("epochs", epochs, ge=1, integer=True)

    kept = submodel.personal(head, submodels)

    def levels(task: Task, variables: Variables, example: Batch) -> tuple[Submodel, ...]:
        found = kept.levels(task, variables, example)
        bare = [level.name for level in found if not level.private_shapes.get("params")]
        if bare:
            raise FedLPError(
                f"fedrep trains the head first, but head={head!r} finds nothing in "
                f"{', '.join(bare)}; name the heads of all depths in it, such as 'fc3|exit'."
            )
        return found

    def trains(number: Array, steps: Array) -> Callable[[str, bool], Gate]:
        first = number < steps // total * head_epochs
        rest = ~first
        return lambda path, private: first if private else rest

    return compose(
        task,
        client_optimizer=client_optimizer,
        epochs=total,
        submodels=kept._replace(levels=levels),
        policy=masks.bernoulli(keep),
        local_training=LocalTraining(trains=trains),
        **settings,
    )
