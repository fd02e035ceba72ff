"""Decoded data sets on disk: plain .npy files, which a second start maps instead of decoding.

An entry is a directory that is written under another name and then renamed, so a reader sees all of
it or nothing, and two processes that decode the same set do no harm. Any entry may be deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from fedlp_jax.errors import warn


def cache_dir() -> Path:
    """`$FEDLP_CACHE_DIR`, else `fedlp_jax` in `$XDG_CACHE_HOME` or `~/.cache`."""
    own = os.environ.get("FEDLP_CACHE_DIR")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedlp_jax"


def digest(files: Iterable[Path], *options: str | None) -> str:
    """A name for the contents of `files` and the options of decoding them, without reading either.

    Args:
      files: what the arrays are decoded from.
      *options: whatever else the arrays depend on, such as the names of the splits.

    Returns:
      A hexadecimal digest of real paths, sizes, modification times and options.
    """
    facts: list[object] = [2, *options]  # the number goes up when the stored arrays change meaning
    for file in sorted(files):
        stat = file.stat()
        facts.append([str(file.resolve()), stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def cached(
    entry: str, names: Iterable[str], decode: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Arrays from the cache, or from `decode()`, which are then stored for the next time.

    An entry with missing or truncated files is replaced. A cache that cannot be written costs a
    warning and nothing else.

    Args:
      entry: name of a directory, which ends in a `digest`.
      names: of the arrays.
      decode: makes the arrays.

    Returns:
      The arrays; cached ones are read-only maps of their files.
    """
    with contextlib.suppress(OSError, ValueError, EOFError, RuntimeError):
        folder = cache_dir() / entry
        files = {name: folder / f"{name}.npy" for name in names}
        return {
            name: np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
            for name, file in files.items()
        }
    arrays = decode()
    try:
        _store(cache_dir() / entry, arrays)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        warn(
            f"The decoded data set could not be cached ({error}), so the next start decodes it "
            "again; set FEDLP_CACHE_DIR to a directory that can be written.",
            stacklevel=2,
        )
    return arrays


def _store(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an entry, then moves it into place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        part = Path(temporary) / "entry"
        part.mkdir()
        for name, array in arrays.items():
            np.save(part / f"{name}.npy", array, allow_pickle=False)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one; maps of it stay valid
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster
                raise
