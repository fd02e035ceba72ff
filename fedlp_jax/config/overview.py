"""A configuration in numbers before it runs: layers, submodels, traffic of a round.

All numbers are modelled: counted from shapes, layer tables and probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from fedlp_jax.accounting.ledger import fedavg_traffic
from fedlp_jax.accounting.macs import forward_macs
from fedlp_jax.aggregation.robust import stacked_bytes
from fedlp_jax.algorithms.base import Algorithm, exchanged
from fedlp_jax.clients.devices import PASSES
from fedlp_jax.clients.local_training import LocalWork, examples_seen
from fedlp_jax.config.schema import Config
from fedlp_jax.data.batching import example_of
from fedlp_jax.data.loading import Dataset
from fedlp_jax.data.partition import Partition
from fedlp_jax.execution.plan import resolve
from fedlp_jax.prng import root_key
from fedlp_jax.pruning.layers import LayerRule, LayerTable, layer_table
from fedlp_jax.simulation import validation as checks
from fedlp_jax.simulation.cohorts import cohort_size
from fedlp_jax.simulation.staging import on_host
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import Batch, Examples, Variables


class Level(NamedTuple):
    """One submodel level."""

    name: str  # such as "depth_2"
    task: Task
    variables: Variables  # shapes, private ones included
    table: LayerTable  # what it exchanges with the server, in the layers of the whole model
    macs: dict[str, int]  # module path -> multiply-accumulates of one example's forward pass
    clients: int = 0  # of the population

    @property
    def shared(self) -> int:
        """Parameters exchanged with the server."""
        return int(self.table.params.sum())

    @property
    def held(self) -> int:
        """Parameters, private ones included."""
        return sum(x.size for x in jax.tree.leaves(self.variables["params"]))


class Overview(NamedTuple):
    """What `fedlp info CONFIG` shows besides the settings."""

    clients: Partition
    cohort: int  # C, clients whose updates make a round
    layers: LayerTable
    levels: tuple[Level, ...]  # the last is the whole model
    upload_bytes: float  # expected, of a round without failures
    download_bytes: float
    fedavg: dict[str, int]  # of the same round as FedAvg: `upload_bytes`, `download_bytes`, ...
    stacked_bytes: int | None = None  # memory of a robust rule


def overview(config: Config, arguments: Mapping[str, Any]) -> Overview:
    """Counts what a run exchanges and computes.

    Args:
      config: the configuration.
      arguments: of `simulate`, from `build`.

    Raises:
      FedLPError: probabilities or depths that do not fit the model or the clients.
    """
    algorithm, data, clients = (arguments[key] for key in ("algorithm", "data", "clients"))
    root = root_key(config.seed)
    example = example_of(Examples(data.train.inputs, data.train.labels, data.normalize))
    variables = checks.initial_state(algorithm, example, root, clients.clients).variables  # shapes
    checks.check_size(variables)
    resolve(arguments["plan"], 1)  # refuses devices that do not exist
    table = layer_table(variables, algorithm.layers)
    assigned = algorithm.assign(root, clients.clients)  # i32[K]
    levels = submodel_levels(algorithm, variables, example)
    number = np.bincount(assigned, minlength=len(levels))
    held = np.stack([level.table.covered for level in levels])[assigned]  # f32[K, L]
    sent = held * algorithm.upload_rates(table, clients.clients)
    received = held * algorithm.download_rates(table, clients.clients)
    wire = exchanged(algorithm, table, variables, algorithm.levels(variables, example))
    of_clients = wire.at(assigned)  # f64[K, L] where clients hold slices
    cohort = cohort_size(config.cohort, clients.clients)
    if algorithm.asynchrony is not None:  # the cohort is in flight; a round takes a part of it
        cohort = algorithm.asynchrony.buffer
    deepest = jax.eval_shape(algorithm.levels(variables, example)[-1].extract, variables)
    # Over-selection: the first C of the chosen clients count.
    chosen = cohort if arguments["faults"] is None else arguments["faults"].chosen(cohort)
    return Overview(
        clients,
        cohort,
        table,
        tuple(level._replace(clients=int(n)) for level, n in zip(levels, number, strict=True)),
        upload_bytes=cohort * float((sent * of_clients.upload).sum(axis=1).mean() + wire.header),
        download_bytes=chosen * float((received * of_clients.download).sum(axis=1).mean()),
        fedavg=fedavg_traffic(
            *whole_model(algorithm, data, deepest, table), senders=cohort, receivers=chosen
        ),
        stacked_bytes=stacked_bytes(variables, table, chosen, arguments["plan"])
        if algorithm.stacked
        else None,
    )


def training_macs(config: Config, view: Overview) -> float | None:
    """Expected multiply-accumulates of the training of a round: three forward passes an example.

    None where the algorithm is the user's own and does not say how much a client trains.
    """
    algorithm = config.algorithm
    if not all(hasattr(algorithm, field) for field in LocalWork._fields):
        return None
    epochs, steps = algorithm.epochs, algorithm.steps
    work = LocalWork(algorithm.batch_size, 1 if epochs is steps is None else epochs, steps)
    seen = float(np.mean(examples_seen(view.clients.sizes, work)))
    forward = [sum(level.macs.values()) * level.clients for level in view.levels]
    return view.cohort * PASSES * seen * sum(forward) / view.clients.clients


def whole_model(
    algorithm: Algorithm, data: Dataset, deepest: Variables, layers: LayerTable
) -> tuple[Variables, LayerRule, LayerTable]:
    """What clients would exchange if they kept nothing for themselves, as `fedavg_traffic` reads.

    Args:
      algorithm: of the run.
      data: of the run.
      deepest: what clients of the deepest level share.
      layers: of the server.
    """
    if algorithm.personal:
        example = example_of(on_host(data.train, data.normalize))
        deepest = jax.eval_shape(algorithm.task.init, root_key(0), example)
        layers = layer_table(deepest, algorithm.layers)
    return deepest, algorithm.layers, layers


def submodel_levels(algorithm: Algorithm, variables: Variables, example: Batch) -> list[Level]:
    """Traces every submodel of an algorithm, which takes seconds.

    Args:
      algorithm: any.
      variables: the server's, or their shapes.
      example: a batch.
    """
    layers = layer_table(variables, algorithm.layers)
    levels = []
    for level in algorithm.levels(variables, example):
        held = jax.eval_shape(level.task.init, root_key(0), example)
        held_shapes = jax.eval_shape(level.extract, variables)
        part = layer_table(held_shapes, algorithm.layers, layers.names)
        levels.append(
            Level(level.name, level.task, held, part, forward_macs(level.task, held, example))
        )
    return levels


def macs_by_layer(macs: Mapping[str, int], layers: LayerTable) -> list[int]:
    """MACs of each layer, `L` numbers.

    The MACs of a module count for the layer of its kernel, of the scale of a normalisation, or of
    whatever it holds. Those outside any layer, or of a module whose parts are of several layers,
    count for none.
    """
    layer_of = {
        tuple(map(str, path)): layer for path, layer in flatten_dict(layers.index["params"]).items()
    }
    totals = [0] * len(layers)
    for module, count in macs.items():
        path = tuple(module.split("/"))
        own = [layer_of[(*path, name)] for name in ("kernel", "scale") if (*path, name) in layer_of]
        held = {layer for leaf, layer in layer_of.items() if leaf[: len(path)] == path}
        if own or len(held) == 1:
            totals[own[0] if own else held.pop()] += count
    return totals
