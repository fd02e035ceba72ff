"""The clients of each round, and the arrays that describe them to the compiled program."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedlp_jax.data.partition import Partition
from fedlp_jax.errors import FedLPError, check_number
from fedlp_jax.execution.plan import Plan
from fedlp_jax.execution.scheduling import (
    Layout,
    lay_out,
    most_clients,
    size_buckets,
    widths_by_level,
)
from fedlp_jax.types import Cohort

# Partitions draw from the same generator under small numbers of their own.
_PURPOSE = 1
_SLACK = 1e-6  # a share times a number of clients may be rounded to below a whole number

CohortRule = int | float | Callable[[int, int, int], Sequence[int] | np.ndarray]


def sample(seed: int, round: int, clients: int, cohort: int) -> np.ndarray:
    """Draws C of K clients uniformly without replacement, in O(C) for any K (Floyd's method).

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


def cohort_size(rule: int | float, clients: int) -> int:
    """C, from a number of clients or a share of the population.

    Raises:
      FedLPError: more than there are, fewer than one, or not a number.
    """
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


class Cohorts:
    """The cohort of each round of a run: drawn, or given by a function.

    A function is called once a round, in the order of the rounds.

    Attributes:
      rule: as the user gave it.
      size: C, the clients of the largest cohort.
      fixed: every cohort has C clients.
    """

    def __init__(
        self,
        rule: CohortRule,
        clients: int,
        seed: int,
        first_round: int = 1,
        max_cohort: int | None = None,
        rounds: int = 1,
    ):
        """Finds C.

        Args:
          rule: a number, a share in (0, 1], or a function `(seed, round, K) -> ids`.
          clients: K.
          seed: the run's.
          first_round: the number of the run's first round.
          max_cohort: the largest cohort of a function, whose cohorts may then differ in size;
            None = every round has as many clients as the first.
          rounds: for which a drawn cohort stays together.

        Raises:
          FedLPError: C is impossible, `max_cohort` comes without a function, or the function's
            first cohort has unknown or repeated ids.
        """
        self.rule, self._clients, self._seed, self._rounds = rule, clients, seed, rounds
        self.fixed = max_cohort is None
        self._first: tuple[int, np.ndarray] | None = None
        if not callable(rule):
            if max_cohort is not None:
                raise FedLPError(
                    f"max_cohort={max_cohort} limits a function, but cohort={rule} is a number; "
                    "omit max_cohort."
                )
            self.size = cohort_size(rule, clients)
        elif max_cohort is None:
            self._first = first_round, self._from_function(first_round)
            self.size = len(self._first[1])
        else:
            self.size = check_number("max_cohort", max_cohort, ge=1, integer=True)
            if self.size > clients:
                raise FedLPError(
                    f"max_cohort={self.size} exceeds the {clients} clients in this partition."
                )

    def enlarged(self, size: int) -> Cohorts:
        """The same with drawn cohorts of this size, as over-selection needs."""
        if callable(self.rule) or size == self.size:
            return self
        return Cohorts(size, self._clients, self._seed, rounds=self._rounds)

    def members(self, round: int) -> np.ndarray:
        """The cohort of a round, `i64[C]` ascending.

        Raises:
          FedLPError: a function returns too many clients, another number than in the first round
            without `max_cohort`, or a wrong id.
        """
        if not callable(self.rule):
            begun = round - (round - 1) % self._rounds
            return sample(self._seed, begun, self._clients, self.size)
        first, self._first = self._first, None
        if first is not None and first[0] == round:
            return first[1]
        ids = self._from_function(round)
        if self.fixed and len(ids) != self.size:
            raise FedLPError(
                f"the cohort function returned {len(ids)} clients in round {round} but "
                f"{self.size} at first; return the same number each round, or state the largest "
                "with max_cohort."
            )
        if len(ids) > self.size:
            raise FedLPError(
                f"the cohort function returned {len(ids)} clients in round {round}, more than "
                f"max_cohort={self.size}."
            )
        return ids

    def staleness(self, round: int, client: np.ndarray) -> np.ndarray | None:
        """The versions by which clients are behind; None where all have the newest."""
        del round, client
        return None

    def row(self, round: int) -> dict[str, Any]:
        """What is reported of a cohort."""
        del round
        return {}

    def _from_function(self, round: int) -> np.ndarray:
        rule: Any = self.rule
        ids = np.sort(np.asarray(rule(self._seed, round, self._clients)))
        if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise FedLPError(
                f"the cohort function returned {ids!r} in round {round}; return client ids."
            )
        if ids[0] < 0 or ids[-1] >= self._clients:
            raise FedLPError(
                f"the cohort function returned ids {ids[0]} to {ids[-1]} in round {round}; clients "
                f"are 0 to {self._clients - 1}."
            )
        if (np.diff(ids) == 0).any():
            raise FedLPError(f"the cohort function returned a client twice in round {round}.")
        return ids.astype(np.int64)


class CohortBuilder:
    """Lays each cohort out in slots, always in arrays of the same shape."""

    def __init__(
        self,
        partition: Partition,
        assigned: np.ndarray,
        local_steps: Callable[[np.ndarray], np.ndarray],
        level_cost: Sequence[float],
        plan: Plan,
        largest: int | None = None,
        widest: int | None = None,
    ):
        """Prepares for a population.

        Args:
          partition: the examples of each client.
          assigned: `i32[K]`, submodel level of each client.
          local_steps: examples `i64[C]` -> local steps `i64[C]`.
          level_cost: G numbers, modelled cost of one step at each level.
          plan: resolved.
          largest: C, which fixes the slots; None = each cohort's own size.
          widest: M, at least the examples of the largest client, and then the size of the only
            bucket, or of `Cohort.like_size`; None = as many. It changes no draw.
        """
        self._partition = partition
        self._assigned = assigned
        self._local_steps = local_steps
        self._level_cost = level_cost
        self._plan = plan
        self._largest = largest
        sizes = partition.sizes
        most = int(sizes.max())
        self._widest = widest or most
        self._even = most if int(sizes.min()) == most else None
        self._buckets: tuple[int, ...] = ()
        self._like: int | None = None
        if plan.known_trip_counts:
            buckets = size_buckets(sizes, local_steps(sizes))
            self._buckets = buckets if widest is None else (widest,)
        elif widest is not None:
            least, largest = local_steps(np.array([sizes.min(), widest]))
            self._like = widest if least == largest else None
        self._widths = widths_by_level(plan, assigned, len(level_cost))

    def most_rows(self, cohort: int) -> int:
        """An upper bound on the rows of one device in any round: those of the largest clients.

        There are as many of them as `most_clients` says, for a cohort of C from this population.
        Where clients are alike that is an even share.
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
        bounds = self._local_steps(np.array(self._buckets)) if self._buckets else None
        layout = lay_out(
            self._local_steps(size),
            level,
            self._level_cost,
            self._plan,
            self._largest,
            bounds,
            self._widths,
        )
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
        fixed: dict[str, Any] = {"buckets": self._buckets, "widths": self._widths}
        fixed |= {"even_size": self._even, "like_size": self._like}
        return Cohort(**columns, **fixed), layout
