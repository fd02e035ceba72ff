"""What a round costs as the cohort and the population grow.

    python -m benchmarks.scaling [--json FILE] [--smoke]

Two questions, each with its contenders alternated in one process, after a warm-up round, medians
over repeats:

* population: the same 100 clients a round out of 1,000 and out of 1,000,000. A round must not feel
  the population.
* cohort: 8 to 512 clients a round, in a loop (width 1) and vmapped all at once. Time a round must
  be linear in the cohort.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import optax

import fedlp_jax as fl
from fedlp_jax.report import environment

_FEATURES = 64
_PER_CLIENT = 8


def main() -> None:
    """Runs both and prints a line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it works")
    options = parser.parse_args()
    fl.setup()
    repeats = 3 if options.smoke else 15
    results = {
        "population": population(1_000, 20_000 if options.smoke else 1_000_000, repeats),
        "cohort": cohorts((8, 32) if options.smoke else (8, 32, 128, 512), repeats),
    }
    for name, rows in results.items():
        for row in rows:
            print(name, json.dumps(row))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results | environment(), file, indent=2)


def population(small: int, large: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds of a round of 100 clients out of K."""
    runs = {
        clients: _rounds(clients, cohort=100, plan=fl.Plan(width=1)) for clients in (small, large)
    }
    times = _alternate(runs, repeats)
    base = statistics.median(times[small])
    return [
        {"clients": k, **_summary(t), "ratio_to_smallest": statistics.median(t) / base}
        for k, t in times.items()
    ]


def cohorts(sizes: tuple[int, ...], repeats: int) -> list[dict[str, Any]]:
    """Seconds of a round of C clients, one at a time and all vmapped."""
    runs = {
        (size, width): _rounds(1_000, cohort=size, plan=fl.Plan(devices=1, width=width))
        for size in sizes
        for width in (1, size)
    }
    times = _alternate(runs, repeats)
    return [
        {
            "cohort": size,
            "width": width,
            **_summary(t),
            "ms_per_client": 1e3 * statistics.median(t) / size,
        }
        for (size, width), t in times.items()
    ]


def _rounds(clients: int, cohort: int, plan: fl.Plan) -> Callable[[], float]:
    """A function that runs one more round and returns its seconds."""
    data = fl.load(
        "synthetic", examples=clients * _PER_CLIENT, shape=(_FEATURES,), num_classes=10, seed=0
    )
    partition = fl.partition.iid(data.train.labels, clients=clients, seed=0)
    task = fl.classification(fl.models.MLP(hidden=(128, 64), num_classes=10))
    algorithm = fl.fedlp_homo(
        task, keep=0.5, client_optimizer=optax.sgd(0.1), epochs=1, batch_size=4
    )
    run = fl.Simulation(algorithm, data, partition, rounds=10**6, cohort=cohort, plan=plan)
    run.compile()
    state = {"round": 0}

    def once() -> float:
        state["round"] += 1
        start = time.perf_counter()
        run.read(run.dispatch(state["round"]))
        return time.perf_counter() - start

    once()
    return once


def _alternate(runs: dict[Any, Callable[[], float]], repeats: int) -> dict[Any, list[float]]:
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, once in runs.items():
            times[name].append(once())
    return times


def _summary(times: list[float]) -> dict[str, float]:
    return {
        "seconds_min": min(times),
        "seconds_median": statistics.median(times),
        "seconds_max": max(times),
    }


if __name__ == "__main__":
    main()
