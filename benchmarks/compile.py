"""Time until a run runs: trace, lowering, compilation, first round, later rounds.

    python -m benchmarks.compile [--workload W1|W2|W3|W4|hetero|all] [--json FILE] [--smoke]

Every start is a separate process. "cold" has an empty cache of compiled programs; "warm" has the
cache that the cold start left, as with the command `fedlp`. "hetero" is W1 as FedLP-Hetero, with
five depths in one program. `fedlp run configs/quickstart.yaml` is timed as a command, from its
start to its first round and to its end, next to a process that only imports jax.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

import fedlp_jax as fl
from benchmarks import command, parts
from benchmarks.workloads import WORKLOADS, Workload, smoke

_ROOT = Path(__file__).parents[1]
_PARTS = ("trace", "lowering", "compile")
_START = "import json; from benchmarks.compile import start; print(json.dumps(start({!r}, {})))"
_FEDLP = "from fedlp_jax.cli import main; main()"
_HETERO = "hetero"
_CLIENTS_A_DEVICE = 2  # a round just long enough to time
_LATER_ROUNDS = 3


def main() -> None:
    """Runs it."""
    parser = command.parser(__doc__)
    parser.add_argument("--workload", choices=[*WORKLOADS, _HETERO, "all"], default="all")
    parser.add_argument("--repeats", type=int, default=3, help="starts of the quickstart")
    options = parser.parse_args()
    names = [*WORKLOADS, _HETERO] if options.workload == "all" else [options.workload]
    result: dict[str, Any] = {"workloads": {}}
    for name in ["W2"] if options.smoke else names:
        result["workloads"][name] = cold_and_warm(name, options.smoke)
        for state, row in result["workloads"][name].items():
            print(name, state, ", ".join(f"{k[:-8]} {v:.3f} s" for k, v in row.items()))
    result["quickstart"] = quickstart(options.repeats, options.smoke)
    for name, row in result["quickstart"].items():
        print("quickstart", name, ", ".join(f"{k[:-8]} {v:.2f} s" for k, v in row.items()))
    command.write(options.json, result)


def cold_and_warm(name: str, small: bool = False) -> dict[str, dict[str, float]]:
    """Starts two processes in turn, with a common cache of compiled programs."""
    with tempfile.TemporaryDirectory() as cache:
        return {state: _start_in_a_process(name, cache, small) for state in ("cold", "warm")}


def start(name: str, small: bool = False) -> dict[str, float]:
    """Seconds of each step from the start of a workload to its rounds, in this process."""
    begun = time.perf_counter()
    fl.setup()
    workload = WORKLOADS["W1" if name == _HETERO else name]
    workload = smoke(workload) if small else workload
    data = parts.dataset(workload)
    devices = len(jax.devices())
    prepared = time.perf_counter()
    run = fl.Simulation(
        _algorithm(name, workload),
        data,
        parts.partition(workload, data),
        rounds=10**6,
        cohort=_CLIENTS_A_DEVICE * devices,
    )
    built = time.perf_counter()
    run.compile()
    rounds = []
    for number in range(1, 2 + _LATER_ROUNDS):
        begin = time.perf_counter()
        run.read(run.dispatch(number))
        rounds.append(time.perf_counter() - begin)
    readings = {
        f"{program}_{part}_seconds": run.readings[f"{program}_{part}_seconds"]
        for program in ("round", "test")
        for part in _PARTS
    }
    return {
        "data_and_devices_seconds": prepared - begun,
        "initial_state_seconds": built - prepared,
        **readings,
        "first_round_seconds": rounds[0],
        "later_round_seconds": statistics.median(rounds[1:]),
    }


def quickstart(repeats: int, small: bool = False) -> dict[str, dict[str, float]]:
    """Seconds of the command, cold and warm, and its time beyond importing jax.

    Args:
      repeats: warm starts, and imports of jax.
      small: a cold start of two rounds, and no warm one.
    """
    states = {"cold": 1} if small else {"cold": 1, "warm": repeats}
    shorter = ["--rounds", "2"] if small else []
    alone = [sys.executable, "-c", "import jax"]
    import_jax = statistics.median(_seconds(alone, {})[1] for _ in range(1 if small else repeats))
    rows = {"import jax": {"whole_seconds": import_jax}}
    with tempfile.TemporaryDirectory() as folder:
        for state, starts in states.items():
            readings = []
            for i in range(starts):
                words = [
                    "run",
                    "configs/quickstart.yaml",
                    "--out",
                    f"{folder}/{state}{i}",
                    *shorter,
                ]
                readings.append(_seconds([sys.executable, "-c", _FEDLP, *words], _cache(folder)))
            first, whole = (statistics.median(x) for x in zip(*readings, strict=True))
            rows[state] = {
                "first_round_seconds": first,
                "whole_seconds": whole,
                "first_round_beyond_import_seconds": first - import_jax,
                "whole_beyond_import_seconds": whole - import_jax,
            }
    return rows


def _algorithm(name: str, workload: Workload) -> fl.Algorithm:
    if name != _HETERO:
        return parts.algorithm(workload)
    return fl.fedlp_hetero(
        fl.classification(parts.module(workload)),
        depths="uniform",
        client_optimizer=parts.optimizer(workload),
        epochs=1,
        batch_size=workload.batch_size,
    )


def _start_in_a_process(name: str, cache: str, small: bool) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", _START.format(name, small)],
        env=_environment(_cache(cache)),
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    readings: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return readings


def _seconds(words: list[str], settings: dict[str, str]) -> tuple[float, float]:
    """Seconds from the start of a command to the line of its first round, and to its end."""
    begin, first, lines = time.perf_counter(), float("nan"), []
    with subprocess.Popen(
        words,
        env=_environment(settings),
        cwd=_ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if "round 1/" in line:
                first = time.perf_counter() - begin
    if process.returncode:
        raise SystemExit("".join(lines))
    return first, time.perf_counter() - begin


def _cache(folder: str) -> dict[str, str]:
    # The cache of decoded images stays in place: only compilation is measured.
    return {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


def _environment(settings: dict[str, str]) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(_ROOT), **settings}


if __name__ == "__main__":
    main()
