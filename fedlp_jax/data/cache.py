"""Decoded data sets on disk: plain .npy files that a second start maps instead of decoding.

An entry is a directory of four arrays and an index with their checksums. It is written beside its
final name and renamed into place, so a reader sees all of it or nothing, and two processes that
decode the same set at once do no harm: the first to finish publishes. Its name holds a digest of
what was decoded, so a set that was prepared again is decoded again. Any entry may be deleted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

_LAYOUT = 1  # raise it when the meaning of the stored arrays changes


class Decoded(NamedTuple):
    """A data set as stored: no normalisation, no checks beyond those of its source."""

    train_inputs: np.ndarray  # uint8[N, ...]
    train_labels: np.ndarray  # i32[N]
    test_inputs: np.ndarray  # uint8[N_test, ...]
    test_labels: np.ndarray  # i32[N_test]
    num_classes: int


_ARRAYS = Decoded._fields[:-1]


def root() -> Path:
    """`$FEDLP_CACHE_DIR`, else `fedlp_jax` under `$XDG_CACHE_HOME` or `~/.cache`."""
    own = os.environ.get("FEDLP_CACHE_DIR")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedlp_jax"


def digest(files: Iterable[Path], *choices: str | None) -> str:
    """Names the contents of `files` without reading them, and the choices made in decoding them.

    Args:
      files: the files that the arrays are decoded from.
      *choices: whatever else the arrays depend on, such as the names of the splits.

    Returns:
      A hexadecimal digest of real paths, sizes, times of last change and choices.
    """
    facts: list[object] = [_LAYOUT, *choices]
    for file in sorted(files):
        stat = file.stat()
        facts.append([str(file.resolve()), stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def remember(name: str, decode: Callable[[], Decoded]) -> Decoded:
    """Arrays from the entry `name`, or from `decode()`, which are then stored for the next time.

    An entry that is damaged (cut short, a flipped bit, files missing) counts as none and is
    replaced. A cache that cannot be written costs a warning, nothing else.

    Args:
      name: one directory name, which ends in a `digest`.
      decode: makes the arrays.

    Returns:
      The arrays; those from an entry are read-only maps of its files.
    """
    entry = root() / name
    found = _read(entry)
    if found is not None:
        return found
    decoded = decode()
    try:
        _write(entry, decoded)
    except OSError as error:
        warnings.warn(
            f"The decoded data set could not be stored under {entry.parent} ({error}), so the next "
            "start decodes it again; set FEDLP_CACHE_DIR to a directory that can be written.",
            stacklevel=2,
        )
    return decoded


def _read(entry: Path) -> Decoded | None:
    """The arrays of an entry, or None if there is none or it is damaged."""
    try:
        index = json.loads((entry / "index.json").read_text())
        arrays: list[np.ndarray] = []
        for name in _ARRAYS:
            array = np.load(entry / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            if zlib.crc32(array.data) != index["crc32"][name]:
                return None
            arrays.append(np.asarray(array))  # an ndarray over the map, not a memmap
        train_inputs, train_labels, test_inputs, test_labels = arrays
        classes = int(index["num_classes"])
        return Decoded(train_inputs, train_labels, test_inputs, test_labels, classes)
    except Exception:  # a damaged file can raise almost anything
        return None


def _write(entry: Path, decoded: Decoded) -> None:
    """Stores an entry in one step; leaves a whole one that is already there."""
    unique = f".{entry.name}.{os.getpid()}.{secrets.token_hex(4)}"
    temporary, damaged = entry.with_name(unique), entry.with_name(f"{unique}.damaged")
    try:
        temporary.mkdir(parents=True)
        checksums = {}
        for name in _ARRAYS:
            array = np.ascontiguousarray(getattr(decoded, name))
            np.save(temporary / f"{name}.npy", array, allow_pickle=False)
            checksums[name] = zlib.crc32(array.data)
        index = {"num_classes": decoded.num_classes, "crc32": checksums}
        (temporary / "index.json").write_text(json.dumps(index))
        if entry.exists() and _read(entry) is None:
            entry.rename(damaged)
        temporary.rename(entry)
    except OSError as error:
        # Another process has published the same arrays in the meantime.
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(damaged, ignore_errors=True)
