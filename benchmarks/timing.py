"""How everything here is timed: contenders take turns, after a turn that does not count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import fedlp_jax as fl
from benchmarks import parts
from benchmarks.workloads import Workload

Name = TypeVar("Name")


class Rounds:
    """A simulation, compiled when it is made; each call runs one more round, without a test.

    Attributes:
      run: the simulation.
      compile_seconds: tracing, lowering and compiling the round.
    """

    def __init__(self, *arguments: Any, **settings: Any):
        """Compiles a `fl.Simulation` of these arguments."""
        self.run = fl.Simulation(*arguments, rounds=10**6, **settings)
        self.run.compile()
        self.compile_seconds = sum(
            self.run.readings[f"round_{part}_seconds"] for part in ("trace", "lowering", "compile")
        )
        self.number = 0

    def __call__(self) -> float:
        """Seconds of a round: laying the cohort out, running it, reading its numbers."""
        self.number += 1
        start = time.perf_counter()
        self.run.read(self.run.dispatch(self.number))
        return time.perf_counter() - start


def rounds_of(workload: Workload, plan: fl.Plan | None = None) -> Rounds:
    """FedAvg on a workload."""
    data = parts.dataset(workload)
    clients = parts.partition(workload, data)
    algorithm = parts.algorithm(workload)
    return Rounds(algorithm, data, clients, cohort=workload.cohort, plan=plan)


def alternate(
    contenders: Mapping[Name, Callable[[], float]], repeats: int
) -> dict[Name, list[float]]:
    """Seconds of each contender's turns; what it returns in the first turn does not count."""
    times: dict[Name, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, contender in contenders.items():
            seconds = contender()
            if turn:
                times[name].append(seconds)
    return times


def spread(times: list[float], scale: float = 1.0) -> dict[str, float]:
    """Least, median and largest, in units of `1 / scale` seconds."""
    return {
        "min": scale * min(times),
        "median": scale * statistics.median(times),
        "max": scale * max(times),
    }
