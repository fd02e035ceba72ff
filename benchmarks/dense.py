"""Whole rounds with a dense kernel's gradient as outer products, and as a separate GEMM.

    python -m benchmarks.dense [--json FILE] [--smoke]

The MLP and the small CNN of `benchmarks.speed` at several batch sizes; the two forms alternate,
round by round. `fedlp_jax/nn/dense.py` uses outer products up to the batch size where the GEMM
wins.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any
from unittest import mock

import fedlp_jax as fl
from benchmarks import command
from benchmarks.timing import alternate, rounds_of
from benchmarks.workloads import WORKLOADS, Workload, smoke
from fedlp_jax.nn import dense

_BATCHES = {"W2": (5, 10, 15, 20, 30), "W4": (5, 10, 25)}
_TURNS = 7
_FORMS: Mapping[str, dict[str, int]] = {"gemm": {}, "outer": {"cpu": 10**6}}


def main() -> None:
    """Measures every workload at every batch."""
    options = command.parser(__doc__).parse_args()
    fl.setup()
    rows = []
    print("measured: outer products over GEMMs, ratio of the median times of a round")
    for name, batches in {"W2": (10,)}.items() if options.smoke else _BATCHES.items():
        for batch in batches:
            workload = dataclasses.replace(WORKLOADS[name], batch_size=batch)
            workload = smoke(workload) if options.smoke else workload
            rows.append({"workload": name} | measure(workload, 1 if options.smoke else _TURNS))
            print(f"  {name} in batches of {batch:2}: {rows[-1]['ratio']:.2f}", flush=True)
    command.write(options.json, {"measured": rows})


def measure(workload: Workload, turns: int) -> dict[str, Any]:
    """Medians of milliseconds of a client-step in both forms."""
    programs = {}
    for name, rows in _FORMS.items():
        with mock.patch.object(dense, "_ROWS", rows):  # read while a round is traced
            programs[name] = rounds_of(workload)
    each = 1e3 / workload.client_steps
    medians = {k: each * statistics.median(v) for k, v in alternate(programs, turns).items()}
    ratio = medians["outer"] / medians["gemm"]
    return {"batch": workload.batch_size, "ms_per_client_step": medians, "ratio": ratio}


if __name__ == "__main__":
    main()
