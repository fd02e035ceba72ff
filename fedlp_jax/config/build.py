"""A checked configuration -> the arguments of `fl.simulate`."""

from __future__ import annotations

from functools import partial
from typing import Any

from fedlp_jax.config import draws as reference
from fedlp_jax.config.schema import Config
from fedlp_jax.data.dataset import Dataset
from fedlp_jax.data.partition import Partition
from fedlp_jax.errors import FedLPError


def build(config: Config) -> dict[str, Any]:
    """Loads the data and builds everything else, on the host.

    Returns:
      The arguments of `simulate`.

    Raises:
      FedLPError: the data cannot be read, or these settings do not fit together.
    """
    data = config.data.build()
    optimizer = config.algorithm.client_optimizer
    draws = reference.draw(config, data) if config.draws == "reference" else None
    make: Any = config.algorithm.build
    if draws is not None:
        make = partial(reference.algorithm_with, config, draws)
    algorithm = make(
        task=config.task.build(module=config.model.build(num_classes=_outputs(config, data))),
        # The optimizer gets the rate 1, and the rate becomes `client_schedule`, a factor on its
        # updates: then the rate is an argument of the compiled round, and another one compiles
        # nothing. The rate is the last factor in all these optimizers, so the bits are the same.
        client_optimizer=optimizer.build(learning_rate=1.0),
        client_schedule=optimizer.learning_rate,
    )
    return {
        "algorithm": algorithm,
        "data": data,
        "clients": build_partition(config, data) if draws is None else draws.partition,
        "rounds": config.rounds,
        "cohort": config.cohort if draws is None else draws.cohort,
        "seed": config.seed,
        "eval_every": config.eval_every,
        "faults": None if config.faults is None else config.faults.build(),
        "early_stop": None if config.early_stop is None else config.early_stop.build(),
        "plan": config.plan.build(),
    }


def _outputs(config: Config, data: Dataset) -> int:
    """The outputs of the model: one for each class or token, or one for each target."""
    if data.num_classes and config.task.name in ("classification", "next_token"):
        return data.num_classes
    targets = data.train.labels
    return 1 if targets.ndim == 1 else int(targets.shape[-1])


def build_partition(config: Config, data: Dataset) -> Partition:
    """Deals the training examples to clients, by the run's seed unless the section has its own.

    Raises:
      FedLPError: impossible settings, or `natural` for data without client ids.
    """
    if config.partition.name == "natural":
        if data.client is None:
            raise FedLPError(
                f"partition.name is 'natural', but the data set '{data.name}' has no client ids; "
                "choose iid, dirichlet, shards, mixed or quantity."
            )
        return config.partition.build(labels=data.train.labels, clients=data.client)
    seed = config.seed if config.partition.seed is None else config.partition.seed
    return config.partition.build(labels=data.train.labels, seed=seed)
