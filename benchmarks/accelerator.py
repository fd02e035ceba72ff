"""Everything on one host, small to large, in ten minutes: for a GPU or TPU, but runs anywhere.

    python -m benchmarks.accelerator [--json FILE] [--minutes 10] [--smoke]

It needs the package (`pip install -e .`) and jax for the accelerator (`pip install 'jax[cuda13]'`),
but no data. A CPU runs smaller sizes.

Cells are measured one after another: the peak of matrix products by precision, and the bandwidth;
the four workloads; activations in bfloat16; clients vmapped at once; cohorts up to 4,096; the
masked mean; a population of a million; the levels of FedLP-Hetero; precisions of products. They run
in a separate process, which is killed when a cell takes too long. A cell that runs out of memory
costs only that cell, and FILE is complete after every cell.

"share of peak" is the rate of floating-point operations as written (see benchmarks.roofline) over
the peak measured at the same precision: MFU. Programs are those of `fl.setup`, which repeat to the
bit; XLA_FLAGS=--xla_gpu_deterministic_ops=true runs the kernels that XLA takes without timing.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command

Cell = dict[str, Any]

_ROOT = Path(__file__).parents[1]
_WORKER = (sys.executable, "-m", "benchmarks.cells")
_CELL_SECONDS = 120.0
_PRECISIONS = ("default", "float32", "tensorfloat32", "bfloat16")  # of matrix products
_MEBIBYTE = 2**20


def main() -> None:
    """Runs it."""
    parser = command.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything together")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    rows: list[dict[str, Any]] = []
    for row in measure(cells_for(options.smoke), deadline):
        rows.append(row)
        _add_share_of_peak(rows)
        print(_line(row), flush=True)
        if options.json:
            where = rows[0].get("result", {})
            command.save(options.json, {"minutes": options.minutes, "cells": rows[1:]} | where)


def cells_for(smoke: bool) -> Iterator[Cell]:
    """The cells, small to large; `send` the platform to get the second and later ones."""
    platform = yield {"kind": "environment"}
    if smoke:
        yield from _smoke_cells()
    elif platform == "cpu":
        yield from _cpu_cells()
    else:
        yield from _accelerator_cells()


def _smoke_cells() -> Iterator[Cell]:
    yield {"kind": "peak", "precision": "bfloat16", "smoke": True}
    yield {"kind": "fill", "gibibytes": 2**20}  # a pebibyte: the next cell must still run
    yield {"kind": "rounds", "workload": "W2", "steps": 1, "cohort": 2, "precision": "bfloat16"}


def _cpu_cells() -> Iterator[Cell]:
    yield {"kind": "peak", "precision": "default"}
    yield {"kind": "bandwidth"}
    for workload in ("W2", "W3", "W4", "W1"):
        yield {"kind": "rounds", "workload": workload, "steps": 5}
    for width in (1, 4, 16):
        yield {"kind": "rounds", "workload": "W2", "steps": 5, "cohort": 32, "width": width}
    for cohort in (16, 64, 256):
        yield {"kind": "rounds", "workload": "W3", "steps": 2, "cohort": cohort}
    yield {"kind": "masked mean", "model": "MLP", "cohort": 10}
    yield {"kind": "levels", "model": "stairs", "steps": 5}
    yield {"kind": "population", "clients": 100_000}


def _accelerator_cells() -> Iterator[Cell]:
    """The most informative cells come first, because time may run out."""
    for precision in _PRECISIONS:
        yield {"kind": "peak", "precision": precision}
    yield {"kind": "bandwidth"}
    for workload, steps in (("W1", 50), ("W2", 60), ("W3", 6), ("W4", 5)):
        yield {"kind": "rounds", "workload": workload, "steps": steps}
    few = {"kind": "rounds", "steps": 5}
    yield few | {"workload": "W1", "cohort": 256, "dtype": "bfloat16"}
    for workload in ("W1", "W3"):
        for width in (256, 32, 8):  # 128 is the default
            yield few | {"workload": workload, "cohort": 256, "width": width}
    for workload in ("W1", "W3"):
        for cohort in (256, 1024, 4096, 64):
            yield few | {"workload": workload, "cohort": cohort}
    for model, cohort in (("MLP", 100), ("reference CNN", 1000), ("wide MLP", 100)):
        yield {"kind": "masked mean", "model": model, "cohort": cohort}
    yield {"kind": "population", "clients": 1_000_000}
    yield {"kind": "levels", "model": "reference CNN", "steps": 5}
    for workload in ("W1", "W3"):
        for precision in ("float32", "tensorfloat32"):
            yield few | {"workload": workload, "cohort": 256, "precision": precision}
    for workload in ("W1", "W3"):
        large = {"cohort": 4096, "width": 1024, "dtype": "bfloat16"}
        yield few | {"workload": workload} | large


def measure(
    cells: Iterator[Cell],
    deadline: float,
    limit: float = _CELL_SECONDS,
    worker: Sequence[str] = _WORKER,
) -> Iterator[dict[str, Any]]:
    """Measures cells one after another; a failed cell does not stop the others.

    Args:
      cells: the first reports the platform, which is then sent to the generator.
      deadline: on `time.monotonic`; later cells are skipped.
      limit: seconds for a cell, including the start of its process; the first gets twice as many.
      worker: command that answers each line with a line.

    Yields:
      For each cell a dictionary with `cell`, `seconds`, and `result`, `error` or `skipped`.
    """
    process: Worker | None = None
    cell, platform = next(cells), None
    try:
        while True:
            row: dict[str, Any] = {"cell": cell}
            begin = time.monotonic()
            if deadline <= begin:
                row["skipped"] = "no time was left"
            else:
                process = process or Worker(worker)
                # The first cell waits for jax to find its devices.
                patience = limit if platform else 2 * limit
                row |= process.ask(cell, min(patience, deadline - begin))
                if "error" in row:
                    process.end()  # frees its memory on the accelerator
                    process = None
            row["seconds"] = time.monotonic() - begin
            if platform is None:
                platform = row.get("result", {}).get("device", {}).get("platform", "cpu")
            yield row
            cell = cells.send(platform)
    except StopIteration:
        pass
    finally:
        if process is not None:
            process.end()


class Worker:
    """The process that measures."""

    def __init__(self, words: Sequence[str]):
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT
        )

    def ask(self, cell: Cell, seconds: float) -> dict[str, Any]:
        """Its answer to a cell, or an error."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(cell) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; reading says so
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return {"error": f"no answer within {seconds:.0f} s"}
        line = self.process.stdout.readline()
        if not line:
            return {"error": f"the process ended with code {self.process.wait()}"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """Kills it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


def _add_share_of_peak(rows: list[dict[str, Any]]) -> None:
    """Divides the last row's rate by the peak of its precision, if both were measured."""
    cell, result = rows[-1]["cell"], rows[-1].get("result")
    if cell["kind"] != "rounds" or result is None:
        return
    for row in rows:
        precision = cell.get("dtype") or cell.get("precision", "default")
        same = row["cell"].get("precision") == precision
        if row["cell"]["kind"] == "peak" and same and "result" in row:
            peak = row["result"]["flop_per_second"]
            rates = result["flop_per_second"].items()
            result["share_of_peak"] = {name: rate / peak for name, rate in rates}


def _line(row: dict[str, Any]) -> str:
    words = " ".join(f"{k}={v}" for k, v in row["cell"].items() if k not in ("kind", "smoke"))
    name = f"{row['cell']['kind']} {words}"
    return f"{row['seconds']:6.1f} s  {name:70} {_result_in_words(row)}"


def _result_in_words(row: dict[str, Any]) -> str:
    if "result" not in row:
        return str(row.get("error") or row["skipped"])
    kind, result = row["cell"]["kind"], row["result"]
    if kind == "environment":
        device = result["device"]
        return f"{device['count']} x {device['kind']}"
    if kind == "peak":
        return f"{result['flop_per_second'] / 1e12:.3f} TFLOP/s"
    if kind == "bandwidth":
        return f"{result['bytes_per_second'] / 1e9:.1f} GB/s"
    if kind == "rounds":
        share = result.get("share_of_peak", {}).get("written")
        return (
            f"{result['measured_ms_per_client_step']['median']:.4f} ms a client-step, "
            f"compiled in {result['compile_seconds']:.1f} s, "
            f"{result['compiled_bytes']['temporary'] / _MEBIBYTE:.0f} MiB"
            + (f", {share:.1%} of peak" if share is not None else "")
        )
    if kind == "masked mean":
        return f"{result['ours_of_copy']:.0%} of a copy's speed"
    if kind == "levels":
        ratios = (m["ratio_to_sum_of_levels"] for m in result["mixtures"].values())
        return "over the sum of levels: " + ", ".join(f"{ratio:.2f}" for ratio in ratios)
    if kind == "population":
        return f"{result[-1]['ratio_to_smallest']:.2f} of a small population's time"
    return "done"


if __name__ == "__main__":
    main()
