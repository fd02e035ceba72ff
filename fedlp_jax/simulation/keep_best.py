"""KeepBest: keeps the model of the round that tested best."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fedlp_jax.errors import FedLPError, shown, warn
from fedlp_jax.execution import processes
from fedlp_jax.reporting.metrics import headline, smaller_is_better
from fedlp_jax.reporting.variables import load_variables, note_of, save_with_note
from fedlp_jax.types import Variables


@dataclasses.dataclass(frozen=True)
class KeepBest:
    """Which model is kept besides the last: `result.best`.

    A copy of the model is made at each evaluation, on the device; the best one lies in the host's
    memory.

    Attributes:
      metric: key of a row that is tested, such as "test_loss"; None = as for `EarlyStop`. Smaller
        is better for losses and errors; NaN is never best.
      path: a `.npz` file for the best model, replaced at each improvement; None = none.
    """

    metric: str | None = None
    path: str | Path | None = None

    def __post_init__(self) -> None:
        if self.metric is not None and not str(self.metric).startswith("test_"):
            raise FedLPError(
                f"keep_best.metric={shown(self.metric)} must be a metric of evaluations, such as "
                "test_accuracy."
            )


class Best(NamedTuple):
    """The model of the best evaluation."""

    metric: str
    value: float
    round: int
    variables: Variables | None  # all that the server held, numpy; None = of before, and not saved


def _note(best: Best) -> str:
    """What the file says of its model, so that a resumed run does not take it for another."""
    return json.dumps({"metric": best.metric, "round": best.round})


class Keeper:
    """A `KeepBest` over the rows of one run.

    Attributes:
      best: so far; None before the first evaluation.
    """

    def __init__(self, rule: KeepBest, rows: Iterable[Mapping[str, Any]] = ()):
        """Keeps by a rule; `rows` are those of before, in a resumed run, with its file if any."""
        self.best: Best | None = None
        self._rule = rule
        for row in rows:
            self.best = self._better(row) or self.best
        note = None if rule.path is None else note_of(rule.path)
        if self.best is None or rule.path is None or note is None:
            return
        if note == _note(self.best):
            self.best = self.best._replace(variables=load_variables(rule.path))
        else:
            warn(
                f"{rule.path} holds another model than that of round {self.best.round}, the best "
                f"by {self.best.metric} so far, which was not saved; the next better one "
                "replaces it.",
                stacklevel=2,
            )

    def update(self, row: Mapping[str, Any], variables: Variables) -> None:
        """Takes the model that a row was tested with."""
        best = self._better(row)
        if best is None:
            return
        kept = jax.tree.map(np.asarray, variables)
        self.best = best._replace(variables=kept)
        if self._rule.path is not None and processes.is_first():
            save_with_note(self._rule.path, kept, _note(self.best))

    def _better(self, row: Mapping[str, Any]) -> Best | None:
        """What a row says of its model, if that is better than the best so far."""
        metric = self._rule.metric or headline(row)
        value = None if metric is None else row.get(metric)
        if metric is None or value is None or math.isnan(value):
            return None
        sign = -1.0 if smaller_is_better(metric) else 1.0
        if self.best is not None and sign * value <= sign * self.best.value:
            return None
        return Best(metric, value, row["round"], None)
