"""Is a sweep quicker than its runs one after the other? Keep rates by seeds, on digits.

    python -m benchmarks.sweep [--turns 3] [--json FILE] [--smoke]

5 keep rates and 5 seeds of `configs/quickstart.yaml` (an MLP, 100 clients, cohorts of 10, 60
rounds). `fl.simulate` runs them one after the other, on one device and on all, and `fl.sweep` as
one program. The first turn of each starts with nothing compiled; in later turns the process and
its compilation cache have every program, so what remains is setting up and running; seconds of
rounds leave out the setting up. CPU seconds, of all threads in later turns, depend least on what
else the machine does. The command fails if a mask, a cohort or a count of a run differs.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import optax

import fedlp_jax as fl
from benchmarks import command
from benchmarks.timing import spread

_KEEPS = (0.1, 0.3, 0.5, 0.7, 0.9)
_SEEDS = 5
_ROUNDS = 60
_COUNTED = ("round", "client", "kept", "outcome", "examples")  # columns that are equal to the bit


def main() -> None:
    """Times the contenders in turns, prints and writes the results."""
    parser = command.parser(__doc__)
    parser.add_argument("--turns", type=int, default=3, help="after the first")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEDLP_CACHE_DIR"] = folder  # so that the first turn finds nothing compiled
        if not options.smoke:
            fl.setup()
        result = measure(1 if options.smoke else options.turns, options.smoke)
    print(json.dumps(result, indent=2))
    command.write(options.json, result)


def measure(turns: int, smoke: bool) -> dict[str, Any]:
    """Seconds of the contenders, and how far their results are apart."""
    keeps, seeds, rounds = (_KEEPS[:2], 2, 2) if smoke else (_KEEPS, _SEEDS, _ROUNDS)
    data = fl.load("digits")
    clients = fl.partition.iid(data.train.labels, clients=100, seed=0)
    task = fl.classification(fl.models.MLP(hidden=(64,), num_classes=10))
    settings: dict[str, Any] = {"rounds": rounds, "cohort": 10, "eval_every": 5}

    def algorithms() -> dict[str, fl.Algorithm]:
        local: dict[str, Any] = {"client_optimizer": optax.sgd(1.0), "client_schedule": 0.1}
        local |= {"epochs": 5, "batch_size": 5}
        return {f"keep {keep}": fl.fedlp_homo(task, keep=keep, **local) for keep in keeps}

    def in_turn(devices: int | None) -> list[fl.Result]:
        return [
            fl.simulate(
                algorithm, data, clients, seed=seed, plan=fl.Plan(devices=devices), **settings
            )
            for algorithm in algorithms().values()
            for seed in range(seeds)
        ]

    contenders: dict[str, Callable[[], list[fl.Result]]] = {
        "one device": lambda: in_turn(1),
        "all devices": lambda: in_turn(None),
        "sweep": lambda: fl.sweep(algorithms(), data, clients, seeds=seeds, **settings).runs,
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    in_rounds: dict[str, list[float]] = {name: [] for name in contenders}
    results: dict[str, list[fl.Result]] = {}
    for _ in range(turns + 1):
        for name, contender in contenders.items():
            start, used = time.perf_counter(), time.process_time()
            results[name] = contender()
            times[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - used)
            in_rounds[name].append(sum(run.readings["run_seconds"] for run in results[name]))
    found: dict[str, Any] = {"runs": len(keeps) * seeds, "rounds": rounds}
    for name in contenders:
        found[name] = {
            "first_seconds": times[name][0],
            "later_seconds": spread(times[name][1:]),
            "rounds_seconds": spread(in_rounds[name][1:]),
            "cpu_seconds": spread(cpu[name][1:]),
        }
    found["apart"] = _apart(results["sweep"], results["one device"])
    found["shares"] = {
        kind: _least(found["sweep"], kind)
        / min(_least(found[name], kind) for name in ("one device", "all devices"))
        for kind in ("first_seconds", "later_seconds", "rounds_seconds", "cpu_seconds")
    }
    return found


def _least(times: dict[str, Any], kind: str) -> float:
    """The seconds of a contender: of its first turn, or the median of later ones."""
    seconds: Any = times[kind]
    return float(seconds["median"] if isinstance(seconds, dict) else seconds)


def _apart(runs: list[fl.Result], others: list[fl.Result]) -> dict[str, float]:
    """How far results are apart; fails where they must be equal."""
    accuracy = 0.0
    for run, other in zip(runs, others, strict=True):
        for column in _COUNTED:
            if not np.array_equal(run.clients[column], other.clients[column]):
                raise SystemExit(f"{run.label}, seed {run.seed}: the column {column} differs")
        difference = run.history["test_accuracy"] - other.history["test_accuracy"]
        accuracy = max(accuracy, float(np.abs(difference).max()))
    return {"largest_difference_of_test_accuracy": accuracy}


if __name__ == "__main__":
    main()
