"""How soon does a server that does not wait reach an accuracy? Modelled seconds, not a clock's.

    python -m benchmarks.asynchrony [--target A] [--spread S] [--json FILE] [--smoke]

Digits, 100 clients, Dirichlet(0.3), logistic regression; 20 clients train at a time. FedAvg waits
for the slowest of each 20; FedBuff takes them five at a time and FedAsync one by one. `--spread` is
the standard deviation of the logarithm of each device's speeds, see `fl.Profile`; 0 = all devices
are alike. Accuracy is tested after every 20 arrivals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import optax

import fedlp_jax as fl
from benchmarks import command

_FLIGHT = 20
_SEEDS = (0, 1, 2)


def main() -> None:
    """Runs it."""
    parser = command.parser(__doc__)
    parser.add_argument("--target", type=float, default=0.85, help="test accuracy")
    parser.add_argument("--spread", type=float, default=1.0, help="of the devices' speeds")
    options = parser.parse_args()
    fl.setup()
    if options.smoke:
        result = measure(options.target, options.spread, arrivals=2 * _FLIGHT, seeds=(0,))
    else:
        result = measure(options.target, options.spread)
    show(result)
    command.write(options.json, result)


def measure(
    target: float, spread: float, arrivals: int = 100 * _FLIGHT, seeds: Sequence[int] = _SEEDS
) -> dict[str, Any]:
    """Runs each algorithm until so many clients have arrived.

    Args:
      target: a test accuracy.
      spread: of the devices' speeds.
      arrivals: of each run; a multiple of 20.
      seeds: of the runs.
    """
    data = fl.load("digits")
    clients = fl.partition.dirichlet(data.train.labels, clients=100, alpha=0.3, seed=0)
    task = fl.classification(fl.models.Logistic(num_classes=10))
    profile = fl.Profile(compute=1e6, download=1e5, upload=1e5, spread=spread)
    common: dict[str, Any] = {
        "client_optimizer": optax.sgd(0.1),
        "epochs": 2,
        "batch_size": 10,
        "weighting": "uniform",
    }
    contenders = {
        "fedavg": (fl.fedavg(task, **common), _FLIGHT, {"faults": fl.Faults(profile=profile)}),
        "fedbuff": (fl.fedbuff(task, buffer=5, profile=profile, **common), 5, {}),
        "fedasync": (
            fl.fedasync(task, alpha=0.3, profile=profile, max_staleness=64, **common),
            1,
            {},
        ),
    }
    rows = {}
    for name, (algorithm, taken, more) in contenders.items():
        histories = [
            fl.simulate(
                algorithm,
                data,
                clients,
                rounds=arrivals // taken,
                cohort=_FLIGHT,
                seed=seed,
                eval_every=_FLIGHT // taken,
                **more,
            ).history
            for seed in seeds
        ]
        rows[name] = {
            "simulated_seconds_to_target": [reached(h.rows, target) for h in histories],
            "simulated_seconds": [float(sum(h["simulated_time"])) for h in histories],
            "accuracy": [float(h["test_accuracy"][-1]) for h in histories],
            "staleness_mean": [
                float(np.mean([row.get("staleness_mean", 0.0) for row in h.rows]))
                for h in histories
            ],
        }
    return {"target": target, "spread": spread, "arrivals": arrivals, "algorithms": rows}


def reached(rows: Sequence[dict[str, Any]], target: float) -> float | None:
    """Modelled seconds until the first evaluation at the target; None = never."""
    seconds = 0.0
    for row in rows:
        seconds += row["simulated_time"]
        if row.get("test_accuracy", 0.0) >= target:
            return seconds
    return None


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    print(f"{result['arrivals']} arrivals, spread {result['spread']:g}; means over the seeds")
    print(f"           modelled seconds to {result['target']:g}   of all   accuracy   staleness")
    for name, row in result["algorithms"].items():
        to_target = row["simulated_seconds_to_target"]
        soon = "never" if None in to_target else f"{np.mean(to_target):.2f}"
        print(
            f"{name:10} {soon:>23} {np.mean(row['simulated_seconds']):10.2f}"
            f" {np.mean(row['accuracy']):10.3f} {np.mean(row['staleness_mean']):11.2f}"
        )


if __name__ == "__main__":
    main()
