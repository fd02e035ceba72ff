"""What comes from outside, within limits: plain files only, and no more than memory holds.

A configuration, a model or a checkpoint may have been written by anybody. Opening a pipe would wait
for ever, a device has no end, and an archive of a kilobyte may unpack to a terabyte. Our own files
are written beside their place and moved there, so that they are whole at any time.
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

TEXT_BYTES = 1_000_000  # the most that a text file of settings or results may have


def open_plain(path: str | Path) -> BinaryIO:
    """Opens a plain file for reading, and waits for nothing.

    Raises:
      OSError: it is not there, may not be read, or is a directory, a pipe or a device.
    """
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115
    kind = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(kind):
        file.close()
        code = errno.EISDIR if stat.S_ISDIR(kind) else errno.EINVAL
        what = "it is a directory" if stat.S_ISDIR(kind) else "it is a pipe or a device, not a file"
        raise OSError(code, what, str(path))
    return file


def read_plain(path: str | Path, limit: int = TEXT_BYTES) -> bytes:
    """The bytes of a plain file that has at most `limit` of them.

    Raises:
      OSError: as `open_plain` does, or the file is larger.
    """
    with open_plain(path) as file:
        content = file.read(limit + 1)  # some files of the system give no size
        if len(content) > limit:
            size = max(os.fstat(file.fileno()).st_size, len(content))
            what = f"it has {size:,} bytes, where {limit:,} are the most that is read"
            raise OSError(errno.EFBIG, what, str(path))
    return content


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` once all is written; else that stays as it was."""
    part = path.with_name(f".{path.name}")
    part.unlink(missing_ok=True)  # of a run that was killed; a link there would lead elsewhere
    try:
        with part.open("xb") as file:
            yield file
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def check_writable(folder: Path) -> None:
    """Tries in a directory what a run does there later: makes, fills, renames and removes.

    A directory that does not exist is made for the trial only.

    Raises:
      FedLPError: one of it failed, or orbax cannot write below such a name.
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
    """Bytes that one thing may take of this machine: half of its memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
