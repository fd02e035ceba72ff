"""Spec: the checked inputs of a run, and what follows from them before anything is compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax.accounting.ledger import Wire
from fedlp_jax.aggregation.privacy import accountant
from fedlp_jax.algorithms.base import Algorithm, exchanged
from fedlp_jax.clients.failures import Exposure, Faults
from fedlp_jax.data.batching import example_of
from fedlp_jax.data.loading import Dataset
from fedlp_jax.data.partition import Partition
from fedlp_jax.errors import collecting, note
from fedlp_jax.execution import processes
from fedlp_jax.execution.client_state import ClientState, check_memory
from fedlp_jax.execution.packing import size_bytes
from fedlp_jax.execution.plan import HOST, Plan, note_other_kernels, resolve, with_place
from fedlp_jax.execution.scheduling import with_even_chunks
from fedlp_jax.prng import root_key
from fedlp_jax.pruning.layers import LayerTable, layer_table
from fedlp_jax.pruning.submodels import Submodel
from fedlp_jax.simulation import validation as checks
from fedlp_jax.simulation.arrivals import Arrivals, modelled_work
from fedlp_jax.simulation.cohorts import CohortRule, Cohorts
from fedlp_jax.simulation.staging import on_host
from fedlp_jax.types import Array, Batch, Variables


@dataclasses.dataclass(frozen=True)
class Fit:
    """What follows from an algorithm, its data and the number of clients, whatever the seed.

    Attributes:
      example: a batch for shapes.
      model: shapes of a whole model.
      shapes: of the server's variables.
      variables: the initial model in jax's dtypes; None = drawn from the seed.
      levels: G submodels.
      client_state: what clients of each level keep between rounds; () = nothing.
      layers: the layer table.
      wire: what clients exchange of each layer.
      checked: who held which examples when the algorithm was checked.
      warnings: of that check.
    """

    example: Batch
    model: Variables
    shapes: Variables
    variables: Variables | None
    levels: tuple[Submodel, ...]
    client_state: tuple[ClientState, ...]
    layers: LayerTable
    wire: Wire
    checked: Partition
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Spec(Fit):
    """The checked inputs of a run, and what follows from them on the host.

    Attributes:
      algorithm: as given.
      data: as given.
      clients: the partition, of K clients.
      cohorts: who takes part in each round, C clients at most.
      seed: of all draws.
      exposure: of the clients to faults; None = none.
      plan: resolved.
      width_is_open: the plan's width was chosen here, so it may be lowered to fit the memory.
      assigned: `i32[K]`, submodel level of each client.
      predicted: bytes that a run keeps besides its model.
      epsilon: rounds -> epsilon of differential privacy; None = no privacy.
    """

    algorithm: Algorithm
    data: Dataset
    clients: Partition
    cohorts: Cohorts
    seed: int
    exposure: Exposure | None
    plan: Plan
    width_is_open: bool
    assigned: np.ndarray
    predicted: dict[str, float]
    epsilon: Callable[[int], float] | None

    @property
    def root(self) -> Array:
        """The root key of all draws inside rounds."""
        return root_key(self.seed)


def specify(
    algorithm: Algorithm,
    data: Dataset,
    clients: Partition,
    *,
    cohort: CohortRule,
    seed: int = 0,
    first_round: int = 1,
    max_cohort: int | None = None,
    plan: Plan | None = None,
    variables: Variables | None = None,
    faults: Faults | None = None,
    fit: Fit | None = None,
) -> Spec:
    """Checks the inputs of a run and resolves its plan; the arguments are those of `simulate`.

    `fit` is that of a run which differs in its seed or in who holds which examples; None = not
    known yet.

    Raises:
      FedLPError: bad input, with the numbers and a way out.
    """
    note(data.warnings)
    note_other_kernels()
    checks.check_partition(clients, data)
    population, root = clients.clients, root_key(seed)
    cohorts = _cohorts(algorithm, cohort, population, seed, first_round, max_cohort)
    exposure = None
    if faults is not None:
        checks.check_faults(algorithm, faults, cohort)
        exposure = Exposure(faults, root, population, cohorts.size, data.num_classes)
        cohorts = cohorts.enlarged(exposure.chosen)
    if fit is None:
        fit = _fit(algorithm, data, clients, root, variables)
    elif fit.checked is clients:
        note(fit.warnings)
    else:
        warnings = _check(algorithm, fit.model, clients)
        fit = dataclasses.replace(fit, checked=clients, warnings=warnings)
    assigned = algorithm.assign(root, population)
    resolved = _resolve(plan, cohorts.size, algorithm, data)
    width_is_open = plan is None or plan.width is None
    if width_is_open:
        resolved = with_even_chunks(resolved, cohorts.size, assigned)
    checks.check_steps(algorithm, clients)
    predicted = _predicted(algorithm, data, fit, assigned, cohorts, resolved)
    epsilon = accountant(algorithm.privacy, population, cohorts.size, sampled=not callable(cohort))
    spec = Spec(
        **{field.name: getattr(fit, field.name) for field in dataclasses.fields(Fit)},
        algorithm=algorithm,
        data=data,
        clients=clients,
        cohorts=cohorts,
        seed=seed,
        exposure=exposure,
        plan=resolved,
        width_is_open=width_is_open,
        assigned=assigned,
        predicted=predicted,
        epsilon=epsilon,
    )
    return _with_arrivals(spec)


def _fit(
    algorithm: Algorithm,
    data: Dataset,
    clients: Partition,
    root: Array,
    variables: Variables | None,
) -> Fit:
    """Traces the model, which must fit the data, and the initial model, if there is one."""
    example = example_of(on_host(data.train, data.normalize))
    model = checks.check_model(algorithm, example, data, root)
    warnings = _check(algorithm, model, clients)  # before the optimizers meet the model
    shapes = checks.initial_state(algorithm, example, root, clients.clients).variables
    checks.check_size(shapes)
    layers, begun = layer_table(shapes, algorithm.layers), shapes
    if variables is not None:  # NumPy's float64 becomes what jax computes in
        checks.check_variables(algorithm.of_server(variables), shapes)
        begun = variables = jax.tree.map(jnp.asarray, variables)
    # Client state takes the dtype of the given variables.
    levels, kept = algorithm.levels(begun, example), _client_state(algorithm, begun, example)
    wire = exchanged(algorithm, layers, begun, levels)
    found = example, model, shapes, variables, levels, kept, layers, wire
    return Fit(*found, checked=clients, warnings=warnings)


def _check(algorithm: Algorithm, model: Variables, clients: Partition) -> tuple[str, ...]:
    """Refuses an algorithm that does not fit; returns its warnings."""
    with collecting() as said:
        algorithm.check(model, clients.sizes)
    return tuple(said)


def _cohorts(
    algorithm: Algorithm,
    cohort: CohortRule,
    clients: int,
    seed: int,
    first_round: int,
    max_cohort: int | None,
) -> Cohorts:
    """Who takes part: the cohorts of the rule, or those who arrive."""
    cohorts = Cohorts(cohort, clients, seed, first_round, max_cohort, algorithm.cohort_rounds)
    if algorithm.asynchrony is not None:
        cohorts = Arrivals(algorithm.asynchrony, cohorts, clients, seed)
    checks.check_cohorts(algorithm, cohorts.size, max_cohort)
    return cohorts


def _with_arrivals(spec: Spec) -> Spec:
    """The same once it is known how long clients take, where the server does not wait."""
    if isinstance(spec.cohorts, Arrivals):
        spec.cohorts.begin(*modelled_work(spec, spec.shapes))
    return spec


def _client_state(
    algorithm: Algorithm, variables: Variables, example: Batch
) -> tuple[ClientState, ...]:
    return () if algorithm.client_state is None else algorithm.client_state(variables, example)


def _predicted(
    algorithm: Algorithm,
    data: Dataset,
    fit: Fit,
    assigned: np.ndarray,
    cohorts: Cohorts,
    plan: Plan,
) -> dict[str, float]:
    """Bytes that a run keeps besides its model; refuses what does not fit."""
    predicted: dict[str, float] = {}
    if algorithm.stacked:
        predicted["stacked_bytes"] = checks.check_stack(fit.shapes, fit.layers, cohorts.size, plan)
    if algorithm.asynchrony is not None:
        predicted["version_bytes"] = (algorithm.asynchrony.most + 1) * size_bytes(fit.shapes)
    if fit.client_state:
        train = 0 if plan.data == HOST else data.train.nbytes
        beside = size_bytes(fit.shapes) + train + data.test.nbytes
        kept = check_memory(fit.client_state, assigned, cohorts.size, plan, beside)
        predicted["client_state_bytes"] = kept
    return predicted


def _resolve(plan: Plan | None, cohort: int, algorithm: Algorithm, data: Dataset) -> Plan:
    """The plan with its open fields filled: devices, width, place of the data, rounds at once."""
    plan = with_place(resolve(plan, cohort), data.train.nbytes, data.test.nbytes)
    if algorithm.client_state is not None or plan.data == HOST or processes.count() > 1:
        return dataclasses.replace(plan, rounds_at_once=1)  # the host has work between rounds
    return plan
