"""Which metric stands for a run, and which of two of its values is the better one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_HEADLINES = ("test_accuracy", "test_accuracy_personal", "test_loss", "test_loss_personal")


def smaller_is_better(metric: str) -> bool:
    """Whether smaller values of a row's key are better: those of losses and errors."""
    return "loss" in metric or "error" in metric


def headline(row: Mapping[str, Any]) -> str | None:
    """The test metric that stands for a round: accuracy, or else the loss; None = not tested."""
    return next((key for key in _HEADLINES if row.get(key) is not None), None)


def headline_of(rows: Iterable[Mapping[str, Any]], default: str = "train_loss") -> str:
    """The test metric that stands for runs: the first by `headline` that a row has."""
    have = {key for row in rows for key in _HEADLINES if row.get(key) is not None}
    return next((key for key in _HEADLINES if key in have), default)
