"""Arrivals: who reaches an asynchronous server when, from modelled seconds and the seed alone."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from fedlp_jax.accounting.macs import macs_of_models
from fedlp_jax.clients.asynchrony import Asynchrony
from fedlp_jax.clients.devices import PASSES
from fedlp_jax.errors import FedLPError
from fedlp_jax.pruning.layers import layer_table
from fedlp_jax.simulation.cohorts import Cohorts
from fedlp_jax.types import Variables

if TYPE_CHECKING:
    from fedlp_jax.simulation.spec import Spec

_PURPOSE = 2  # of draws; cohorts have 1


class Update(NamedTuple):
    """One update of the server."""

    staleness: dict[int, int]  # client -> tau, of those whose arrivals it takes
    seconds: float  # modelled, since the update before
    discarded: list[int]  # clients whose arrivals were too old


class Arrivals(Cohorts):
    """The clients of each update of an asynchronous server.

    M clients are always in flight, if there are idle ones. As many as arrive at one time are taken
    by ascending id; then others begin, drawn from those that are idle, with the newest version. The
    ledger books what an update takes, not what was discarded or is still in flight.

    Attributes:
      size: B, the arrivals of one update.
      in_flight: M.
    """

    def __init__(self, asynchrony: Asynchrony, cohorts: Cohorts, clients: int, seed: int):
        """Checks the numbers; `begin` says how long clients take.

        Raises:
          FedLPError: a cohort function, or a buffer of more than the clients in flight.
        """
        if callable(cohorts.rule):
            raise FedLPError(
                "cohort is a function, but the clients of an asynchronous server are those who "
                "arrive; give the number of clients in flight."
            )
        if asynchrony.buffer > cohorts.size:
            raise FedLPError(
                f"buffer={asynchrony.buffer} exceeds the {cohorts.size} clients in flight "
                "(cohort); lower one or raise the other."
            )
        self.rule, self.size, self.in_flight = cohorts.rule, asynchrony.buffer, cohorts.size
        self._clients, self._seed, self._most = clients, seed, asynchrony.most
        self._seconds: list[float] = []
        self._macs: np.ndarray = np.zeros(clients)
        self._flying: list[tuple[float, int, int]] = []  # a heap of end, client, version
        self._landed: list[tuple[int, int]] = []  # client, version; at the current time
        self._busy: set[int] = set()
        self._now, self._begun = 0.0, 0
        self._updates: list[Update] = []

    def begin(self, seconds: np.ndarray, macs: np.ndarray) -> None:
        """Takes the modelled seconds and the multiply-accumulates of each client, `f64[K]`."""
        self._seconds, self._macs = seconds.tolist(), macs

    def members(self, round: int) -> np.ndarray:
        """The clients whose arrivals make an update, `i64[B]` ascending; from 1."""
        return np.sort(np.asarray(list(self._update(round).staleness), np.int64))

    def staleness(self, round: int, client: np.ndarray) -> np.ndarray:
        """The versions by which the clients in slots `i32[D * P]` are behind; 0 if empty."""
        of = self._update(round).staleness
        return np.asarray([of.get(int(k), 0) for k in client], np.int32)

    def row(self, round: int) -> dict[str, Any]:
        """Modelled time and work, mean and largest staleness, and the arrivals discarded.

        `train_macs` is the work that arrived since the update before, of which `lost_macs` was
        discarded; that of clients still in flight is not in it.
        """
        update = self._update(round)
        ages = list(update.staleness.values())
        return {
            "simulated_time": update.seconds,
            "train_macs": int(self._macs[[*update.staleness, *update.discarded]].sum()),
            "lost_macs": int(self._macs[update.discarded].sum()),
            "staleness_mean": sum(ages) / len(ages),
            "staleness_max": max(ages),
            "discarded": len(update.discarded),
        }

    def _update(self, round: int) -> Update:
        while len(self._updates) < round:
            self._updates.append(self._next())
        return self._updates[round - 1]

    def _next(self) -> Update:
        taken: dict[int, int] = {}
        discarded: list[int] = []
        version, before = len(self._updates), self._now
        while len(taken) < self.size:
            if not self._landed:
                self._take_off(version)
                self._land()
            client, received = self._landed.pop(0)
            if version - received > self._most:
                self._busy.remove(client)
                discarded.append(client)
            else:
                taken[client] = version - received
        self._busy -= taken.keys()
        return Update(taken, self._now - before, discarded)

    def _take_off(self, version: int) -> None:
        """Idle clients begin until M are in flight."""
        while len(self._flying) < self.in_flight and len(self._busy) < self._clients:
            key = [self._seed, (_PURPOSE << 32) | self._begun]
            rng = np.random.Generator(np.random.Philox(key=key))
            client = int(rng.integers(self._clients))
            while client in self._busy:
                client = int(rng.integers(self._clients))
            end = self._now + self._seconds[client]
            heapq.heappush(self._flying, (end, client, version))
            self._busy.add(client)
            self._begun += 1

    def _land(self) -> None:
        """Moves the clock to the next arrival, and takes all of that time."""
        self._now = self._flying[0][0]
        while self._flying and self._flying[0][0] == self._now:
            _, client, version = heapq.heappop(self._flying)
            self._landed.append((client, version))


def modelled_work(spec: Spec, variables: Variables) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of download, training and upload of each client, and its MACs, `f64[K]` each.

    An upload has its expected size.

    Args:
      spec: of an algorithm with asynchrony.
      variables: the server's, or their shapes.
    """
    algorithm, assigned = spec.algorithm, spec.assigned
    rule: Any = algorithm.asynchrony
    held_shapes = [jax.eval_shape(level.extract, variables) for level in spec.levels]
    tables = [layer_table(x, algorithm.layers, spec.layers.names) for x in held_shapes]
    held = np.stack([table.covered for table in tables])[assigned].astype(np.float64)
    sent = held * algorithm.upload_rates(spec.layers, len(assigned))
    received = held * algorithm.download_rates(spec.layers, len(assigned))
    forward = macs_of_models([level.task for level in spec.levels], spec.root, spec.example)
    macs = PASSES * np.asarray(forward, np.float64)[assigned] * rule.examples(spec.clients.sizes)
    wire, speed = spec.wire.at(assigned), rule.profile.machines(spec.root, len(assigned))
    down = (received * wire.download).sum(axis=1)
    up = (sent * wire.upload).sum(axis=1) + wire.header
    parts = (down, speed.download), (macs, speed.compute), (up, speed.upload)
    seconds = sum(amount / np.asarray(rate, np.float64) for amount, rate in parts)
    return seconds, macs
