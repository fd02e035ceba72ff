"""The effect of attacks, slow clients and noise on FedLP, and of the defences against them.

    python -m benchmarks.robustness [--json FILE] [--seeds N] [--smoke]

On the embedded digits, 100 clients, an MLP of one hidden layer, FedLP-Homo at keep .5. Three
tables; accuracies are those of the last round, a mean over seeds with the lowest and the highest:

* attacks: every robust rule against a fixed fifth of all clients that send corrupt updates. Rules
  assume a share of .3, because a round may draw more than a fifth.
* time: modelled seconds to 90% accuracy when clients' machines and links differ, by the share of
  layers that are sent, without and with a deadline. Bytes and multiply-accumulates are exact; the
  speed of a client's machine is assumed (`PROFILE`).
* privacy: accuracy and epsilon by noise; needs the extra `privacy`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import optax

import fedlp_jax as fl
from benchmarks import command

CLIENTS, COHORT, KEEP = 100, 40, 0.5
_SMOKE_ROWS = 2  # of each table
ATTACKS = {
    "none": None,
    "sign_flip x 5": fl.Corruption("sign_flip", 0.2, strength=5.0),
    "scale x 10": fl.Corruption("scale", 0.2, strength=10.0),
    "gaussian": fl.Corruption("gaussian", 0.2),
    "label_flip": fl.Corruption("label_flip", 0.2),
    "nan": fl.Corruption("nan", 0.2),
}
RULES: dict[str, dict[str, Any]] = {
    "masked_mean": {},
    "masked_mean, clip 1": {"clip": 1.0},
    "median": {"aggregator": "median"},
    "trimmed_mean": {"aggregator": {"name": "trimmed_mean", "trim": 0.3}},
    "krum": {"aggregator": {"name": "krum", "byzantine": 0.3}},
    "multi_krum": {"aggregator": {"name": "multi_krum", "byzantine": 0.3}},
    "geometric_median": {"aggregator": "geometric_median"},
}
# Phones on mobile links: 1 MB/s down, a fifth of that up, each with a wide spread.
PROFILE = fl.Profile(compute=1e9, download=1e6, upload=2e5, spread=1.0)


def main() -> None:
    """Makes the three tables and prints each row."""
    parser = command.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    fl.setup()
    rounds, seeds = (3, range(1)) if options.smoke else (60, range(options.seeds))
    results: dict[str, list[dict[str, Any]]] = {"attacks": [], "time": [], "privacy": []}
    for name, rows in (("attacks", attacks), ("time", times), ("privacy", private)):
        for row in itertools.islice(rows(rounds, seeds), _SMOKE_ROWS if options.smoke else None):
            results[name].append(row)
            print(name, json.dumps(row), flush=True)
    command.write(options.json, {"rounds": rounds} | results)


def attacks(rounds: int, seeds: Sequence[int]) -> Any:
    """Every rule against every attack."""
    for attack, corruption in ATTACKS.items():
        for rule, settings in RULES.items():
            faults = fl.Faults(corruption=corruption)
            runs = [_run(rounds, seed, faults=faults, **settings) for seed in seeds]
            yield {"attack": attack, "rule": rule} | _accuracy(runs)


def times(rounds: int, seeds: Sequence[int]) -> Any:
    """Modelled seconds to 90%, of one model for each share of layers kept."""
    for deadline in (None, 1.0):
        for keep in (1.0, 0.7, 0.5, 0.3):
            faults = fl.Faults(profile=PROFILE, deadline=deadline)
            runs = [_run(rounds, seed, faults=faults, keep=keep, eval_every=1) for seed in seeds]
            yield {
                "keep": keep,
                "deadline": deadline,
                "seconds_to_90": [_time_to(run, 0.9) for run in runs],
                "seconds_a_round": float(np.mean([r.history["simulated_time"] for r in runs])),
                "late_share": float(
                    np.mean([r.history["late"] / r.history["chosen"] for r in runs])
                ),
            } | _accuracy(runs)


def private(rounds: int, seeds: Sequence[int]) -> Any:
    """Accuracy against epsilon, of norms clipped to 1."""
    for noise in (0.2, 0.5, 1.0, 2.0):
        settings = {
            "privacy": fl.Privacy(clip=1.0, noise_multiplier=noise, delta=1e-3),
            "aggregator": "inverse_probability",
            "weighting": "uniform",
        }
        runs = [_run(rounds, seed, **settings) for seed in seeds]
        epsilon = float(runs[0].history["epsilon"][-1])
        yield {"noise_multiplier": noise, "delta": 1e-3, "epsilon": epsilon} | _accuracy(runs)


def _run(
    rounds: int,
    seed: int,
    faults: fl.Faults | None = None,
    keep: float = KEEP,
    eval_every: int | None = None,
    **settings: Any,
) -> fl.Result:
    data = fl.load("digits")
    clients = fl.partition.iid(data.train.labels, clients=CLIENTS, seed=seed)
    algorithm = fl.fedlp_homo(
        fl.classification(fl.models.MLP(hidden=(64,), num_classes=10)),
        keep=keep,
        client_optimizer=optax.sgd(0.1),
        epochs=5,
        batch_size=5,
        **settings,
    )
    return fl.simulate(
        algorithm,
        data,
        clients,
        rounds=rounds,
        cohort=COHORT,
        seed=seed,
        faults=faults,
        eval_every=eval_every,
    )


def _accuracy(runs: Sequence[fl.Result]) -> dict[str, float]:
    last = [float(run.history["test_accuracy"][-1]) for run in runs]
    return {"accuracy": float(np.mean(last)), "lowest": min(last), "highest": max(last)}


def _time_to(run: fl.Result, accuracy: float) -> float | None:
    """Modelled seconds until a test first reaches this accuracy."""
    passed = np.cumsum(run.history["simulated_time"])
    reached = np.flatnonzero(run.history["test_accuracy"] >= accuracy)
    return float(passed[reached[0]]) if len(reached) else None


if __name__ == "__main__":
    main()
