"""EarlyStop: ends a run at a target, or after rounds without progress."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from fedlp_jax.errors import FedLPError, check_number, nearest, shown, warn
from fedlp_jax.reporting.metrics import headline, smaller_is_better


@dataclasses.dataclass(frozen=True)
class EarlyStop:
    """When a run ends before its last round. At least one of the two conditions is given.

    The device runs ahead of the host, so a run may do one dispatch of rounds more.

    Attributes:
      target: stop once the metric is at least this, or at most this for a loss or an error.
      patience: stop after this many evaluations without a new best value.
      metric: key of a row, such as "train_loss"; None = test accuracy, of personal models where
        clients keep layers for themselves, or the test loss where there is no accuracy.
      min_delta: by how much a value must beat the best one to count as progress.
    """

    target: float | None = None
    patience: int | None = None
    metric: str | None = None
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        if self.target is None and self.patience is None:
            raise FedLPError("early_stop needs a target, a patience, or both.")
        if self.target is not None:
            check_number("early_stop.target", self.target)
        if self.patience is not None:
            check_number("early_stop.patience", self.patience, ge=1, integer=True)
        check_number("early_stop.min_delta", self.min_delta, ge=0)
        if self.metric is not None and not (isinstance(self.metric, str) and self.metric):
            raise FedLPError(f"early_stop.metric={shown(self.metric)} must be the key of a row.")


class Watch:
    """An `EarlyStop` over the rows of one run.

    Attributes:
      reason: why the run stops; None = it goes on.
    """

    def __init__(self, rule: EarlyStop | None, rows: Iterable[Mapping[str, Any]] = ()):
        """Watches for a rule; None never stops. `rows` are those of before, in a resumed run."""
        self.reason: str | None = None
        self._rule, self._best, self._since = rule, -float("inf"), 0
        self._first = True
        for row in rows:
            self.update(row)

    @property
    def stops(self) -> bool:
        """Whether the run stops."""
        return self.reason is not None

    def update(self, row: Mapping[str, Any]) -> None:
        """Takes one more row; those without the metric do not count."""
        rule, first, self._first = self._rule, self._first, False
        if rule is None or self.stops:
            return
        if first and rule.metric is not None and not rule.metric.startswith("test_"):
            _warn_of_missing(rule.metric, row)
        metric = rule.metric or headline(row)
        if metric is None or (value := row.get(metric)) is None:
            return
        sign = -1.0 if smaller_is_better(metric) else 1.0
        if sign * value > self._best + rule.min_delta:
            self._best, self._since = sign * value, 0
        else:
            self._since += 1
        where = f"in round {row['round']}"
        if rule.target is not None and sign * value >= sign * rule.target:
            self.reason = f"{metric} reached {value:.6g} {where} (target {rule.target:g})"
        elif rule.patience is not None and self._since >= rule.patience:
            self.reason = (
                f"{metric} has not beaten {sign * self._best:.6g} in {rule.patience} "
                f"evaluations, {where}"
            )


def _warn_of_missing(metric: str, row: Mapping[str, Any]) -> None:
    """Warns of a metric that the first row lacks; those of evaluations are checked before a run."""
    if metric not in row:
        warn(
            f"no row has early_stop.metric={shown(metric)}{nearest(metric, row) or '.'} Rows have "
            f"{', '.join(row)}; the run does not stop early.",
            stacklevel=4,
        )
