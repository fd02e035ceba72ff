"""Algorithm: the interface that `simulate` runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from fedlp_jax.accounting.ledger import Wire, layers_of_levels, wire_of
from fedlp_jax.aggregation.privacy import Privacy
from fedlp_jax.clients.asynchrony import Asynchrony
from fedlp_jax.execution.client_state import ClientState
from fedlp_jax.execution.packing import Packed
from fedlp_jax.execution.plan import Plan
from fedlp_jax.pruning.layers import LayerRule, LayerTable, layer_table
from fedlp_jax.pruning.masks import always
from fedlp_jax.pruning.submodels import Submodel
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import Array, Batch, Cohort, Examples, RoundMetrics, ServerState, Variables


class Algorithm(NamedTuple):
    """Pure functions of a federated algorithm; `compose` makes them from parts.

    `init` and `round` are the algorithm. The rest describes it to the host loop: how much a client
    computes, which submodel it holds, and how often it sends a layer.
    """

    task: Task
    # (root key, example, K, initial variables or None) -> state
    init: Callable[[Array, Batch, int, Variables | None], ServerState]
    # (state, what the clients of the slots keep, split, cohort, root key, plan)
    #   -> (state, what the clients keep, metrics)
    # New client state is ignored if the run has halted. Slots that are empty, or whose clients keep
    # nothing, hold stale data: do not read them.
    round: Callable[
        [ServerState, Packed, Examples, Cohort, Array, Plan],
        tuple[ServerState, Packed, RoundMetrics],
    ]
    layers: LayerRule  # how the variables are cut into layers
    local_steps: Callable[[np.ndarray], np.ndarray]  # examples i64[C] -> local steps i64[C]
    # (variables or shapes, example) -> G levels, the last the whole model
    levels: Callable[[Variables, Batch], tuple[Submodel, ...]]
    assign: Callable[[Array, int], np.ndarray]  # (root key, K) -> level of each client, i32[K]
    # (layers, K) -> probability that a client sends a layer it holds, f32[1 or K, 1 or L]
    upload_rates: Callable[[LayerTable, int], np.ndarray] = always
    download_rates: Callable[[LayerTable, int], np.ndarray] = always  # that it receives one
    wire: Callable[[LayerTable], Wire] = wire_of  # what is exchanged; see `exchanged`
    # (variables or shapes, example) -> what clients of each level keep; None = nothing
    client_state: Callable[[Variables, Batch], tuple[ClientState, ...]] | None = None
    shared_heads: bool = False  # every level can be tested from the server's variables
    personal: bool = False  # no level can: each client is tested with what it keeps
    # variables of a whole model -> the part that the server holds
    of_server: Callable[[Variables], Variables] = lambda variables: variables
    asynchrony: Asynchrony | None = None  # `round` reads `cohort.staleness`
    cohort_rounds: int = 1  # rounds for which a drawn cohort stays together
    faults: bool = False  # `round` reads `cohort.conditions`
    stacked: bool = False  # `round` keeps the updates of all clients side by side
    senders: int = 1  # clients that the server asks for each layer; a cohort has no fewer
    privacy: Privacy | None = None
    # (shapes of the model, examples i64[K]) -> None: refuses or warns, before anything compiles
    check: Callable[[Variables, np.ndarray], None] = lambda model, sizes: None
    train_loss: str = "examples"  # or "batches": mean over clients of the mean over steps


def exchanged(
    algorithm: Algorithm, layers: LayerTable, variables: Variables, levels: Sequence[Submodel]
) -> Wire:
    """What clients of an algorithm exchange with the server.

    Args:
      algorithm: any.
      layers: of the server's variables.
      variables: these, or their shapes.
      levels: of the algorithm; where they hold slices of layers, sizes are by level.
    """
    if not any(level.slices for level in levels):
        return algorithm.wire(layers)
    shapes = [jax.eval_shape(level.extract, variables) for level in levels]
    held = [layer_table(shape, algorithm.layers, layers.names) for shape in shapes]
    return algorithm.wire(layers_of_levels(layers, held))
