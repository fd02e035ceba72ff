"""Archives of arrays (.npz): no pickle is ever loaded, and what is declared has to be there.

numpy believes the header of an array and asks for as much memory as that says. Here the header is
held against the size in the archive's directory, and all sizes against the machine's memory, before
anything is unpacked.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from fedlp_jax.data.files import open_plain, usable_memory
from fedlp_jax.errors import FedLPError, shown

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_npz(
    path: str | Path, choose: Callable[[list[str]], Iterable[str]]
) -> dict[str, np.ndarray]:
    """Reads some arrays of an archive.

    Args:
      path: the file.
      choose: from the names of all arrays in it to those that are wanted.

    Returns:
      The arrays that were chosen, by name.

    Raises:
      FedLPError: an array holds Python objects, or all are larger than half of the memory.
      Exception: whatever a damaged archive makes zipfile and numpy raise.
    """
    with open_plain(path) as raw, zipfile.ZipFile(raw) as archive:
        entries = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if len(entries) < len(archive.infolist()):
            raise ValueError("it holds two arrays of one name")
        chosen = list(choose(list(entries)))
        needs = sum(_declared(path, archive, name, entries[name]) for name in chosen)
        if needs > usable_memory():
            raise FedLPError(
                f"{path} unpacks to {needs:,} bytes, and this machine has {usable_memory():,} to "
                "use for it; store fewer or smaller arrays."
            )
        found = {}
        for name in chosen:
            with archive.open(entries[name]) as member:
                found[name] = npy.read_array(member, allow_pickle=False)
                if member.read(1):  # to its end, where zipfile compares the checksum
                    raise ValueError(f"{shown(name)} goes on after its last number")
    return found


def _declared(path: str | Path, archive: zipfile.ZipFile, name: str, info: Any) -> int:
    """Bytes of an array as its header says, which has to be what the archive says."""
    with archive.open(info) as member:
        version = npy.read_magic(member)
        if version not in _HEADERS:
            raise ValueError(f"{shown(name)} has version {version} of numpy's format")
        shape, _, dtype = _HEADERS[version](member)
        if dtype.hasobject:
            raise FedLPError(
                f"{path} cannot be read as an .npz of plain arrays: {shown(name)} holds Python "
                "objects, which would be unpickled, and a pickle can run any program; write it "
                "with numpy.savez from arrays of numbers."
            )
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or size != info.file_size - member.tell():
            raise ValueError(
                f"{shown(name)} says it has {size:,} bytes, but {info.file_size - member.tell():,} "
                "are there"
            )
    return size
