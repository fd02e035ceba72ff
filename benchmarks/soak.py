"""Does a long run keep its memory? Resident size over thousands of rounds.

    python -m benchmarks.soak [--rounds 20000] [--json FILE] [--smoke]

A small model on digits, evaluated and saved along the way. A run keeps one row per round; memory
that the allocator does not reuse comes on top. The model has 4,810 parameters, so keeping one copy
by mistake costs 19 KB per round. The command fails if the resident size grows by more than 4 KiB
per round in the second half.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import optax

import fedlp_jax as fl
from benchmarks import command

_READINGS = 40
_MOST_BYTES_A_ROUND = 4096


def main() -> None:
    """Runs, prints the readings, and fails if memory grew."""
    parser = command.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=20000)
    options = parser.parse_args()
    fl.setup()
    result = soak(80 if options.smoke else options.rounds)
    print(json.dumps(result))
    command.write(options.json, result)
    if not options.smoke and result["bytes_a_round"] > _MOST_BYTES_A_ROUND:
        raise SystemExit(f"memory grows by {result['bytes_a_round']:.0f} bytes per round")


def soak(rounds: int) -> dict[str, Any]:
    """Resident size along a run, and its slope over the second half."""
    data = fl.load("digits")
    clients = fl.partition.iid(data.train.labels, clients=100, seed=0)
    task = fl.classification(fl.models.MLP(hidden=(64,), num_classes=10))
    algorithm = fl.fedlp_homo(
        task, keep=0.5, client_optimizer=optax.sgd(0.1), epochs=1, batch_size=5
    )
    readings: list[tuple[int, int]] = []

    def watch(row: dict[str, Any]) -> None:
        if row["round"] % max(rounds // _READINGS, 1) == 0:
            gc.collect()
            readings.append((row["round"], _resident_bytes()))

    with tempfile.TemporaryDirectory() as folder:
        result = fl.simulate(
            algorithm,
            data,
            clients,
            rounds=rounds,
            cohort=10,
            eval_every=10,
            log=watch,
            checkpoint=fl.Checkpoint(folder, every=max(rounds // 20, 1)),
        )
    late = np.asarray(readings[len(readings) // 2 :], np.float64)
    return {
        "rounds": rounds,
        "resident_mib": [[round, size // 2**20] for round, size in readings],
        "bytes_a_round": float(np.polyfit(late[:, 0], late[:, 1], 1)[0]),
        "run_seconds": result.readings["run_seconds"],
    }


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
