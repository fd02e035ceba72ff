"""A checked configuration -> the arguments of `fl.simulate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fedlp_jax.aggregation.reducer import Reducer
from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.reference_draws import ReferenceDraws
from fedlp_jax.config import draws as reference
from fedlp_jax.config import own
from fedlp_jax.config.schema import Config
from fedlp_jax.data.dataset import Dataset
from fedlp_jax.data.partition import Partition
from fedlp_jax.errors import FedLPError
from fedlp_jax.pruning.masks import MaskPolicy
from fedlp_jax.tasks.task import Task


def build(config: Config, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """Loads the data and builds everything else, on the host.

    Args:
      config: the configuration.
      known: remembers data, tasks and algorithms, so that configurations which agree in them share
        them; None = nothing is shared.

    Returns:
      The arguments of `simulate`.

    Raises:
      FedLPError: the data cannot be read, or these settings do not fit together.
    """
    known = {} if known is None else known
    data = _once(known, (config.data,), config.data.build)
    draws = reference.draw(config, data) if config.draws == "reference" else None
    of_algorithm = (
        config.data,
        config.model,
        config.task,
        config.algorithm,
        (config.partition, config.cohort, config.rounds, config.seed) if draws else None,
    )
    return {
        "algorithm": _once(known, of_algorithm, lambda: _algorithm(config, data, draws, known)),
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


def _once(known: dict[str, Any], settings: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """What these settings make, made at most once."""
    key = repr(settings)
    if key not in known:
        known[key] = make()
    return known[key]


def _task(config: Config, data: Dataset) -> Task:
    task: Task = config.task.build(module=config.model.build(num_classes=_outputs(config, data)))
    own.check_made(config.task.name, task, Task)
    return task


def _algorithm(
    config: Config, data: Dataset, draws: ReferenceDraws | None, known: dict[str, Any]
) -> Algorithm:
    of_task = (config.data, config.model, config.task)
    task = _once(known, of_task, lambda: _task(config, data))
    arguments = {"task": task} | _own_aggregator(config)
    policy = getattr(config.algorithm, "policy", None)
    if policy is not None:
        arguments["policy"] = own.check_made(policy.name, policy.build(), MaskPolicy)
    optimizer = getattr(config.algorithm, "client_optimizer", None)
    if optimizer is not None and own.takes(type(config.algorithm).factory, "client_schedule"):
        # The optimizer gets the rate 1, and the rate becomes `client_schedule`, a factor on its
        # updates: then the rate is an argument of the compiled round, and another one compiles
        # nothing. The rate is the last factor in all these optimizers, so the bits are the same.
        arguments["client_optimizer"] = optimizer.build(learning_rate=1.0)
        arguments["client_schedule"] = optimizer.learning_rate
    if draws is not None:
        return reference.algorithm_with(config, draws, **arguments)
    algorithm: Algorithm = config.algorithm.build(**arguments)
    return own.check_made(config.algorithm.name, algorithm, Algorithm)


def _own_aggregator(config: Config) -> dict[str, Reducer]:
    """The aggregator of the user's own that a configuration names, if it does."""
    setting = getattr(config.algorithm, "aggregator", None)
    settings = dict(setting) if isinstance(setting, Mapping) else {"name": setting}
    name = settings.pop("name", None)
    if not own.is_own(name):
        return {}
    return {"aggregator": own.check_made(name, own.imported(name)(**settings), Reducer)}


def _outputs(config: Config, data: Dataset) -> int:
    """The outputs of the model: one for each class or token, or one for each target."""
    if data.num_classes and config.task.name not in ("regression", "multi_label"):
        return data.num_classes
    targets = data.train.labels
    return 1 if targets.ndim == 1 else int(targets.shape[-1])


def build_partition(config: Config, data: Dataset) -> Partition:
    """Deals the training examples to clients.

    By the run's seed unless the section has its own; or as the authors' code deals them.

    Raises:
      FedLPError: impossible settings, or `natural` for data without client ids.
    """
    if config.draws == "reference":
        return reference.draw(config, data).partition
    if config.partition.name == "natural":
        if data.client is None:
            raise FedLPError(
                f"partition.name is 'natural', but the data set '{data.name}' has no client ids; "
                "choose iid, dirichlet, shards, mixed or quantity."
            )
        return config.partition.build(labels=data.train.labels, clients=data.client)
    arguments: dict[str, Any] = {"labels": data.train.labels}
    if "seed" in type(config.partition).model_fields:
        own_seed = config.partition.seed
        arguments["seed"] = config.seed if own_seed is None else own_seed
    partition: Partition = config.partition.build(**arguments)
    return own.check_made(config.partition.name, partition, Partition)
