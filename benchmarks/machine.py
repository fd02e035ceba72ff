"""What a figure depends on beside the code: processor, versions, commit."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from fedlp_jax.reporting.environment import environment


def machine() -> dict[str, Any]:
    """Processor, cores, memory, versions, devices, commit."""
    found = {"processor": _processor(), "cores": len(os.sched_getaffinity(0))}
    found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    result = {"machine": found} | environment()
    with contextlib.suppress(metadata.PackageNotFoundError):
        result["versions"]["torch"] = metadata.version("torch")
    return result


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
