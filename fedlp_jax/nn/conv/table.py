"""Measured times of the forms of convolutions: the package's own table, and the user's.

The package's has times of 3 x 3 kernels by pixels, channels and features, of which the nearest is
taken. A user's, which `fedlp tune --convolutions` writes, has the very shapes of some model on the
very processor, and goes before it.
"""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import tempfile
import warnings
from collections.abc import Mapping
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jax

from fedlp_jax.data.cache import cache_dir

Times = dict[str, float]  # form -> milliseconds of a convolution with its gradients

VARIABLE = "FEDLP_CONV_TABLE"
_FORMAT = "fedlp_jax convolutions 1"
_COMMITTED = "table.json"


@functools.cache
def committed() -> dict[str, list[dict[str, Any]]]:
    """`{backend: rows}`, written by `benchmarks/convolutions.py`."""
    file = resources.files("fedlp_jax.nn.conv").joinpath(_COMMITTED)
    if not file.is_file():
        return {}
    found: dict[str, list[dict[str, Any]]] = json.loads(file.read_text())["backends"]
    return found


def path() -> Path | None:
    """Where the user's table is: `$FEDLP_CONV_TABLE`, which may be empty for none, else the cache.

    The cache is `$FEDLP_CACHE_DIR`, or `fedlp_jax` under `$XDG_CACHE_HOME` or `~/.cache`.
    """
    named = os.environ.get(VARIABLE)
    if named is None:
        return cache_dir() / "convolutions.json"
    return Path(named).expanduser() if named else None


def own(forms: tuple[str, ...]) -> Mapping[str, Times]:
    """The user's times on this device: `{"10x32x32x3 * 3x3x3x32": {"patches": 0.7, ...}}`.

    A table that cannot be read, or is none of this version, counts for nothing and costs a warning.

    Args:
      forms: those that are known.
    """
    file = path()
    try:
        if file is None:
            return {}
        changed = file.stat().st_mtime_ns
    except FileNotFoundError:
        if VARIABLE in os.environ:
            _missing(str(file))
        return {}
    except (OSError, RuntimeError):  # no permission; no home directory
        return {}
    return _read(file, changed, forms).get(device(), {})


def write(file: Path, times: Mapping[str, Times], forms: tuple[str, ...]) -> None:
    """Puts times of this device into a table; its other times stay, if it is whole.

    Raises:
      OSError: it cannot be written; it is then as before.
    """
    devices: dict[str, dict[str, Times]] = {}
    if file.exists():
        devices = {key: dict(value) for key, value in _read.__wrapped__(file, 0, forms).items()}
    devices.setdefault(device(), {}).update(times)
    table = {"format": _FORMAT, "jax": metadata.version("jax"), "devices": devices}
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{file.stem}-", dir=file.parent)
    try:
        with os.fdopen(handle, "w") as out:
            out.write(json.dumps(table, indent=1) + "\n")
        os.replace(name, file)
    finally:
        Path(name).unlink(missing_ok=True)


@functools.cache
def device() -> str:
    """What times are good for: the backend and its processor, as `"cpu AMD EPYC 9V74"`."""
    backend = jax.default_backend()
    if backend != "cpu":
        return f"{backend} {jax.devices()[0].device_kind}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        (name, *_) = (line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, ValueError):
        name = platform.processor() or platform.machine()
    return f"{backend} {name}"


@functools.cache
def _missing(file: str) -> None:
    warnings.warn(
        f"{VARIABLE} names {file}, which does not exist; convolutions are chosen by the package's "
        "own table. `fedlp tune CONFIG --convolutions` makes it.",
        stacklevel=2,
    )


@functools.lru_cache(maxsize=8)
def _read(file: Path, changed: int, forms: tuple[str, ...]) -> dict[str, dict[str, Times]]:
    """`{device: {shapes: times}}`; warns once of each state of a file that is no table."""
    del changed  # so that a file that was written again is read again
    try:
        raw = json.loads(file.read_text("utf-8"))
        if not isinstance(raw, dict) or raw.get("format") != _FORMAT:
            raise ValueError(f"it is no table of the format '{_FORMAT}'")
        found: dict[str, dict[str, Times]] = raw["devices"]
        for shapes in found.values():
            for times in shapes.values():
                _check(times, forms)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else error
        warnings.warn(
            f"the table of convolutions {file} is left out ({reason}); delete it, or measure again "
            "with `fedlp tune CONFIG --convolutions`.",
            stacklevel=2,
        )
        return {}
    return found


def _check(times: Times, forms: tuple[str, ...]) -> None:
    if not times:
        raise ValueError("a shape has no times")
    for form, time in times.items():
        if form not in forms:
            raise ValueError(f"the form '{form}' is unknown")
        number = isinstance(time, int | float) and not isinstance(time, bool)
        if not (number and math.isfinite(time) and time > 0):
            raise ValueError(f"a time is {time!r}")
