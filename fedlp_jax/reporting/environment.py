"""What a result depends on beside configuration and seed: versions, device, commit."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def environment() -> dict[str, Any]:
    """All of it, as `summary.json` has it."""
    import jax

    devices = jax.devices()
    return {
        "versions": versions(),
        "device": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "processor": processor(),
            "count": len(devices),
            "processes": jax.process_count(),
        },
        "commit": commit(),
    }


def processor() -> str:
    """The name of the machine's processor, as its system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    import fedlp_jax

    own = {"python": platform.python_version(), "fedlp_jax": fedlp_jax.__version__}
    return own | {name: metadata.version(name) for name in _PACKAGES}


def commit() -> str | None:
    """The git commit this package runs from, `-dirty` if files differ; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    ask = (
        [*git, "ls-files", "--error-unmatch", Path(__file__).name],
        [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
    )
    try:
        for command in ask:
            said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip()
