"""Compiled programs, kept on disk and in the process, so that none is compiled twice.

On disk, jax does the work: it stores each program under a digest of the program, the versions of
jaxlib and the backend, the flags of XLA, and the devices, which on CPU include the instruction set.
So hosts of different kinds may share a home directory, and any file may be deleted. (On some
Intel CPUs jaxlib 0.10 logs an error about `prefer-no-gather` for each program it loads: it takes a
hint to the compiler for an instruction. The program is right.)
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from fedlp_jax.data.cache import cache_dir

_WORTH_SECONDS = 0.1  # a program that compiles faster is not worth a file
_DAYS = 30  # no later version loads the programs of an earlier one
_EXECUTABLES = 64  # kept in the process
# Settings of jax that change the compiler's output but not the program's text.
_COMPILER_SETTINGS = ("jax_disable_most_optimizations", "jax_optimization_level")
# A device runs one operation after the other, so an order for the least memory is the quicker one:
# what was just written is still in the cache (3 to 5% of a round of convolutions).
_CPU_OPTIONS = {"xla_cpu_enable_concurrency_optimized_scheduler": False}


def keep_programs() -> Path | None:
    """Tells jax to store compiled programs in `xla` of the package's cache directory.

    The directory is `$FEDLP_CACHE_DIR`, else `fedlp_jax` under `$XDG_CACHE_HOME` or `~/.cache`. A
    directory chosen for jax itself (`JAX_COMPILATION_CACHE_DIR`) is left as it is, and
    `JAX_ENABLE_COMPILATION_CACHE=false` stores nothing. `fl.setup` calls this; importing does not.

    Returns:
      Where programs are stored; None = nowhere, because jax is told not to or the directory is not
      writable. That costs only the time to compile.
    """
    settings = jax.config.values
    if not settings["jax_enable_compilation_cache"]:
        return None
    if settings["jax_compilation_cache_dir"]:
        return Path(settings["jax_compilation_cache_dir"])
    try:
        folder = cache_dir() / "xla"
        # Its files are executed, so nobody else may write there.
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
        with contextlib.suppress(OSError):  # another process deleted it
            if file.stat().st_mtime < oldest:
                file.unlink()


def executable(lowered: Any, devices: Sequence[jax.Device]) -> Any:
    """Compiles a lowered program, or returns the executable of an equal one in this process.

    Programs are equal if their StableHLO text, the trees and types of their arguments and results,
    their devices and the compiler's settings are. jax's persistent cache lies beneath.

    Args:
      lowered: from `jax.jit(f, keep_unused=True).lower(...)`; without `keep_unused` the text does
        not say which arguments were dropped.
      devices: that the program runs on, which the text does not name either.
    """
    text = lowered.as_text()
    if "callback" in text:  # the text does not say which Python function is called
        return _compiled(lowered)
    settings = [str(jax.config.values.get(name)) for name in _COMPILER_SETTINGS]
    slot = _slot(
        hashlib.sha256(text.encode()).digest(),
        (lowered.in_tree, lowered.out_tree),
        (str(lowered.in_avals), str(lowered.out_info)),
        tuple(devices),
        (*settings, os.environ.get("XLA_FLAGS")),
    )
    if not slot:
        slot.append(_compiled(lowered))
    return slot[0]


class Same:
    """Compares an object by identity, and keeps it alive as long as a cache holds the key."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value


@functools.lru_cache(maxsize=_EXECUTABLES)
def _slot(*key: Any) -> list[Any]:
    """A place for one executable; the least recently used one is dropped."""
    return []


def _compiled(lowered: Any) -> Any:
    if jax.default_backend() != "cpu":
        return lowered.compile()
    try:
        return lowered.compile(compiler_options=_CPU_OPTIONS)
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return lowered.compile()  # another version of XLA
