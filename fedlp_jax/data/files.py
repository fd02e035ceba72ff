"""Files: read regular files only, replace a file in one step, try whether a directory is writable.

Opening a pipe would block, and a device has no end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fedlp_jax.errors import FedLPError, shown, why

TEXT_BYTES = 1_000_000  # limit for a text file of settings or results


def open_plain(path: str | Path) -> BinaryIO:
    """Opens a regular file for reading, without blocking.

    Raises:
      OSError: it does not exist, is not readable, or is a directory, a pipe or a device.
    """
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))
    return file


def read_plain(path: str | Path, limit: int = TEXT_BYTES) -> bytes:
    """The bytes of a regular file, at most `limit`.

    Raises:
      OSError: as from `open_plain`, or the file is larger.
    """
    with open_plain(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        size = max(os.path.getsize(path), len(content))
        text = f"it has {size:,} bytes, and at most {limit:,} are read"
        raise OSError(errno.EFBIG, text, str(path))
    return content


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a new file, which replaces `path` when the block succeeds; otherwise `path` stays.

    Several processes may do so at once; the last one's file stays.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.unlink(missing_ok=True)  # of a killed process, or a link that leads elsewhere
    try:
        with part.open("xb") as file:
            yield file
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def check_writable(folder: Path) -> None:
    """Tries what a run does in a directory later: create, write, rename and delete.

    A directory that does not exist is created for the trial only.

    Raises:
      FedLPError: the trial failed, or orbax cannot write below such a name.
    """
    path = str(folder.absolute())
    try:
        path.encode()
    except UnicodeEncodeError:
        raise FedLPError(
            f"the name of the directory {shown(path)} is not UTF-8; choose another directory."
        ) from None
    if "\\" in path or any(part.endswith(":") for part in folder.absolute().parts):
        raise FedLPError(
            f"no checkpoint can be written below {shown(path)}, because of the backslash or the "
            "colon in that name; choose another directory."
        )
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".trial-", dir=folder) as trial:
            part = Path(trial, "trial" * 8)  # as long as the names in a checkpoint
            part.mkdir()
            (part / ("trial" * 8)).write_bytes(b"trial")
            part.rename(Path(trial, "renamed"))
    except OSError as error:
        raise FedLPError(
            f"nothing can be written to {folder}: {why(error)}. Choose another directory."
        ) from error
    finally:
        for made in missing:
            with contextlib.suppress(OSError):
                made.rmdir()


def usable_memory() -> int:
    """Bytes that one allocation may use: half of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
