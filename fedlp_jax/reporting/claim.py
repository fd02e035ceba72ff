"""Whose a run directory is: a file that says so, locked by the process that runs there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import re
from datetime import datetime
from pathlib import Path

from fedlp_jax.data.files import read_plain
from fedlp_jax.errors import FedLPError, why

CLAIM = ".claim"
_HOST = re.compile(r"process \d+ on (.*) since ")


class Claim:
    """One run's claim on a directory.

    Only one process can create the file. The lock on it ends with the process, however that ends,
    so the claim of a run that was killed can be told from one that is held, whatever became of its
    process id.
    """

    def __init__(self, folder: Path, *, replace: bool = False, inherit: bool = False):
        """Claims a directory.

        Args:
          folder: the directory, which exists.
          replace: take it from any other run.
          inherit: take it from a run that has ended without giving it up.

        Raises:
          FedLPError: another run has it, or nothing can be written there.
        """
        self._folder, self._path = folder, folder / CLAIM
        now = datetime.now().isoformat(" ")
        self._text = f"process {os.getpid()} on {platform.node()} since {now}"
        if self._path.is_symlink() and not replace:
            raise FedLPError(
                f"{self._path} is a link, which no run makes; remove it, or choose another "
                "directory with --out."
            )
        inherit = inherit and not replace and self._path.exists()
        if inherit:
            self._refuse_other_machine()
        try:
            if replace:
                self._path.unlink(missing_ok=True)
            self._lock: int | None = self._take("r+" if inherit else "x")
        except (FileExistsError, BlockingIOError):
            raise FedLPError(
                f"{folder} is in use by another run ({self._holder()}); wait for it or choose "
                "another directory with --out. If that run was killed, go on with --resume, or "
                "replace it with --overwrite."
            ) from None
        except OSError as error:
            if not inherit:
                with contextlib.suppress(OSError):
                    self._path.unlink()  # a full disk may take the name but not the text
            raise FedLPError(
                f"the run directory {folder} cannot be written ({error.strerror}); choose another "
                "with --out."
            ) from error

    @property
    def held(self) -> bool:
        """Whether no other run has taken the directory over."""
        return self._holder() == self._text

    def give_up(self) -> None:
        """Ends the claim."""
        if self.held:
            self._path.unlink()
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None

    def _take(self, mode: str) -> int:
        """Writes and locks the file; the lock lives as long as the descriptor returned."""
        with self._path.open(mode, encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError:  # a file system without locks: its claims cannot be inherited
                if mode != "x":
                    raise
            if not os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
                raise BlockingIOError  # given up and claimed anew, between opening and locking
            file.truncate()
            file.write(self._text)
            file.flush()
            return os.dup(file.fileno())

    def _refuse_other_machine(self) -> None:
        """A lock may not reach over the network."""
        found = _HOST.match(self._holder())
        if found and found[1] != platform.node():
            raise FedLPError(
                f"{self._folder} is in use by a run on another machine ({self._holder()}); wait "
                f"for it. If that run was killed, remove {self._path}."
            )

    def _holder(self) -> str:
        try:
            return read_plain(self._path).decode("utf-8", errors="replace")
        except FileNotFoundError:
            return "which has just ended"
        except OSError as error:
            return f"its {CLAIM} cannot be read: {why(error)}"
