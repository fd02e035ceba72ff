"""Time of a client-step: this package against a PyTorch loop and a first try in JAX.

    python -m benchmarks.speed --workload W1|W2|W3|W4|all [--json FILE] [--repeats N]
        [--against NAME ...] [--smoke]

Every contender is a process of its own; one runs at a time. They have the same images, clients and
initial weights; before anything is timed, one client's weights after five steps are compared, in
float64. Then contenders take turns, a round each, after a round to warm up. A client-step is one
optimizer step of one client: the seconds of a round, by cohort size and steps of a client.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import stage
from benchmarks.machine import machine
from benchmarks.workloads import WORKLOADS, Workload, smoke

_CONTENDERS: dict[str, tuple[str, dict[str, int]]] = {
    "ours": ("ours", {}),
    "ours, 1 device of 1 thread": ("ours", {"devices": 1, "cores": 1}),
    "torch, 2 processes x 1 thread": ("torch", {"processes": 2, "threads": 1}),
    "torch, 1 process x 2 threads": ("torch", {"processes": 1, "threads": 2}),
    "naive JAX": ("naive", {}),
}
_TOLERANCE = 1e-8  # difference of two models over the length of the update, in float64


class Contender:
    """A worker process."""

    def __init__(self, kind: str, folder: Path, settings: dict[str, int]):
        command = [sys.executable, "-m", "benchmarks.worker", kind, str(folder)]
        self.process = subprocess.Popen(
            [*command, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        self.compile_seconds = self._answer()["compile_s"]
        self.seconds: list[float] = []
        self.peak_mb = 0.0

    def ask(self, **command: Any) -> dict[str, Any]:
        """Sends a command and waits for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.peak_mb = answer["peak_rss_mb"]
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a contender ended early, with exit code {self.process.wait()}.")
        answer: dict[str, Any] = json.loads(line)
        return answer


def compare(
    name: str, workload: Workload, repeats: int, wanted: tuple[str, ...] = ("",)
) -> dict[str, Any]:
    """Runs the contenders of one workload, those whose name begins as wanted and `ours`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stage.write(workload, folder)
        contenders = {
            label: Contender(kind, folder, settings)
            for label, (kind, settings) in _CONTENDERS.items()
            if (kind != "torch" or importlib.util.find_spec("torch"))
            and (label == "ours" or label.startswith(wanted))
        }
        differences = _check(contenders, folder)
        for turn in range(repeats + 1):
            for label, contender in contenders.items():
                if label == "naive JAX" and turn > 2:
                    continue  # tens of times slower; a spread of it would tell nobody anything
                seconds = contender.ask(do="round", number=turn + 1)["seconds"]
                if turn:
                    contender.seconds.append(1e3 * seconds / workload.client_steps)
        for contender in contenders.values():
            contender.close()
    return _report(name, workload, contenders, differences)


def _check(contenders: dict[str, Contender], folder: Path) -> dict[str, float]:
    """Weights after five steps, against those of the first contender."""
    with np.load(folder / "initial.npz") as file:
        initial = {key: file[key] for key in file}
    weights = {}
    for label, contender in contenders.items():
        path = folder / f"{len(weights)}.npz"
        contender.ask(do="check", file=str(path))
        with np.load(path) as file:
            weights[label] = _flat({key: file[key] for key in file}, initial)
    first = next(iter(weights.values()))
    update = np.linalg.norm(first - _flat(initial, initial))
    differences = {k: float(np.linalg.norm(w - first) / update) for k, w in weights.items()}
    for label, difference in differences.items():
        if not difference < _TOLERANCE:
            raise SystemExit(
                f"{label} computes something else: after {stage.CHECK_STEPS} steps it differs by "
                f"{difference:.2g} of the update, and {_TOLERANCE:g} is allowed."
            )
    return differences


def _flat(weights: dict[str, np.ndarray], order: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([np.ravel(weights[key]) for key in order])


def _report(
    name: str,
    workload: Workload,
    contenders: dict[str, Contender],
    differences: dict[str, float],
) -> dict[str, Any]:
    rows = {
        label: {
            "ms_per_client_step": {
                "min": min(c.seconds),
                "median": statistics.median(c.seconds),
                "max": max(c.seconds),
            },
            "rounds": len(c.seconds),
            "compile_s": c.compile_seconds,
            "peak_rss_mb": c.peak_mb,
            "difference_after_5_steps": differences[label],
        }
        for label, c in contenders.items()
    }
    torch = [row for label, row in rows.items() if label.startswith("torch")]
    best = min((r["ms_per_client_step"]["median"] for r in torch), default=None)
    ours = rows["ours"]["ms_per_client_step"]["median"]
    one = rows.get("ours, 1 device of 1 thread", {}).get("ms_per_client_step", {}).get("median")
    return {
        "workload": name,
        "client_steps_a_round": workload.client_steps,
        "contenders": rows,
        "ratio_to_best_torch": None if best is None else best / ours,
        "ratio_to_one_thread": None if one is None else one / ours,
    }


def _print(result: dict[str, Any]) -> None:
    print(f"{result['workload']}: ms per client-step, median (min to max)")
    for label, row in result["contenders"].items():
        t = row["ms_per_client_step"]
        print(
            f"  {label:31} {t['median']:8.3f} ({t['min']:.3f} to {t['max']:.3f})"
            f"   compile {row['compile_s']:.1f} s, peak {row['peak_rss_mb']:.0f} MB"
        )
    if result["ratio_to_best_torch"] is not None:
        print(f"  {result['ratio_to_best_torch']:.2f} times as fast as the faster torch loop")
    if result["ratio_to_one_thread"] is not None:
        print(f"  {result['ratio_to_one_thread']:.2f} times as fast as one device of one thread")


def main() -> None:
    """Runs the workloads asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=[*WORKLOADS, "all"], default="all")
    parser.add_argument("--json", help="write the results here")
    parser.add_argument(
        "--against",
        nargs="+",
        default=[""],
        help="only contenders whose names begin so, as ours torch",
        metavar="NAME",
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each contender")
    parser.add_argument("--smoke", action="store_true", help="a few steps on made-up images")
    options = parser.parse_args()
    names = list(WORKLOADS) if options.workload == "all" else [options.workload]
    results = []
    for name in names:
        workload = smoke(WORKLOADS[name]) if options.smoke else WORKLOADS[name]
        results.append(
            compare(name, workload, 1 if options.smoke else options.repeats, tuple(options.against))
        )
        _print(results[-1])
        if options.json:
            Path(options.json).write_text(
                json.dumps({"results": results} | machine(), indent=2) + "\n"
            )


if __name__ == "__main__":
    main()
