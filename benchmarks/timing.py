"""Timing: contenders alternate, after one untimed turn each."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import TypeVar

import fedlp_jax as fl
from benchmarks import parts
from benchmarks.workloads import Workload
from fedlp_jax.simulation.tuning import Rounds as Rounds

Name = TypeVar("Name")


def rounds_of(workload: Workload, plan: fl.Plan | None = None) -> Rounds:
    """FedAvg on a workload."""
    data = parts.dataset(workload)
    clients = parts.partition(workload, data)
    algorithm = parts.algorithm(workload)
    return Rounds(algorithm, data, clients, cohort=workload.cohort, plan=plan)


def alternate(
    contenders: Mapping[Name, Callable[[], float]], repeats: int
) -> dict[Name, list[float]]:
    """Seconds of each contender's turns, without the first."""
    times: dict[Name, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, contender in contenders.items():
            seconds = contender()
            if turn:
                times[name].append(seconds)
    return times


def spread(times: list[float], scale: float = 1.0) -> dict[str, float]:
    """Minimum, median and maximum, in units of `1 / scale` seconds."""
    return {
        "min": scale * min(times),
        "median": scale * statistics.median(times),
        "max": scale * max(times),
    }
