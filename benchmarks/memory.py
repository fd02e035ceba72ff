"""The memory that a call really takes, read from the system beside what a program predicts."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import jax

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_of(call: Callable[[], object]) -> int | None:
    """Bytes that a call takes at most beside what is held already, on all devices; None = unknown.

    On a CPU it is the resident memory of this process, whose peak Linux can be told to forget.
    Other devices only know the peak since the process began, so it counts if this call raises it.
    """
    gc.collect()
    devices = jax.devices()
    if devices[0].platform != "cpu":
        before = [(d.memory_stats() or {}) for d in devices]
        call()
        after = [(d.memory_stats() or {}) for d in devices]
        known = [(b, a) for b, a in zip(before, after, strict=True) if "peak_bytes_in_use" in a]
        raised = [(b, a) for b, a in known if a["peak_bytes_in_use"] > b["peak_bytes_in_use"]]
        if not raised:
            return None
        return sum(a["peak_bytes_in_use"] - b["bytes_in_use"] for b, a in raised)
    try:
        _CLEAR.write_text("5")
        before_it = _kilobytes("VmRSS")
        call()
        return 1024 * max(_kilobytes("VmHWM") - before_it, 0)
    except (OSError, StopIteration):  # no Linux, or one that does not say
        return None


def _kilobytes(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])
