"""Which of two values of a metric is the better one."""

from __future__ import annotations


def smaller_is_better(metric: str) -> bool:
    """Whether smaller values of a row's key are better: those of losses and errors."""
    return "loss" in metric or "error" in metric
