"""The run directory: the files of one run, and a lock that keeps other runs out of it.

    config.yaml     the resolved configuration, which can itself be run
    metrics.jsonl   one object per round
    variables.npz   the trained model: everything the server holds, see `fl.load_variables`
    best.npz        the model that tested best, if `keep_best` asks for it
    clients.npz     a table with a row per round and client, see `Result.clients`
    partition.npz   examples of every client, and the labels of up to 50
    summary.json    last numbers, totals, versions, device, time
    checkpoints/    what `--resume` starts from, see `fedlp_jax.simulation.checkpoint`
    plots/          accuracy by round and by upload, the partition
    profile/        a trace of some rounds, if it was asked for
    earlier/        rows and summary of a run that is made longer, until that has ended

Until the first round is done there is only the lock, `.lock`, so a run that is refused leaves
nothing. A file is replaced in one step, and only when its successor is complete.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock, Timeout

from fedlp_jax.data.files import check_writable, replacing
from fedlp_jax.errors import FedLPError, shown, why
from fedlp_jax.reporting.environment import versions
from fedlp_jax.reporting.variables import VARIABLES, save_variables
from fedlp_jax.types import Variables

CONFIG, METRICS, SUMMARY, PLOTS = "config.yaml", "metrics.jsonl", "summary.json", "plots"
CHECKPOINTS, CLIENTS, PARTITION, LOCK = "checkpoints", "clients.npz", "partition.npz", ".lock"
EARLIER, TENSORBOARD, PROFILE = "earlier", "tensorboard", "profile"
BEST = "best.npz"
_FOLDERS = (PLOTS, CHECKPOINTS, TENSORBOARD, PROFILE)
_FILES = (CONFIG, VARIABLES, BEST, CLIENTS, PARTITION, SUMMARY, METRICS)


class RunDirectory:
    """The directory of one run, locked at once and filled from the first round on.

    The operating system drops the lock when the process ends, however it ends. Every write raises
    RuntimeError if somebody has deleted or replaced the directory.

    Attributes:
      path: where it is.
    """

    def __init__(
        self, out: str | Path | None, name: str, overwrite: bool = False, resume: bool = False
    ):
        """Locks a directory, until `close`, and checks that the run can write there.

        Args:
          out: the directory; None = `runs/NAME-N` with the next free N.
          name: of the run.
          overwrite: allow `out` to hold another run; the first round replaces it.
          resume: `out` may hold an earlier part of this run.

        Raises:
          FedLPError: another run is writing there, `out` holds a run already or is a file, or it
            cannot be made or written.
        """
        self._made: list[Path] = []  # directories this object created, outermost first
        self._metrics: IO[str] | None = None
        self._overwrite, self._resume = overwrite, resume
        try:
            self.path = self._next_free(name) if out is None else self._named(out)
        except FedLPError:
            raise
        except (OSError, ValueError) as error:  # ValueError: no name that a system could use
            where = shown(str(out or "runs"))
            raise FedLPError(
                f"the run directory {where} cannot be made: {why(error)}; choose another with "
                "--out."
            ) from error
        self._lock = FileLock(self.path / LOCK, timeout=0)
        try:
            self._acquire()
            self._refuse_other_run()
            check_writable(self.path)
        except BaseException:
            self.close()
            raise

    def begin(self, config: str, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        """Writes `config.yaml` and opens `metrics.jsonl`; an overwritten run goes now.

        Args:
          config: YAML text; the versions are put above it as comments.
          rows: the rounds of a resumed run that its checkpoint holds. They replace `metrics.jsonl`,
            which may have later ones and half a line; those are run again. Until the run has
            ended, `earlier` has a copy of what they replace.
        """
        self._check_place()
        if self._overwrite:
            self._remove_other_run()
        metrics = self.path / METRICS
        if not self._resume:
            metrics.open("x").close()  # fails on the file of a program that ignores the lock
        else:
            self._keep_earlier(len(rows))
        (self.path / SUMMARY).unlink(missing_ok=True)  # of a finished run that becomes longer
        self._replace(METRICS, "".join(map(_line, rows)))
        self._metrics = metrics.open("a", encoding="utf-8", buffering=1)
        header = "".join(f"# {name} {version}\n" for name, version in versions().items())
        self._replace(CONFIG, header + config)

    @property
    def begun(self) -> bool:
        """Whether anything has been written."""
        return self._metrics is not None

    @property
    def has_checkpoint(self) -> bool:
        """Whether `--resume` has a checkpoint to start from."""
        folder = self.path / CHECKPOINTS
        return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one round to `metrics.jsonl`; it is on the disk when this returns."""
        self._check_place()
        assert self._metrics is not None
        with _naming(self.path / METRICS):
            self._metrics.write(_line(row))

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Writes `summary.json`."""
        self._check_place()
        text = json.dumps(plain(summary), indent=2, allow_nan=False)
        self._replace(SUMMARY, text + "\n")

    def save(self, variables: Variables) -> None:
        """Writes `variables.npz`; the run has ended, so nothing earlier is kept."""
        self._check_place()
        shutil.rmtree(self.path / EARLIER, ignore_errors=True)
        with _naming(self.path / VARIABLES):
            save_variables(self.path / VARIABLES, variables)

    def save_arrays(self, name: str, arrays: Mapping[str, Any]) -> None:
        """Writes `clients.npz` or `partition.npz`, of arrays by name."""
        self._check_place()
        with _naming(self.path / name), replacing(self.path / name) as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    def close(self) -> None:
        """Releases the lock. If nothing was written, removes the directories that were made."""
        if self._metrics is not None:
            with contextlib.suppress(OSError):  # a full disk, which `append` has reported
                self._metrics.close()
        if self._lock.is_locked:
            if _same_file(self.path / LOCK, self._lock_status):
                (self.path / LOCK).unlink()  # while it is locked; filelock expects that
            self._lock.release()
        if self._metrics is not None:
            return
        for folder in reversed(self._made):
            # Somebody else may have put something there.
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _acquire(self) -> None:
        try:
            self._lock.acquire()
            self._lock_status = os.stat(self.path / LOCK)
        except Timeout:
            raise FedLPError(
                f"another run is writing in {self.path}; wait until it ends, or choose another "
                "directory with --out."
            ) from None
        except OSError as error:
            raise FedLPError(
                f"the run directory {self.path} cannot be locked ({LOCK}: {why(error)}); choose "
                "another with --out."
            ) from error

    def _check_place(self) -> None:
        """Raises RuntimeError if another directory, or none, is where this run wrote before."""
        ours = _same_file(self.path / LOCK, self._lock_status)
        if self._metrics is not None:
            ours &= _same_file(self.path / METRICS, os.fstat(self._metrics.fileno()))
        if not ours:
            raise RuntimeError(f"{self.path} was deleted or replaced while this run wrote there.")

    def _keep_earlier(self, rounds: int) -> None:
        """Copies rows and summary if the resumed run starts from fewer rounds than there are."""
        folder, metrics = self.path / EARLIER, self.path / METRICS
        if folder.exists() or not metrics.exists():
            return
        if metrics.read_bytes().count(b"\n") > rounds:
            folder.mkdir()
            for name in (METRICS, SUMMARY):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copyfile(self.path / name, folder / name)

    def _replace(self, name: str, text: str) -> None:
        with _naming(self.path / name), replacing(self.path / name) as file:
            file.write(text.encode())

    def _remove_other_run(self) -> None:
        for picture in (self.path / PLOTS).glob("*.png"):
            picture.unlink()
        for folder in (CHECKPOINTS, EARLIER):
            if (self.path / folder).exists():
                shutil.rmtree(self.path / folder)
        # The metrics last: a directory that has them can be overwritten again.
        for name in _FILES:
            (self.path / name).unlink(missing_ok=True)

    def _refuse_other_run(self) -> None:
        held = [name for name in (*_FILES, *_FOLDERS) if os.path.lexists(self.path / name)]
        if held and not (self._overwrite or self._resume):
            raise FedLPError(
                f"{self.path} already holds a run ({', '.join(held)}); choose another directory "
                "with --out, continue that run with --resume, or replace it with --overwrite."
            )
        if held and METRICS not in held and CHECKPOINTS not in held:
            # Such as `--out .` with one's own config.yaml.
            raise FedLPError(
                f"{self.path} holds {', '.join(held)} but no {METRICS}, so it may not be a run "
                "and is not overwritten; choose another directory with --out."
            )

    def _named(self, out: str | Path) -> Path:
        if not str(out):
            raise FedLPError("the run directory has no name; name one with --out, or omit --out.")
        path = Path(out)
        if path.exists() and not path.is_dir():
            raise FedLPError(f"{path} is a file; name a directory with --out.")
        self._make(path)
        return path

    def _next_free(self, name: str) -> Path:
        runs = Path("runs")
        self._make(runs)
        pattern = re.compile(re.escape(name) + r"-(\d{1,9})")
        used = [int(m[1]) for p in runs.iterdir() if (m := pattern.fullmatch(p.name))]
        number = max(used, default=0) + 1
        while True:
            path = runs / f"{name}-{number}"
            try:
                path.mkdir()  # fails if another process was faster
            except FileExistsError:
                number += 1
            else:
                self._made.append(path)
                return path

    def _make(self, path: Path) -> None:
        missing = [p for p in (path, *path.parents) if not p.exists()]
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            self._made.append(folder)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the file's name into an error of writing to it."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _same_file(path: Path, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.stat(), status)
    except OSError:
        return False


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(plain(row), allow_nan=False) + "\n"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All rounds of a run directory's `metrics.jsonl`."""
    with (Path(path) / METRICS).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def plain(value: Any) -> Any:
    """A value as JSON has it: arrays as lists, numbers that are not finite as null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, bool | str | int | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return plain(np.asarray(value).tolist())
