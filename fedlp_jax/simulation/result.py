"""What a run leaves: its rows, its ledger, its model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlp_jax.accounting.ledger import Ledger
from fedlp_jax.execution.plan import Plan
from fedlp_jax.pruning.layers import LayerTable
from fedlp_jax.reporting import plots
from fedlp_jax.reporting.frames import frame
from fedlp_jax.reporting.metrics import headline, headline_of
from fedlp_jax.simulation.client_history import ClientHistory
from fedlp_jax.simulation.keep_best import Best
from fedlp_jax.simulation.personal import ClientModels
from fedlp_jax.types import ServerState, Variables

if TYPE_CHECKING:
    from pandas import DataFrame

Row = dict[str, Any]
_WAYS = ("up", "down")


class DivergedError(RuntimeError):
    """No client of a round had a finite update. `result` holds the last good state."""

    def __init__(self, message: str, result: Result):
        super().__init__(message)
        self.result = result

    def __reduce__(self) -> Any:
        """Pickles the result too, so that an error returns whole from another process."""
        return type(self), (str(self), self.result), self.__dict__


class History:
    """The rows of a run, one a round; `history["test_accuracy"]` is a column."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def __getitem__(self, key: str) -> np.ndarray:
        """The values of `key` over the rounds that have it (see `rounds`).

        Raises:
          KeyError: no round has it.
        """
        values = [row[key] for row in self.rows if key in row]
        if not values:
            raise KeyError(f"no round has '{key}'; there are: {', '.join(self.keys())}")
        return np.asarray([np.nan if v is None else v for v in values])

    def rounds(self, key: str) -> np.ndarray:
        """`i64[R']`, the rounds that have `key`, such as those that were evaluated."""
        return np.asarray([row["round"] for row in self.rows if key in row], np.int64)

    def keys(self) -> list[str]:
        """All metrics, in the order in which they first appeared."""
        return list(dict.fromkeys(key for row in self.rows for key in row))

    def to_frame(self) -> DataFrame:
        """The rows as a pandas data frame; NaN where a round lacks a number.

        Raises:
          FedLPError: pandas is not installed.
        """
        return frame(self.rows)

    def __repr__(self) -> str:
        """The rounds, and the metrics that they have."""
        if not self.rows:
            return "History(no rounds)"
        first, last = self.rows[0]["round"], self.rows[-1]["round"]
        return f"History(rounds {first} to {last}: {', '.join(self.keys())})"

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


@dataclasses.dataclass
class Result:
    """What a run leaves.

    Attributes:
      variables: the deepest model's, `{"params": ..., "batch_stats": ...}`.
      state: the server's whole state, with shared heads where there are any.
      history: one row a round.
      costs: the ledger.
      plan: the plan that ran.
      layers: the layer table of what is exchanged.
      readings: seconds of tracing, lowering, compilation and running; padded share and imbalance.
      lowerings: the form that each convolution took, by its shapes.
      clients: who took part in each round, with their losses and what became of them.
      models: what each client computes with, `models[k]`, where clients keep a part of it; None
        elsewhere.
      warnings: what was assumed of model, data and environment, or went wrong, as it was said.
      stopped: why `early_stop` ended the run; None = it did not. Of a run of a sweep that diverged,
        the error.
      best: the model of the best evaluation, if `keep_best` asks for it.
      label: of its algorithm in a sweep.
      seed: of all draws.
    """

    variables: Variables
    state: ServerState
    history: History
    costs: Ledger
    plan: Plan
    layers: LayerTable
    readings: dict[str, float]
    lowerings: dict[str, str] = dataclasses.field(default_factory=dict)
    clients: ClientHistory = dataclasses.field(default_factory=ClientHistory)
    models: ClientModels | None = None
    warnings: list[str] = dataclasses.field(default_factory=list)
    stopped: str | None = None
    best: Best | None = None
    label: str = ""
    seed: int = 0

    def __repr__(self) -> str:
        """The run in a line, without its arrays."""
        tested = next((row for row in reversed(self.history.rows) if headline(row)), None)
        key = headline(tested) if tested else None
        words = [f"{len(self.history)} rounds"]
        if tested is not None and key is not None:
            words.append(f"{key.replace('_', ' ')} {tested[key]:.4f} in round {tested['round']}")
        if self.best is not None:
            words.append(f"best {self.best.value:.4f} in round {self.best.round}")
        words += [f"{self.costs.total[f'{way}load_bytes'] / 1e6:,.4g} MB {way}" for way in _WAYS]
        words.append(f"{self.layers.params.sum():,} parameters in {len(self.layers)} layers")
        return f"Result({', '.join(words)})"

    def to_frame(self) -> DataFrame:
        """The history as a pandas data frame, see `History.to_frame`."""
        return self.history.to_frame()

    def plot(self, path: str | None = None, x: str = "round", label: str = "run") -> Any:
        """Test accuracy against an `x` of `plots.curves`; returns the matplotlib figure.

        A task without accuracy shows its test loss.
        """
        rows = self.history.rows
        y = headline_of(rows, "test_accuracy")
        return plots.curves({label: rows}, path=path, x=x, y=y)


def diverged(round: int, left_out: np.ndarray, clients: int, result: Result) -> DivergedError:
    """The error raised when a round leaves no finite model.

    Args:
      round: its number.
      left_out: ids of the clients whose update was not finite.
      clients: how many sent an update.
      result: the run up to the round before.
    """
    if len(left_out) == clients:
        what = (
            f"none of the {clients} clients had a finite update ({names(left_out)}), so there is "
            "nothing to average"
        )
    else:
        what = (
            f"the updates of {clients - len(left_out)} clients are finite, but not the model they "
            "add up to"
        )
    return DivergedError(
        f"round {round}: {what}. The model is as after round {round - 1}; lower the client's or "
        "the server's learning rate, or look for NaN in the data.",
        result,
    )


def names(clients: np.ndarray) -> str:
    """The first ten ids in a sentence."""
    return ", ".join(map(str, clients[:10])) + (", ..." if len(clients) > 10 else "")
