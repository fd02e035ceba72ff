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

import json
import statistics
from typing import Any

import optax

import fedlp_jax as fl
from benchmarks import command
from benchmarks.timing import Rounds, alternate, spread

_FEATURES = 64
_PER_CLIENT = 8


def main() -> None:
    """Runs both and prints a line each."""
    options = command.parser(__doc__).parse_args()
    fl.setup()
    repeats = 3 if options.smoke else 15
    results = {
        "population": population(1_000, 20_000 if options.smoke else 1_000_000, repeats),
        "cohort": cohorts((8,) if options.smoke else (8, 32, 128, 512), repeats),
    }
    for name, rows in results.items():
        for row in rows:
            print(name, json.dumps(row))
    command.write(options.json, results)


def population(small: int, large: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds of a round of 100 clients out of K."""
    runs = {
        clients: _rounds(clients, cohort=100, plan=fl.Plan(width=1)) for clients in (small, large)
    }
    times = alternate(runs, repeats)
    base = statistics.median(times[small])
    return [
        {"clients": k, "seconds": spread(t), "ratio_to_smallest": statistics.median(t) / base}
        for k, t in times.items()
    ]


def cohorts(sizes: tuple[int, ...], repeats: int) -> list[dict[str, Any]]:
    """Seconds of a round of C clients, one at a time and all vmapped."""
    runs = {
        (size, width): _rounds(1_000, cohort=size, plan=fl.Plan(devices=1, width=width))
        for size in sizes
        for width in (1, size)
    }
    times = alternate(runs, repeats)
    return [
        {
            "cohort": size,
            "width": width,
            "seconds": spread(t),
            "ms_per_client": 1e3 * statistics.median(t) / size,
        }
        for (size, width), t in times.items()
    ]


def _rounds(clients: int, cohort: int, plan: fl.Plan) -> Rounds:
    """A small model and few examples a client, so that nothing but the round itself is seen."""
    data = fl.load(
        "synthetic", examples=clients * _PER_CLIENT, shape=(_FEATURES,), num_classes=10, seed=0
    )
    partition = fl.partition.iid(data.train.labels, clients=clients, seed=0)
    task = fl.classification(fl.models.MLP(hidden=(128, 64), num_classes=10))
    algorithm = fl.fedlp_homo(
        task, keep=0.5, client_optimizer=optax.sgd(0.1), epochs=1, batch_size=4
    )
    return Rounds(algorithm, data, partition, cohort=cohort, plan=plan)


if __name__ == "__main__":
    main()
