"""Whether a long run keeps its memory: resident size over thousands of rounds.

    python -m benchmarks.soak [--rounds 20000] [--json FILE] [--smoke]

A small model on digits, evaluated and saved as it goes. What a run has to keep grows with its
rounds, by a row each; memory that the allocator does not use again comes on top. The model has
4,810 parameters, so one copy of it that is kept by mistake is 19 KB a round. The command fails if
the resident size of the second half grows by more than 4 KiB a round.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import optax

import fedlp_jax as fl
from benchmarks.machine import machine

_READINGS = 40
_MOST_BYTES_A_ROUND = 4096


def main() -> None:
    """Runs, prints the readings, and fails if memory grew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20000)
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--smoke", action="store_true", help="few rounds, to see that it works")
    options = parser.parse_args()
    fl.setup()
    found = soak(80 if options.smoke else options.rounds)
    print(json.dumps(found))
    if options.json:
        Path(options.json).write_text(json.dumps(found | machine(), indent=2) + "\n")
    if not options.smoke and found["bytes_a_round"] > _MOST_BYTES_A_ROUND:
        raise SystemExit(f"memory grows by {found['bytes_a_round']:.0f} bytes a round")


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
