"""One contender in a process of its own: commands in on stdin, answers out on stdout.

python -m benchmarks.worker NAME FOLDER SETTINGS

An answer is a line of JSON. What goes wrong is one too, {"error": "..."}, and the last.
"""

from __future__ import annotations

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
    # Whatever a library prints must not get into the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        for answer in _answers(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])):
            answers.write(json.dumps(answer) + "\n")
    except Exception as error:
        traceback.print_exc()
        answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        sys.exit(1)


def _answers(name: str, folder: Path, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "cores" in settings:  # before any library counts them
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
    # Imported here: a process holds one framework only.
    if name == "torch":
        from benchmarks.torch_contender import Torch

        return Torch
    if name == "torch_cuda":
        from benchmarks.torch_cuda import TorchCuda

        return TorchCuda
    from benchmarks import jax_contenders

    return {"ours": jax_contenders.Ours, "naive": jax_contenders.Naive}[name]


def _readings(contender: Any) -> dict[str, float]:
    found = {"compile_s": contender.compile_seconds, "peak_rss_mb": _peak_mb()}
    device = contender.peak_device_mb()
    return found if device is None else found | {"peak_device_mb": device}


def _peak_mb() -> float:
    """Of this process and, for those that have any, its largest child times their number."""
    import multiprocessing

    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    children = 0.0
    for child in multiprocessing.active_children():
        status = Path(f"/proc/{child.pid}/status").read_text()
        children += int(status.split("VmHWM:")[1].split()[0]) / 1024
    return own + children


if __name__ == "__main__":
    main()
