"""The memory that a call takes, read from the system."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import jax

_MMAP_THRESHOLD = -3  # of <malloc.h>
_LARGE = 2**18  # bytes
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_of(call: Callable[[], object]) -> int | None:
    """Peak bytes of a call beyond what is already allocated, on all devices; None = unknown.

    On a CPU this is the resident memory of the process; Linux can reset its peak. Other devices
    only know the peak since the process began, so it counts only if this call raises it.
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
        _return_freed()
        _CLEAR.write_text("5")
        before_it = _kilobytes("VmRSS")
        call()
        return 1024 * max(_kilobytes("VmHWM") - before_it, 0)
    except (OSError, StopIteration):  # not Linux, or a Linux without these files
        return None


def _return_freed() -> None:
    """Makes glibc return what is freed to the system, where a call could reuse it unseen.

    Large blocks are slower to allocate from now on.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim"):
        libc.mallopt(_MMAP_THRESHOLD, _LARGE)
        libc.malloc_trim(0)


def _kilobytes(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])
