"""The algorithms of the package on one problem: configs/family.yaml (Fashion-MNIST, Dirichlet).

    python -m benchmarks.family [--json FILE] [--seeds 3] [--rounds 100] [--only NAME ...]
                                [--model mlp | resnet] [--smoke]

`resnet` puts a residual network in the place of the MLP, with cohorts of 4 and a test each round.
Every algorithm has the same model, partition, cohorts, batches and client optimizer. Its own
numbers are in `FAMILY`: those of its paper, or the first that worked; none was tuned. Accuracy,
traffic, MACs and simulated seconds are functions of the seed. The measured time is that of the
rounds and their tests, on the machine that the file names. Algorithms with personal layers have no
model for everybody: their accuracy is that of each client's own model on test examples of its own
classes, and does not compare with the others'.

FILE is complete after every algorithm. One that it holds already, of the same seeds, rounds,
machine and commit, is not run again. Algorithms that `--only` does not name stay in FILE; its
`commits` say of which commit each is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fedlp_jax as fl
from benchmarks import command
from benchmarks.machine import machine
from fedlp_jax.config.build import build

CONFIG = Path(__file__).parents[1] / "configs" / "family.yaml"
_SUMS = ("upload_bytes", "download_bytes", "train_macs", "simulated_time", "seconds")
TARGET = 0.8
_COLUMNS = {  # of `fl.compare`, and their titles here
    "run": "algorithm",
    "final test accuracy": "accuracy",
    "rounds to 0.8": "rounds to 80%",
    "upload to 0.8 [MB]": "MB up",
    "download to 0.8 [MB]": "MB down",
    "training to 0.8 [GMAC]": "GMAC",
    "simulated time to 0.8 [s]": "simulated s",
    "training [GMAC]": "GMAC, all rounds",
    "measured time [s]": "measured s, all rounds",
}
_DEVICES = {"compute": 1e9, "download": 1e6, "upload": 2e5, "spread": 0.5}  # as in CONFIG
# Algorithms that have their devices themselves, and how many server steps make one round.
_STEPS = {"FedBuff(5)": 2, "FedAsync": 10}
_MODELS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "resnet": {"model": {"name": "resnet"}, "cohort": 4, "eval_every": 1},
}
_TINY = {"data.name": "synthetic", "partition.clients": 12, "cohort": 6}
FAMILY: dict[str, dict[str, Any]] = {
    "FedAvg": {"name": "fedavg"},
    "FedLP-Homo(0.5)": {"name": "fedlp_homo", "keep": 0.5},
    "FedLP-Homo(0.5), download 0.9": {"name": "fedlp_homo", "keep": 0.5, "download": 0.9},
    "FedLP-Hetero(u)": {"name": "fedlp_hetero", "depths": "uniform"},
    "FedLP-Q(0.5), 15 levels": {"name": "fedlp_q", "keep": 0.5, "levels": 15},
    "FedProx": {"name": "fedprox", "mu": 0.01},
    "FedAvgM": {"name": "fedavgm", "beta": 0.9, "server_learning_rate": 0.3},
    "FedAdagrad": {"name": "fedadagrad", "server_learning_rate": 0.03},
    "FedAdam": {"name": "fedadam", "server_learning_rate": 0.01},
    "FedYogi": {"name": "fedyogi", "server_learning_rate": 0.01},
    "SCAFFOLD": {"name": "scaffold"},
    "FedNova": {"name": "fednova"},
    "FedDyn": {"name": "feddyn", "alpha": 0.01},
    "FedCM": {"name": "fedcm", "alpha": 0.1},
    "FedExP": {"name": "fedexp"},
    "top-k(0.1) + QSGD": {
        "name": "fedavg",
        "upload": [
            {"name": "top_k", "share": 0.1, "error_feedback": True},
            {"name": "quantize", "levels": 15},
        ],
    },
    "InclusiveFL(u)": {"name": "inclusivefl", "depths": "uniform"},
    "DepthFL(u)": {"name": "depthfl", "depths": "uniform", "consistency": 1.0},
    "DepthFL(u) with FedDyn": {
        "name": "depthfl",
        "depths": "uniform",
        "consistency": 1.0,
        "ramp": 30,
        "alpha": 0.1,
    },
    "HeteroFL(1, 1/2, 1/4)": {"name": "heterofl", "widths": [1.0, 0.5, 0.25]},
    "FedRolex(1, 1/2, 1/4)": {"name": "fedrolex", "widths": [1.0, 0.5, 0.25]},
    "Federated Dropout(3/4)": {"name": "federated_dropout", "widths": 0.75},
    "FjORD(0.4, 0.7, 1)": {"name": "fjord", "widths": [0.4, 0.7, 1.0]},
    "FedLP-Homo(0.5), mask first": {"name": "freeze", "keep": 0.5},
    "FedPart": {"name": "fedpart"},
    "FedLDF(5)": {"name": "fedldf", "senders": 5},
    "FedLUAR(1)": {"name": "fedluar", "recycled": 1},
    "FedLAMA(2)": {"name": "fedlama", "interval": 2},
    "FedBuff(5)": {"name": "fedbuff", "buffer": 5, "profile": _DEVICES},
    "FedAsync": {"name": "fedasync", "alpha": 0.6, "profile": _DEVICES},
    "FedPer": {"name": "fedper", "head": "fc3"},
    "FedRep": {"name": "fedrep", "head": "fc3", "head_epochs": 1},
    "FedBABU": {"name": "fedbabu", "head": "fc3"},
    "LG-FedAvg": {"name": "lg_fedavg", "head": "fc3"},
}


def main() -> None:
    """Runs it."""
    parser = command.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--only", nargs="+", choices=tuple(FAMILY), default=tuple(FAMILY))
    parser.add_argument("--model", choices=tuple(_MODELS), default="mlp")
    options = parser.parse_args()
    fl.setup()
    also = _MODELS[options.model] | (_TINY if options.smoke else {})
    seeds, rounds = (1, 2) if options.smoke else (options.seeds, options.rounds)
    runs, commits = _already(options.json, seeds, rounds, options.only)
    commit = machine()["commit"]  # first, because writing the file changes the tree
    for label in options.only:
        if label not in runs:
            runs[label] = [measure(label, seed, rounds, also) for seed in range(seeds)]
            commits[label] = commit
        runs, commits = ({x: of[x] for x in FAMILY if x in of} for of in (runs, commits))
        result = {"rounds": rounds, "seeds": seeds, "target": TARGET, "commits": commits}
        command.write(options.json, result | {"runs": runs})
        final = ", ".join(f"{run['test_accuracy'][-1]:.4f}" for run in runs[label])
        print(f"{label}: {final}", flush=True)
    print(f"\n{table(runs)}")


def measure(label: str, seed: int, rounds: int, also: dict[str, Any]) -> dict[str, list[float]]:
    """One run: for each number a list over the rounds tested; sums count from one to the next.

    Args:
      label: of an algorithm.
      seed: of the run.
      rounds: of the run.
      also: settings laid over the configuration.
    """
    steps = _STEPS.get(label, 1)
    overrides: dict[str, Any] = {"algorithm": FAMILY[label], "seed": seed, "rounds": steps * rounds}
    if label in _STEPS:
        overrides |= {"faults": None, "eval_every": 4 * steps}
    overrides |= also
    run: dict[str, list[float]] = {}
    since = dict.fromkeys(_SUMS, 0.0)
    for row in fl.simulate(**build(fl.load_config(CONFIG, overrides))).history.rows:
        since = {key: since[key] + row[key] for key in _SUMS if key in row}
        accuracy = row.get("test_accuracy", row.get("test_accuracy_personal"))
        if accuracy is not None:
            numbers = {"round": row["round"], "test_accuracy": round(accuracy, 5)}
            for key, value in (numbers | {k: round(v, 4) for k, v in since.items()}).items():
                run.setdefault(key, []).append(value)
            since = dict.fromkeys(since, 0.0)
    return run


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """The columns of docs/family.md, mean and deviation over seeds, in Markdown."""
    rows = {
        label: [
            [dict(zip(run, values, strict=True)) for values in zip(*run.values(), strict=True)]
            for run in seeds
        ]
        for label, seeds in runs.items()
    }
    comparison = fl.compare(rows, target=TARGET)
    rule = ["---", *["---:"] * (len(_COLUMNS) - 1)]
    named = [dict(zip(comparison.header, line, strict=True)) for line in comparison.lines()]
    lines = [[line.get(title, "–") for title in _COLUMNS] for line in named]
    return "\n".join(f"| {' | '.join(line)} |" for line in ([*_COLUMNS.values()], rule, *lines))


def _already(
    file: str | None, seeds: int, rounds: int, only: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The runs that a file holds and their commits.

    Those that `only` names are left out if they are of another commit, and all of them if the file
    is of another machine or other seeds or rounds.
    """
    if not file or not Path(file).exists():
        return {}, {}
    known, here = json.loads(Path(file).read_text()), machine()
    same = (known["seeds"], known["rounds"], known["machine"]) == (seeds, rounds, here["machine"])
    commits = known.get("commits", dict.fromkeys(known["runs"], known["commit"]))
    kept = [x for x in known["runs"] if same and (x not in only or commits[x] == here["commit"])]
    return {x: known["runs"][x] for x in kept}, {x: commits[x] for x in kept}


if __name__ == "__main__":
    main()
