"""What a measurement depends on besides the code: processor, versions, commit."""

from __future__ import annotations

import contextlib
import os
from importlib import metadata
from typing import Any

from fedlp_jax.reporting.environment import environment, processor


def machine() -> dict[str, Any]:
    """Processor, cores, memory, versions, devices, commit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    result = {
        "machine": {
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(memory / 2**30, 1),
        }
    } | environment()
    with contextlib.suppress(metadata.PackageNotFoundError):
        result["versions"]["torch"] = metadata.version("torch")
    return result
