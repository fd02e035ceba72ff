"""compose: an algorithm from a task, submodels, masks, optimizers and an aggregator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import optax

from fedlp_jax import aggregate, masks, submodel
from fedlp_jax.algorithms.algorithm import Algorithm
from fedlp_jax.algorithms.round import Composition
from fedlp_jax.client import LocalWork, check_work, local_steps
from fedlp_jax.layers import LayerRule
from fedlp_jax.submodel import Submodel, Submodels
from fedlp_jax.task import Task
from fedlp_jax.types import Array, Batch, FedLPError, Variables, check_choice

AGGREGATORS: dict[str, Callable[[], aggregate.Aggregator]] = {
    "masked_mean": aggregate.masked_mean,
    "cohort_mean": aggregate.cohort_mean,
    "inverse_probability": aggregate.inverse_probability,
}


def compose(
    task: Task,
    *,
    client_optimizer: optax.GradientTransformation,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 32,
    submodels: Submodels | None = None,
    policy: masks.MaskPolicy | None = None,
    aggregator: str | aggregate.Aggregator = "masked_mean",
    server_optimizer: optax.GradientTransformation | None = None,
    weighting: Literal["examples", "uniform"] = "examples",
    layers: LayerRule = "by_module",
    client_schedule: float | Callable[[Array], Any] | None = None,
    train_loss: Literal["examples", "batches"] = "examples",
) -> Algorithm:
    """Builds an algorithm. Every named one is a short call of this.

    A round: draw the layer masks; train every client of the cohort at its level; sum the masked,
    weighted updates; divide; step the server (`fedlp_jax.algorithms.round`).

    Args:
      task: from `fl.classification`, or your own.
      client_optimizer: any optax transform, new for each client and round.
      epochs: passes over a client's data; 1 if neither this nor `steps` is given.
      steps: optimizer steps in place of epochs.
      batch_size: B; the last batch of an epoch may be smaller.
      submodels: who holds what; default `submodel.whole()`.
      policy: which layers are sent; default `masks.full()`.
      aggregator: "masked_mean", "cohort_mean", "inverse_probability", or your own.
      server_optimizer: optax transform fed with minus the aggregate; default: add it as it is.
      weighting: "examples" weighs clients by their number of examples, "uniform" alike.
      layers: "by_module", "by_tensor", or a mapping from regular expression to layer name.
      client_schedule: factor on the client optimizer's updates: a number, which is then an argument
        of the compiled round rather than a constant in it, or a function of the round (`i32[]`).
      train_loss: "examples" reports the mean over all examples seen, "batches" the mean over
        clients of the mean over steps of the batch's loss.

    Raises:
      FedLPError: a setting that is out of range or unknown.
    """
    if epochs is None and steps is None:
        epochs = 1
    _check_parts(task, client_optimizer, server_optimizer)
    work = check_work(LocalWork(batch_size, epochs, steps))
    check_choice("weighting", weighting, ("examples", "uniform"))
    check_choice("train_loss", train_loss, ("examples", "batches"))
    if isinstance(aggregator, str):
        check_choice("aggregator", aggregator, tuple(AGGREGATORS))
        aggregator = AGGREGATORS[aggregator]()
    submodels = submodels or submodel.whole()
    composition = Composition(
        task,
        work,
        client_optimizer,
        submodels,
        policy or masks.full(),
        aggregator,
        server_optimizer or optax.sgd(1.0),
        by_examples=weighting == "examples",
        layers=layers,
        client_schedule=client_schedule,
    )

    def levels(variables: Variables, example: Batch) -> tuple[Submodel, ...]:
        return submodels.levels(task, variables, example)

    return Algorithm(
        task,
        init=composition.init,
        round=composition.round,
        layers=layers,
        local_steps=lambda sizes: local_steps(sizes, work),
        levels=levels,
        assign=lambda root, clients: submodels.assign(task, root, clients),
        persist=submodels.persist,
        shared_heads=submodels.shared_heads,
        train_loss=train_loss,
    )


def _check_parts(task: Any, client_optimizer: Any, server_optimizer: Any) -> None:
    if not isinstance(task, Task):
        raise FedLPError(
            f"task is a {type(task).__name__}; wrap a model as fl.classification(model)."
        )
    for name, optimizer in (("client", client_optimizer), ("server", server_optimizer)):
        if optimizer is None and name == "server":
            continue
        if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
            raise FedLPError(
                f"{name}_optimizer={optimizer!r} is no optax transform; give one such as "
                "optax.sgd(0.1)."
            )
