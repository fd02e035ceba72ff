"""What a result depends on besides configuration and seed: versions, device, commit."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def environment() -> dict[str, Any]:
    """Versions, device and commit, as in `summary.json`."""
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


def origin(environment: Mapping[str, Any]) -> str:
    """One line of an `environment()`: device, versions, commit."""
    device, versions = environment["device"], environment["versions"]
    chip = device["kind"]
    if device["platform"] == "cpu":
        chip = device.get("processor", chip)
    names = ", ".join(f"{name} {versions[name]}" for name in ("jax", "flax", "optax", "python"))
    return f"{device['count']} x {chip}, {names}, commit {environment['commit'] or 'unknown'}"


def processor() -> str:
    """The processor's name, as the system reports it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that determine a result."""
    import fedlp_jax

    own = {"python": platform.python_version(), "fedlp_jax": fedlp_jax.__version__}
    return own | {name: metadata.version(name) for name in _PACKAGES}


def commit() -> str | None:
    """The git commit of this package, `-dirty` if files differ; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commands = (
        [*git, "ls-files", "--error-unmatch", Path(__file__).name],
        [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
    )
    try:
        for command in commands:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
