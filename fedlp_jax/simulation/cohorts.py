"""Who takes part in a round, and the arrays that say so to the compiled program."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedlp_jax.data.partition import Partition
from fedlp_jax.errors import FedLPError
from fedlp_jax.execution.map_clients import Plan
from fedlp_jax.execution.scheduling import Layout, lay_out, most_clients
from fedlp_jax.types import Cohort

# Partitions draw from the same generator under small numbers of their own.
_PURPOSE = 1
_SLACK = 1e-6  # of a share times a number of clients, which may be rounded to below a whole number

CohortRule = int | float | Callable[[int, int, int], Sequence[int] | np.ndarray]


def sample(seed: int, round: int, clients: int, cohort: int) -> np.ndarray:
    """C of K clients, uniformly without replacement, in O(C) whatever K: Floyd's method.

    Args:
      seed: the run's.
      round: from 1; the draw depends on (seed, round) alone.
      clients: K.
      cohort: C.

    Returns:
      `i64[C]`, ascending.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, (_PURPOSE << 32) | round]))
    tops = np.arange(clients - cohort, clients)
    chosen: set[int] = set()
    for top, pick in zip(tops.tolist(), rng.integers(0, tops + 1).tolist(), strict=True):
        chosen.add(top if pick in chosen else pick)
    return np.sort(np.fromiter(chosen, np.int64, len(chosen)))


def cohort_size(rule: CohortRule, clients: int, seed: int) -> int:
    """C, from a number, a share of the population, or the first cohort a function gives.

    Raises:
      FedLPError: more than there are, fewer than one, or not a cohort at all.
    """
    if callable(rule):
        return len(_from_function(rule, seed, 1, clients))
    if isinstance(rule, bool) or not isinstance(rule, numbers.Real):
        raise FedLPError(
            f"cohort={rule!r} must be a number of clients, a share in (0, 1], or a function "
            "(seed, round, K) -> ids."
        )
    if isinstance(rule, numbers.Integral):
        size = int(rule)
    elif 0 < rule <= 1:
        size = max(int(rule * clients + _SLACK), 1)
    else:
        raise FedLPError(
            f"cohort={rule} is neither a whole number of clients nor a share in (0, 1]."
        )
    if size < 1:
        raise FedLPError(f"cohort={size} must be at least 1.")
    if size > clients:
        raise FedLPError(
            f"cohort={size} exceeds the {clients} clients in this partition; lower cohort or "
            "partition into more clients."
        )
    return size


def members(rule: CohortRule, seed: int, round: int, clients: int, size: int) -> np.ndarray:
    """The cohort of a round, `i64[C]` ascending.

    Raises:
      FedLPError: a function gives another number of clients than at first, or a wrong id.
    """
    if not callable(rule):
        return sample(seed, round, clients, size)
    ids = _from_function(rule, seed, round, clients)
    if len(ids) != size:
        raise FedLPError(
            f"the cohort function gave {len(ids)} clients in round {round} but {size} in round 1; "
            "give the same number each round."
        )
    return ids


def _from_function(
    rule: Callable[[int, int, int], Sequence[int] | np.ndarray], seed: int, round: int, clients: int
) -> np.ndarray:
    ids = np.sort(np.asarray(rule(seed, round, clients)))
    if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise FedLPError(f"the cohort function gave {ids!r} in round {round}; give client ids.")
    if ids[0] < 0 or ids[-1] >= clients:
        raise FedLPError(
            f"the cohort function gave ids {ids[0]} to {ids[-1]} in round {round}; clients are "
            f"0 to {clients - 1}."
        )
    if (np.diff(ids) == 0).any():
        raise FedLPError(f"the cohort function gave a client twice in round {round}.")
    return ids.astype(np.int64)


class CohortBuilder:
    """Lays the cohort of each round into slots, always in arrays of the same shape."""

    def __init__(
        self,
        partition: Partition,
        assigned: np.ndarray,
        local_steps: Callable[[np.ndarray], np.ndarray],
        level_cost: Sequence[float],
        plan: Plan,
    ):
        """Prepares for a population.

        Args:
          partition: whose examples are whose.
          assigned: `i32[K]`, submodel level of each client.
          local_steps: examples `i64[C]` -> local steps `i64[C]`.
          level_cost: G numbers, modelled cost of one step at each level.
          plan: resolved.
        """
        self._partition = partition
        self._assigned = assigned
        self._local_steps = local_steps
        self._level_cost = level_cost
        self._plan = plan
        sizes = partition.sizes
        self._widest = int(sizes.max())
        self._even = self._widest if int(sizes.min()) == self._widest else None

    def most_rows(self, cohort: int) -> int:
        """Rows that no device exceeds in any round: those of as many of the largest clients.

        As many as `most_clients` says, for a cohort of C out of this population. Where clients are
        alike that is their even share.
        """
        sizes = self._partition.sizes
        work = self._local_steps(sizes) * np.asarray(self._level_cost, np.float64)[self._assigned]
        evenness = float(work.min() / work.max()) if work.max() > 0 else 1.0
        most = most_clients(cohort, self._plan.devices or 1, evenness)
        return int(np.partition(sizes, len(sizes) - most)[len(sizes) - most :].sum())

    def build(self, ids: np.ndarray) -> tuple[Cohort, Layout]:
        """The arrays of one round, in numpy, for the clients `i64[C]` ascending."""
        offset = self._partition.offset
        start, size = offset[ids], offset[ids + 1] - offset[ids]
        level = self._assigned[ids]
        layout = lay_out(self._local_steps(size), level, self._level_cost, self._plan)
        member, filled = layout.member, layout.member >= 0

        def in_slots(values: np.ndarray, empty: int) -> np.ndarray:
            return np.where(filled, values[member], empty).astype(np.int32)

        column = np.arange(self._widest)
        slot_size = in_slots(size, 0)
        here = np.where(column < slot_size[:, None], start[member][:, None] + column, 0)
        rows = np.where(column < slot_size[:, None], self._partition.order[here], 0)
        columns: dict[str, Any] = {  # numpy here, device arrays once staged
            "client": in_slots(ids, -1),
            "size": slot_size,
            "level": in_slots(level, 0),
            "rows": rows.astype(np.int32),
            "segment": layout.segment,
        }
        return Cohort(**columns, even_size=self._even), layout
