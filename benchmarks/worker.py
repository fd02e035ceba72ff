"""One contender in its own process: reads commands from stdin and answers on stdout.

    python -m benchmarks.worker NAME FOLDER SETTINGS

`benchmarks.speed` starts it. An answer is a line of JSON; {"error": "..."} is the last.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    """Sets the contender up, then answers until stdin ends."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="ours, naive, torch or torch_cuda")
    parser.add_argument("folder", type=Path, help="that stage.write filled")
    parser.add_argument("settings", type=json.loads, help="JSON")
    options = parser.parse_args()
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        for answer in _answers(options.name, options.folder, options.settings):
            answers.write(json.dumps(answer) + "\n")
    except Exception as error:
        traceback.print_exc()
        answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        sys.exit(1)


def _answers(name: str, folder: Path, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "cores" in settings:  # before a library counts them
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: settings["cores"]])
    contender = _contender(name)(folder, settings)
    yield _readings(contender)
    for line in sys.stdin:
        command = json.loads(line)
        answer = {}
        if command["do"] == "check":
            np.savez(command["file"], **contender.check())
        else:
            answer["seconds"] = contender.round(command["number"])
        yield answer | _readings(contender)


def _contender(name: str) -> Any:
    # Imported here, so that a process loads one framework only.
    if name == "torch":
        from benchmarks.torch_contender import Torch

        return Torch
    if name == "torch_cuda":
        from benchmarks.torch_cuda import TorchCuda

        return TorchCuda
    from benchmarks import jax_contenders

    return {"ours": jax_contenders.Ours, "naive": jax_contenders.Naive}[name]


def _readings(contender: Any) -> dict[str, float]:
    readings = {"compile_s": contender.compile_seconds, "peak_rss_mb": _peak_mb()}
    device = contender.peak_device_mb()
    return readings if device is None else readings | {"peak_device_mb": device}


def _peak_mb() -> float:
    """Of this process and all its children."""
    import multiprocessing

    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    children = 0.0
    for child in multiprocessing.active_children():
        status = Path(f"/proc/{child.pid}/status").read_text()
        children += int(status.split("VmHWM:")[1].split()[0]) / 1024
    return own + children


if __name__ == "__main__":
    main()
