"""Does FedLP train a language model? FedAvg and FedLP-Homo(0.5) on configs/shakespeare.yaml.

    python -m benchmarks.language [--rounds 30] [--every 10] [--json FILE] [--smoke]

Reads the directory in $SHAKESPEARE_DIR; `--smoke` makes up roles of its own. Both algorithms have
the same initial model, cohorts and batches. Losses and bytes are functions of the seed; `seconds`
is the time of the whole run, with compiling and evaluation.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import fedlp_jax as fl
from benchmarks import command
from fedlp_jax.config.build import build

_CONFIG = Path(__file__).parents[1] / "configs" / "shakespeare.yaml"
_CONTENDERS = {"FedAvg": "fedavg", "FedLP-Homo(0.5)": "fedlp_homo"}
_TINY = {"model.width": 8, "model.depth": 1, "model.heads": 2, "cohort": 2}


def main() -> None:
    """Runs it."""
    parser = command.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--every", type=int, default=10, help="rounds from a test to the next")
    options = parser.parse_args()
    fl.setup()
    settings = {"rounds": options.rounds, "eval_every": options.every}
    with tempfile.TemporaryDirectory() as folder:
        tiny = _TINY | {"data.data_dir": _made_up(Path(folder))} if options.smoke else {}
        runs = measure(settings | tiny)
    command.write(options.json, settings | {"runs": runs})


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Runs both algorithms, and prints the rounds that were tested."""
    runs = {}
    print(f"{'':16} {'round':>6} {'test loss':>10} {'accuracy':>9} {'MB up':>8}")
    for label, name in _CONTENDERS.items():
        config = fl.load_config(_CONFIG, settings | {"algorithm.name": name})
        began = time.perf_counter()
        history = fl.simulate(**build(config)).history.rows
        seconds = time.perf_counter() - began
        sent, tests = 0, []
        for row in history:
            sent += row["upload_bytes"]
            if "test_loss" in row:
                test = {key: row[key] for key in ("round", "test_loss", "test_accuracy")}
                tests.append(test | {"upload_bytes": sent})
                print(
                    f"{label:16} {row['round']:6} {row['test_loss']:10.4f} "
                    f"{row['test_accuracy']:9.4f} {sent / 1e6:8.1f}",
                    flush=True,
                )
        train = [row["train_loss"] for row in history]
        runs[label] = {"tests": tests, "train_loss": train, "seconds": seconds}
    return runs


def _made_up(folder: Path) -> str:
    roles = {f"play::{i}": ["to be, or not to be. " * (40 + i)] for i in range(4)}
    (folder / "roles.json.gz").write_bytes(gzip.compress(json.dumps(roles).encode()))
    return str(folder)


if __name__ == "__main__":
    main()
