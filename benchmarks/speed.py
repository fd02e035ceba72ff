"""Time of a client-step: this package against a PyTorch loop and a first try in JAX.

    python -m benchmarks.speed --workload W1|W2|W3|W4|all [--json FILE] [--repeats N]
        [--against NAME ...] [--baseline DIR] [--made-up] [--smoke]

Every contender is a separate process; one runs at a time. All have the same images, clients and
initial weights, and before any timing one client's weights after five steps are compared in
float64. Then contenders alternate, round by round, after one round to warm up. A client-step is one
optimizer step of one client: the seconds of a round over cohort size x steps of a client.

On a GPU host all contenders use the GPU, and with many cores they start and compile at the same
time. A contender that fails or computes something else has an error in place of a time, and the
others continue; only if `ours` fails does the comparison end.

`--baseline DIR` adds the package of another checkout, to compare a change with the tree before it:
the two alternate, so that a noisy machine slows both.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import command, stage
from benchmarks.workloads import WORKLOADS, Workload, made_up, smoke

_Settings = dict[str, int]
# Name -> (class, see `worker`; its settings).
_CONTENDERS: dict[str, tuple[str, _Settings]] = {
    "ours": ("ours", {}),
    "ours, 1 device of 1 thread": ("ours", {"devices": 1, "cores": 1}),
    "torch, 2 processes x 1 thread": ("torch", {"processes": 2, "threads": 1}),
    "torch, 1 process x 2 threads": ("torch", {"processes": 1, "threads": 2}),
    "naive JAX": ("naive", {"steps": 3}),
}
_CUDA_CONTENDERS: dict[str, tuple[str, _Settings]] = {
    "ours": ("ours", {}),
    "torch, CUDA graphs on 10 streams": ("torch_cuda", {"graphs": 10}),
    "torch, CUDA graphs on 1 stream": ("torch_cuda", {"graphs": 1}),
    "torch, CUDA eager": ("torch_cuda", {"graphs": 0}),
    "naive JAX": ("naive", {}),
}
_TOLERANCE = 1e-8  # difference of two models over the length of the update, in float64
_WORKER = (sys.executable, "-m", "benchmarks.worker")
_CORES_TO_START_TOGETHER = 8
_TREE = Path(__file__).parents[1]


class Contender:
    """A worker process. After a failure it gets no further commands."""

    def __init__(
        self, label: str, kind: str, folder: Path, settings: _Settings, tree: Path = _TREE
    ):
        self.label = label
        self.process = subprocess.Popen(
            [*_WORKER, kind, str(folder), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree)},
        )
        self.seconds: list[float] = []
        self.readings: dict[str, float] = {}
        self.error: str | None = None

    def ready(self) -> None:
        """Waits until it is set up."""
        self._answer()

    def ask(self, **command: Any) -> dict[str, Any]:
        """Sends a command and waits for the answer; empty if the contender has failed."""
        if self.error is not None:
            return {}
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; reading says so
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def fail(self, error: str) -> None:
        """Ends the process, and the whole comparison if it is `ours`."""
        self.error = error
        self.close()
        if self.label == "ours":
            raise SystemExit(f"ours: {error}")

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.fail(f"the process ended with exit code {self.process.wait()}")
            return {}
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            self.fail(answer["error"])
            return {}
        self.readings = {k: v for k, v in answer.items() if k != "seconds"}
        return answer


def compare(
    name: str,
    workload: Workload,
    repeats: int,
    prefixes: tuple[str, ...] = ("",),
    baseline: Path | None = None,
) -> dict[str, Any]:
    """Runs `ours` and the contenders of one workload with such a prefix."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stage.write(workload, folder)
        contenders = _start(folder, prefixes, baseline)
        differences = _check(contenders, folder)
        for turn in range(repeats + 1):
            for label, contender in contenders.items():
                if label == "naive JAX" and turn > 2 and jax.default_backend() == "cpu":
                    continue  # tens of times slower, so its spread does not matter
                answer = contender.ask(do="round", number=turn + 1)
                if turn and answer:
                    contender.seconds.append(1e3 * answer["seconds"] / workload.client_steps)
        for contender in contenders.values():
            if contender.error is None:
                contender.close()
    return _report(name, workload, contenders, differences)


def chosen(cuda: bool, prefixes: tuple[str, ...] = ("",)) -> dict[str, tuple[str, _Settings]]:
    """`ours` and the contenders on a GPU or a CPU with such a prefix."""
    torch = importlib.util.find_spec("torch") is not None
    return {
        label: (kind, settings)
        for label, (kind, settings) in (_CUDA_CONTENDERS if cuda else _CONTENDERS).items()
        if (torch or not kind.startswith("torch"))
        and (label == "ours" or label.startswith(prefixes))
    }


