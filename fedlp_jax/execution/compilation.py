"""Compiled programs on disk, so that a second start of the same structure compiles nothing.

jax does the work: it stores what it compiles under a digest of the program, the versions of jaxlib
and the backend, the flags of XLA, and the devices, to which on CPU the instruction set belongs. So
hosts of different kinds may share a home directory. Any file may be deleted. (On some Intel CPUs
jaxlib 0.10 logs an error about `prefer-no-gather` for each program it loads: a hint to the compiler
that it takes for an instruction. The program is right.)
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import jax

from fedlp_jax.data import cache

_WORTH_SECONDS = 0.1  # what compiles faster is not worth a file
_DAYS = 30  # programs of earlier versions are never asked for again


def keep_programs() -> Path | None:
    """Tells jax to store compiled programs in `xla` of the package's cache directory.

    The directory is `$FEDLP_CACHE_DIR`, else `fedlp_jax` under `$XDG_CACHE_HOME` or `~/.cache`. A
    place that was chosen for jax itself (`JAX_COMPILATION_CACHE_DIR`) is left as it is, and
    `JAX_ENABLE_COMPILATION_CACHE=false` stores nothing. `fedlp` calls this, importing never does.

    Returns:
      Where programs are stored; None = nowhere, since jax is told not to or the directory cannot be
      written, which costs nothing but the time to compile.
    """
    settings = jax.config.values
    if not settings["jax_enable_compilation_cache"]:
        return None
    if settings["jax_compilation_cache_dir"]:
        return Path(settings["jax_compilation_cache_dir"])
    try:
        folder = cache.root() / "xla"
        # Its files are run: nobody else may put one there.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no permission; no home directory
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        return None
    _forget_old(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_SECONDS)
    return folder


def _forget_old(folder: Path) -> None:
    """Deletes programs compiled long ago; one still in use is compiled again once a month."""
    oldest = time.time() - _DAYS * 24 * 3600
    for file in folder.glob("*-cache"):
        with contextlib.suppress(OSError):  # another process was faster
            if file.stat().st_mtime < oldest:
                file.unlink()
