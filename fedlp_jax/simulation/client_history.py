"""What each client did in each round: a table with one row for each client that was drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlp_jax.clients.outcomes import ClientStatus
from fedlp_jax.errors import FedLPError, check_array
from fedlp_jax.reporting.frames import clients_frame
from fedlp_jax.types import RoundMetrics

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from pandas import DataFrame

# The numbers of `ClientStatus`, and one more: it arrived with an update that is not finite.
OUTCOMES = (*(status.name.lower() for status in ClientStatus), "left_out")
_BATCH = 64  # rounds
_QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)


class ClientHistory:
    """The clients of all rounds, by round and within a round by id; P rows in all.

    `history["loss"]` is a column:

        round      i32[P], from 1
        client     i32[P], id
        level      i32[P], submodel level, from 0
        examples   i64[P], examples that the client holds
        outcome    str[P], "arrived"; or why the server has nothing of it: "left_out" (an update
                   that is not finite), "unavailable", "dropped", "late", "surplus"
        corrupt    bool[P], it was corrupt, see `fl.Faults`
        kept       bool[P, L], layers that it sent, in the order of `result.layers.names`
        loss, ...  f32[P], the task's metrics while training, over all examples seen; NaN for
                   clients that did not arrive

    A row takes 14 bytes, 4 for each metric, and a bit for each layer.

    Attributes:
      sizes: `i64[K]`, examples of every client, drawn or not.
    """

    def __init__(
        self,
        metrics: Sequence[str] = ("loss", "accuracy"),
        layers: Sequence[str] = (),
        sizes: ArrayLike = (),
    ):
        """Makes an empty table.

        Args:
          metrics: names of the task's metrics.
          layers: names of the L layers.
          sizes: `i64[K]`, examples of each client.
        """
        self._metrics, self._layers = tuple(metrics), tuple(layers)
        self.sizes: np.ndarray = np.asarray(sizes, np.int64)
        self._row = np.dtype(
            [
                ("round", np.int32),
                ("client", np.int32),
                ("level", np.int32),
                ("outcome", np.int8),
                ("corrupt", np.bool_),
                ("kept", np.uint8, (-(-len(self._layers) // 8),)),
                ("metrics", np.float32, (len(self._metrics),)),
            ]
        )
        self._parts: list[np.ndarray] = []  # rows of several rounds
        self._fresh: list[tuple[np.ndarray, ...]] = []  # rounds that are not rows yet

    def add(
        self,
        round: int,
        client: np.ndarray,
        level: np.ndarray,
        metrics: RoundMetrics,
        arrived: np.ndarray,
    ) -> None:
        """Adds one round.

        Args:
          round: its number.
          client: `i64[C]`, ids, ascending.
          level: `i32[C]`.
          metrics: numpy, `[C, ...]`.
          arrived: `bool[C]`.
        """
        status = corrupt = np.zeros(len(client), bool)  # all arrived
        if metrics.outcomes:
            status, corrupt = metrics.outcomes.status, metrics.outcomes.corrupt
        where = (np.full(len(client), round), client, level)
        what: Any = (status, corrupt, arrived, metrics.client.finite, metrics.upload)
        sums: Any = (x for name in self._metrics for x in metrics.client.means[name])
        self._fresh.append((*where, *what, *sums))
        if len(self._fresh) == _BATCH:
            self._pack()

    def _pack(self) -> None:
        """Turns the rounds added last into rows: many at once, which takes a tenth of the time."""
        if not self._fresh:
            return
        columns: Any = map(np.concatenate, zip(*self._fresh, strict=True))
        round, client, level, status, corrupt, arrived, finite, upload, *sums = columns
        rows = np.zeros(len(client), self._row)
        rows["round"], rows["client"], rows["level"] = round, client, level
        rows["outcome"] = np.where(arrived & ~finite, OUTCOMES.index("left_out"), status)
        rows["corrupt"], rows["kept"] = corrupt, np.packbits(upload > 0, axis=1)
        for i, (total, weight) in enumerate(zip(sums[::2], sums[1::2], strict=True)):
            mean = np.full(len(client), np.nan, np.float32)
            np.divide(total, weight, out=mean, where=arrived & (weight > 0))
            rows["metrics"][:, i] = mean
        self._parts.append(rows)
        self._fresh = []

    def __getitem__(self, key: str) -> np.ndarray:
        """A column, see the class.

        Raises:
          KeyError: there is none of that name.
        """
        rows = self._table()
        if key in ("round", "client", "level", "corrupt"):
            return rows[key].copy()
        if key == "examples":
            return self.sizes[rows["client"]]
        if key == "outcome":
            return np.asarray(OUTCOMES)[rows["outcome"]]
        if key == "kept":
            layers = len(self._layers)
            return np.unpackbits(rows["kept"], axis=1, count=layers).astype(bool)
        if key in self._metrics:
            return rows["metrics"][:, self._metrics.index(key)].copy()
        raise KeyError(f"clients have no '{key}'; there are: {', '.join(self.keys())}")

    def keys(self) -> list[str]:
        """The names of all columns."""
        known = ["round", "client", "level", "examples", "outcome", "corrupt", "kept"]
        return [*known, *self._metrics]

    def __repr__(self) -> str:
        """How many rows there are, and the columns."""
        return f"ClientHistory({len(self):,} rows: {', '.join(self.keys())})"

    def __len__(self) -> int:
        return len(self._table())

    def quantiles(self, key: str, q: ArrayLike = _QUARTERS) -> np.ndarray:
        """Quantiles of a column over the clients of each round.

        Args:
          key: a column of numbers, such as "loss".
          q: `f64[Q]`, in [0, 1]; by default the minimum, the quartiles and the maximum.

        Returns:
          `f64[R, Q]` for the R rounds of `np.unique(history["round"])`; clients without a number
          are left out, and a round without any has NaN.

        Raises:
          FedLPError: `q` is out of range, or the column is not of numbers.
        """
        q = np.atleast_1d(check_array("q", q, ge=0, le=1))
        values = self[key]
        if values.ndim != 1 or values.dtype.kind not in "fi":
            numbers = ", ".join(("examples", *self._metrics))
            raise FedLPError(f"'{key}' has no quantiles; columns of numbers are {numbers}.")
        rounds, first = np.unique(self["round"], return_index=True)
        found = np.full((len(rounds), len(q)), np.nan)
        for place, of_round in enumerate(np.split(values, first[1:])):
            known = of_round[~np.isnan(of_round)]
            if len(known):
                found[place] = np.quantile(known.astype(np.float64), q)
        return found

    def latest(self, key: str) -> np.ndarray:
        """The last value of each client in a column of numbers.

        Returns:
          `f64[K]`; NaN = the client has none.
        """
        latest = np.full(len(self.sizes), np.nan)
        values = self[key].astype(np.float64)
        known = ~np.isnan(values)
        latest[self["client"][known]] = values[known]  # a later one overwrites
        return latest

    def columns(self) -> dict[str, np.ndarray]:
        """All columns, and `layers`, the names of the columns of `kept`: what `clients.npz` has."""
        return {key: self[key] for key in self.keys()} | {"layers": np.asarray(self._layers, str)}

    def to_frame(self) -> DataFrame:
        """The table as a pandas data frame, with a column `kept_LAYER` for each layer.

        Raises:
          FedLPError: pandas is not installed.
        """
        return clients_frame(self.columns())

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything so far, for `load`."""
        return {"rows": self._table().view(np.uint8)}

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Restores the table that returned these `arrays`."""
        self._parts, self._fresh = [arrays["rows"].copy().view(self._row)], []

    def _table(self) -> np.ndarray:
        """All rows; joins the parts, so that the next call need not."""
        self._pack()
        joined: Any = np.concatenate([np.zeros(0, self._row), *self._parts])
        self._parts = [joined]
        return joined