def _start(folder: Path, prefixes: tuple[str, ...], baseline: Path | None) -> dict[str, Contender]:
    cuda = jax.default_backend() == "gpu"
    together = cuda and len(os.sched_getaffinity(0)) >= _CORES_TO_START_TOGETHER
    contenders = {}
    for label, (kind, settings) in chosen(cuda, prefixes).items():
        contenders[label] = Contender(label, kind, folder, settings)
        if not together:
            contenders[label].ready()
    if baseline is not None:
        contenders["baseline"] = Contender("baseline", "ours", folder, {}, baseline)
        if not together:
            contenders["baseline"].ready()
    if together:
        for contender in contenders.values():
            contender.ready()
    return contenders


def _check(contenders: dict[str, Contender], folder: Path) -> dict[str, float]:
    """Compares the weights after five steps with those of the first contender."""
    with np.load(folder / "initial.npz") as file:
        initial = {key: file[key] for key in file}
    weights = {}
    for label, contender in contenders.items():
        path = folder / f"{len(weights)}.npz"
        if contender.ask(do="check", file=str(path)):
            with np.load(path) as file:
                weights[label] = _flat({key: file[key] for key in file}, initial)
    first = next(iter(weights.values()))
    update = np.linalg.norm(first - _flat(initial, initial))
    differences = {k: float(np.linalg.norm(w - first) / update) for k, w in weights.items()}
    for label, difference in differences.items():
        if not difference < _TOLERANCE:
            contenders[label].fail(
                f"it computes something else: after {stage.CHECK_STEPS} steps it differs by "
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
    rows = {label: _row(c, differences.get(label)) for label, c in contenders.items()}
    median = {
        label: row["ms_per_client_step"]["median"]
        for label, row in rows.items()
        if "error" not in row
    }
    best = min((ms for label, ms in median.items() if label.startswith("torch")), default=None)
    ours, one = median["ours"], median.get("ours, 1 device of 1 thread")
    return {
        "workload": name,
        "data": workload.data,
        "client_steps_a_round": workload.client_steps,
        "contenders": rows,
        "ratio_to_best_torch": None if best is None else best / ours,
        "ratio_to_one_thread": None if one is None else one / ours,
        "ratio_to_baseline": None if "baseline" not in median else median["baseline"] / ours,
    }


def _row(contender: Contender, difference: float | None) -> dict[str, Any]:
    if contender.error is not None:
        return {"error": contender.error}
    readings = dict(contender.readings)
    return {
        "ms_per_client_step": {
            "min": min(contender.seconds),
            "median": statistics.median(contender.seconds),
            "max": max(contender.seconds),
        },
        "rounds": len(contender.seconds),
        "compile_s": readings.pop("compile_s"),
        "peak_rss_mb": readings.pop("peak_rss_mb"),
        "difference_after_5_steps": difference,
    } | readings


def _print(result: dict[str, Any]) -> None:
    print(f"{result['workload']}, {result['data']}: ms per client-step, median (min to max)")
    for label, row in result["contenders"].items():
        if "error" in row:
            print(f"  {label:31} {row['error']}")
            continue
        t = row["ms_per_client_step"]
        device = row.get("peak_device_mb")
        print(
            f"  {label:31} {t['median']:8.4f} ({t['min']:.4f} to {t['max']:.4f})"
            f"   compile {row['compile_s']:.1f} s, peak {row['peak_rss_mb']:.0f} MB"
            + ("" if device is None else f", {device:.0f} MB of the GPU")
        )
    if result["ratio_to_best_torch"] is not None:
        print(f"  {result['ratio_to_best_torch']:.2f} times as fast as the fastest torch loop")
    if result["ratio_to_one_thread"] is not None:
        print(f"  {result['ratio_to_one_thread']:.2f} times as fast as one device of one thread")
    if result["ratio_to_baseline"] is not None:
        print(f"  {result['ratio_to_baseline']:.3f} times as fast as the baseline")


def main() -> None:
    """Runs one workload, or all."""
    parser = command.parser(__doc__)
    parser.add_argument("--workload", choices=[*WORKLOADS, "all"], default="all")
    parser.add_argument(
        "--against",
        nargs="+",
        default=[""],
        help="prefixes of the contenders to run, such as: ours torch",
        metavar="NAME",
    )
    parser.add_argument(
        "--baseline", type=Path, help="another checkout of this project, to compare with"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each contender")
    parser.add_argument(
        "--made-up",
        action="store_true",
        help="generate images of the same number and shapes, in place of the data sets",
    )
    options = parser.parse_args()
    # All processes share a GPU; each would take three quarters of its memory. Inherited by workers.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    names = list(WORKLOADS) if options.workload == "all" else [options.workload]
    results = []
    for name in names:
        workload = made_up(WORKLOADS[name]) if options.made_up else WORKLOADS[name]
        workload = smoke(workload) if options.smoke else workload
        results.append(
            compare(
                name,
                workload,
                1 if options.smoke else options.repeats,
                tuple(options.against),
                None if options.baseline is None else options.baseline.resolve(),
            )
        )
        _print(results[-1])
        command.write(options.json, {"results": results})


if __name__ == "__main__":
    main()
