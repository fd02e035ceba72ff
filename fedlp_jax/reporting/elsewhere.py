"""The run directory of several processes: the first writes it, and the others know where it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlp_jax.execution import processes as hosts
from fedlp_jax.reporting.run_directory import RunDirectory
from fedlp_jax.types import Variables


class Elsewhere(RunDirectory):
    """A run directory that another process writes: here nothing is claimed or written.

    Attributes:
      path: where it is, for the process that writes it.
    """

    def __init__(self, path: Path):
        self.path = path

    def begin(self, config: str, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        """Writes nothing."""

    @property
    def begun(self) -> bool:
        """Always: there is nothing to begin."""
        return True

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes nothing."""

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Writes nothing."""

    def save(self, variables: Variables) -> None:
        """Writes nothing."""

    def close(self) -> None:
        """Has nothing to end."""


def run_directory(
    out: str | Path | None, name: str, overwrite: bool = False, resume: bool = False
) -> RunDirectory:
    """Claims a run directory in the first process, and tells the others where it is.

    Args:
      out: see `RunDirectory`, as all of these.
      name: see there.
      overwrite: see there.
      resume: see there.

    Raises:
      FedLPError: the first process cannot have the directory; then in all of them.
    """
    directory: RunDirectory | None = None
    with hosts.together("run directory"):
        if hosts.is_first():
            directory = RunDirectory(out, name, overwrite, resume)
    path = hosts.from_first("path", str(directory.path) if directory is not None else "")
    return directory if directory is not None else Elsewhere(Path(path))
