"""KeepBest: keeps the model of the round that tested best."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fedlp_jax.errors import FedLPError, shown
from fedlp_jax.execution import processes
from fedlp_jax.reporting.variables import load_variables, save_variables
from fedlp_jax.types import Variables


@dataclasses.dataclass(frozen=True)
class KeepBest:
    """Which model is kept besides the last: `result.best`.

    A copy of the model is made at each evaluation, on the device; the best one lies in the host's
    memory.

    Attributes:
      metric: key of a row that is tested, such as "test_accuracy". Smaller is better for a loss.
      path: a `.npz` file for the best model, replaced at each improvement; None = none.
    """

    metric: str = "test_accuracy"
    path: str | Path | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.metric, str) and self.metric.startswith("test_")):
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
            if self._improves(row):
                self.best = Best(rule.metric, row[rule.metric], row["round"], None)
        if self.best is not None and rule.path is not None and Path(rule.path).is_file():
            self.best = self.best._replace(variables=load_variables(rule.path))

    def update(self, row: Mapping[str, Any], variables: Variables) -> None:
        """Takes the model that a row was tested with."""
        if not self._improves(row):
            return
        kept = jax.tree.map(np.asarray, variables)
        self.best = Best(self._rule.metric, row[self._rule.metric], row["round"], kept)
        if self._rule.path is not None and processes.is_first():
            save_variables(self._rule.path, kept)

    def _improves(self, row: Mapping[str, Any]) -> bool:
        value = row.get(self._rule.metric)
        if value is None:
            return False
        sign = -1.0 if "loss" in self._rule.metric else 1.0
        return self.best is None or sign * value > sign * self.best.value
