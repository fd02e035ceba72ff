"""Personal models: what each client computes with, the server's variables and its own.

A run whose clients keep layers for themselves (`fl.submodel.personal`) has no model for all, so it
is tested per client. The test split is divided as the training split is: the test examples of each
class are dealt to the clients in proportion to how many training examples of that class they hold,
and every client answers its own with its own model. Each test example counts once, so the mean over
all of them is the mean over clients, weighted by examples, of what they get right in a world like
their own; and it costs one pass over the test split, however many clients there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax.errors import check_client
from fedlp_jax.execution.client_state import ClientStore
from fedlp_jax.execution.map_clients import Level, entry, map_sum
from fedlp_jax.execution.plan import Plan
from fedlp_jax.pruning.submodels import Submodel
from fedlp_jax.types import Array, Batch, Examples, Metrics, PyTree, Variables

# Rows evaluated at once: small enough for a core's cache, large enough to fill an accelerator.
_EVAL_BATCH = {"cpu": 64}
_ACCELERATOR_EVAL_BATCH = 2048


def eval_batch_size() -> int:
    """Rows of a batch in evaluation, on this machine."""
    return _EVAL_BATCH.get(jax.default_backend(), _ACCELERATOR_EVAL_BATCH)


class ClientBatches(NamedTuple):
    """Batches of examples, each of ONE client, in slots like those of a cohort."""

    client: np.ndarray  # i32[D * P]
    place: np.ndarray  # i32[D * P], of the client in the stack of its level
    rows: np.ndarray  # i32[D * P, B], rows of the split, padded
    size: np.ndarray  # i32[D * P], rows that count
    segment: np.ndarray  # i32[D, G + 1], the slots of each level on each device


class ClientModels:
    """The models of all clients: `models[k]` are the variables of client k, its own among them.

    They stay on the devices, in one copy of what is shared and one stack of what is not, until they
    are asked for. Valid until the run that they are of goes on.
    """

    def __init__(
        self,
        variables: Variables,
        levels: Sequence[Submodel],
        assigned: np.ndarray,
        store: ClientStore,
    ):
        """Takes the parts.

        Args:
          variables: the server's.
          levels: G levels.
          assigned: `i32[K]`, the level of each client.
          store: what clients keep, their private variables among it.
        """
        self.variables, self.levels, self.assigned = variables, tuple(levels), assigned
        self.stacks = heads(store)
        self.place = store.place

    def __len__(self) -> int:
        return len(self.assigned)

    def __iter__(self) -> Iterator[Variables]:
        return (self[client] for client in range(len(self)))

    def __getitem__(self, client: int) -> Variables:
        """The variables of one client's model.

        Raises:
          FedLPError: the client does not exist.
        """
        check_client(client, len(self))
        level, stack = (x[self.assigned[client]] for x in (self.levels, self.stacks))
        own = entry(stack, int(self.place[client]))
        return level.merge(level.extract(self.variables), own)


def heads(store: ClientStore) -> tuple[PyTree, ...]:
    """The private variables of all clients: for each level a tree of `[K_g, ...]`."""
    return tuple(stack["head"] for stack in store.stacks)


def client_batches(
    order: np.ndarray,
    offset: np.ndarray,
    assigned: np.ndarray,
    place: np.ndarray,
    *,
    levels: int,
    devices: int,
    batch_size: int,
) -> ClientBatches:
    """Cuts the examples of each client into batches, and deals those to the devices.

    Args:
      order: `i32[N]`, rows of the split, client after client.
      offset: `i64[K + 1]`; a client may have none.
      assigned: `i32[K]`, the level of each client.
      place: `i32[K]`, of each client in the stack of its level.
      levels: G.
      devices: D.
      batch_size: the most rows of a batch.
    """
    sizes = np.diff(offset)
    counts = -(-sizes // batch_size)
    client = np.repeat(np.arange(len(sizes)), counts)
    number = np.arange(len(client)) - np.repeat(np.cumsum(counts) - counts, counts)
    first, size = offset[client] + number * batch_size, sizes[client] - number * batch_size
    size = np.minimum(size, batch_size)
    column = np.arange(min(batch_size, max(int(sizes.max()), 1)))
    rows = order[np.where(column < size[:, None], first[:, None] + column, 0)]
    # By level, then one device after the other; each device keeps its levels in order.
    slots = -(-len(client) // devices)
    by_level = np.argsort(assigned[client], kind="stable")
    dealt = [by_level[device::devices] for device in range(devices)]
    segment = [
        np.concatenate([[0], np.cumsum(np.bincount(assigned[client[of]], minlength=levels))])
        for of in dealt
    ]

    def laid(values: np.ndarray) -> np.ndarray:
        out = np.zeros((devices, slots, *values.shape[1:]), np.int32)
        for device, of in enumerate(dealt):
            out[device, : len(of)] = values[of]
        return out.reshape(devices * slots, *values.shape[1:])

    return ClientBatches(
        laid(client), laid(place[client]), laid(rows), laid(size), np.asarray(segment, np.int32)
    )


def measure(
    levels: Sequence[Submodel],
    variables: Variables,
    stacks: Sequence[PyTree],
    examples: Examples,
    batches: ClientBatches,
    plan: Plan,
) -> tuple[Metrics, Metrics]:
    """Measures every client's model on its own batches; to be traced.

    Args:
      levels: G levels.
      variables: the server's.
      stacks: the private variables of all clients, see `heads`.
      examples: the split.
      batches: of all clients.
      plan: its devices are used.

    Returns:
      The metrics summed over all batches, and those of each batch, `[D * P]`.
    """

    def work(level: Submodel, g: int) -> Level:
        def run(shared: Any, batch: Any, own: Any, active: Array, bounds: Any) -> Any:
            (variables, stacks, examples), (place, rows, size) = shared, batch
            model = level.merge(level.extract(variables), entry(stacks[g], place))
            valid = jnp.arange(rows.shape[0], dtype=jnp.int32) < size
            inputs, labels = examples.inputs[rows], examples.labels[rows]
            measured = level.task.evaluate(model, Batch(inputs, labels, valid, examples.normalize))
            return measured, measured, own

        return Level(run, bounds=lambda batch: (), embed=lambda shared, total: total)

    total, each, _ = map_sum(
        [work(level, g) for g, level in enumerate(levels)],
        (variables, tuple(stacks), examples),
        (batches.place, batches.rows, batches.size),
        jnp.asarray(batches.segment),
        Plan(plan.devices or 1, 1),
    )
    return total, each


def means_by_client(each: Metrics, batches: ClientBatches, clients: int) -> Any:
    """Sums and weights of each metric by client, `(f64[K], f64[K])`; on the host."""
    slots = len(batches.client) // len(batches.segment)
    ran = (np.arange(slots) < batches.segment[:, -1:]).ravel()
    owner = batches.client[ran]

    def by_client(values: Array) -> np.ndarray:
        return np.bincount(owner, np.asarray(values, np.float64)[ran], minlength=clients)

    return jax.tree.map(by_client, each)
