"""The run directory: what a run leaves behind, and that it overwrites no other.

    config.yaml     the resolved configuration, which can itself be run
    metrics.jsonl   one object a round
    variables.npz   the trained model: everything the server holds, see `fl.load_variables`
    summary.json    last numbers, totals, versions, device, time
    checkpoints/    what `--resume` goes on from, see `fedlp_jax.simulation.checkpoint`
    plots/          accuracy by round and by upload, the partition

Until the first round is done there is nothing but the claim, `.claim`, which goes when the run
ends, so a run that is refused leaves nothing.
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

from fedlp_jax.data.files import replacing
from fedlp_jax.errors import FedLPError, shown, why
from fedlp_jax.reporting.claim import Claim
from fedlp_jax.reporting.environment import versions
from fedlp_jax.reporting.variables import VARIABLES, save_variables
from fedlp_jax.types import Variables

CONFIG, METRICS, SUMMARY, PLOTS = "config.yaml", "metrics.jsonl", "summary.json", "plots"
CHECKPOINTS = "checkpoints"
_WRITTEN = (CONFIG, METRICS, VARIABLES, SUMMARY, PLOTS, CHECKPOINTS)


class RunDirectory:
    """One run's directory, claimed at once and filled from the first round on.

    The claim shows before anything is trained that the directory can be written; a run that was
    killed leaves it behind. With `overwrite` a claim is replaced too; the run it was taken from
    gets a RuntimeError when it writes its next file.

    Attributes:
      path: where it is.
    """

    def __init__(
        self, out: str | Path | None, name: str, overwrite: bool = False, resume: bool = False
    ):
        """Claims a directory, which `close` gives up.

        Args:
          out: the directory; None = `runs/NAME-N` with the next free N.
          name: of the run.
          overwrite: allow `out` to hold another run, which is removed when the first round is done.
          resume: `out` may hold an earlier part of this run, which no process goes on with.

        Raises:
          FedLPError: `out` is in use or holds a run already, is a file, cannot be made or cannot be
            written.
        """
        self._made: list[Path] = []  # directories this object created, outermost first
        self._metrics: IO[str] | None = None
        self._claim: Claim | None = None
        self._overwrite, self._resume = overwrite, resume
        try:
            self.path = self._next_free(name) if out is None else self._named(out)
        except FedLPError:
            raise
        except (OSError, ValueError) as error:  # ValueError: no name that a system could use
            where = shown(str(out or "runs"))
            raise FedLPError(f"the run directory {where} cannot be made: {why(error)}.") from error
        try:
            self._claim = Claim(self.path, replace=overwrite, inherit=resume)
            self._refuse_other_run()
        except BaseException:
            self.close()
            raise

    def begin(self, config: str, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        """Writes `config.yaml`; where that is allowed, removes what an earlier run wrote here.

        Args:
          config: YAML text; the versions are put above it as comments.
          rows: the rounds of a resumed run that its checkpoint holds. They replace `metrics.jsonl`,
            which may have later ones, and half a line.
        """
        metrics = self._own(METRICS)
        if self._overwrite:
            for picture in (self.path / PLOTS).glob("*.png"):
                picture.unlink()
            if (self.path / CHECKPOINTS).exists():
                shutil.rmtree(self.path / CHECKPOINTS)
            # The metrics last: what has them is known as a run, which may be overwritten.
            for name in (CONFIG, VARIABLES, SUMMARY, METRICS):
                (self.path / name).unlink(missing_ok=True)
        if self._resume:
            for name in (VARIABLES, SUMMARY):
                (self.path / name).unlink(missing_ok=True)
            self._replace(METRICS, "".join(map(_line, rows)))
        self._metrics = metrics.open("a" if self._resume else "x", encoding="utf-8", buffering=1)
        header = "".join(f"# {name} {version}\n" for name, version in versions().items())
        self._replace(CONFIG, header + config)

    @property
    def begun(self) -> bool:
        """Whether anything has been written."""
        return self._metrics is not None

    @property
    def has_checkpoint(self) -> bool:
        """Whether `--resume` has something to go on from."""
        folder = self.path / CHECKPOINTS
        return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one round to `metrics.jsonl`; it is on the disk when this returns."""
        assert self._metrics is not None
        with _naming(self.path / METRICS):
            self._metrics.write(_line(row))

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Writes `summary.json`."""
        text = json.dumps(plain(summary), indent=2, allow_nan=False)
        self._replace(SUMMARY, text + "\n")

    def save(self, variables: Variables) -> None:
        """Writes `variables.npz`."""
        with _naming(self.path / VARIABLES):
            save_variables(self._own(VARIABLES), variables)

    def plot_file(self, name: str) -> Path:
        """Path for a picture."""
        folder = self._own(PLOTS)
        folder.mkdir(exist_ok=True)
        return folder / f"{name}.png"

    def close(self) -> None:
        """Ends writing. Where nothing was written, removes the directories that were made."""
        if self._metrics is not None:
            with contextlib.suppress(OSError):  # a full disk, of which `append` has told
                self._metrics.close()
        if self._claim is not None:
            self._claim.give_up()
        if self._metrics is not None:
            return
        for folder in reversed(self._made):
            # Somebody else may have put something there, which is then theirs.
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _own(self, name: str) -> Path:
        """A path within the directory, as long as no other run has taken that over."""
        if self._claim is None or not self._claim.held:
            raise RuntimeError(f"another run has taken over {self.path} with --overwrite.")
        return self.path / name

    def _replace(self, name: str, text: str) -> None:
        """Writes a file that is whole at any time, whenever the process is killed."""
        path = self._own(name)
        with _naming(path), replacing(path) as file:
            file.write(text.encode())

    def _refuse_other_run(self) -> None:
        found = [name for name in _WRITTEN if os.path.lexists(self.path / name)]
        links = [self.path / name for name in found if (self.path / name).is_symlink()]
        if links:
            raise FedLPError(
                f"{links[0]} is a link, and a run writes through none; choose another directory "
                "with --out, or put there what it leads to."
            )
        if found and not (self._overwrite or self._resume):
            raise FedLPError(
                f"{self.path} already holds a run ({', '.join(found)}); choose another directory "
                "with --out, go on with that run by --resume, or replace it with --overwrite."
            )
        if found and METRICS not in found and CHECKPOINTS not in found:
            # As `--out .` beside one's own config.yaml.
            raise FedLPError(
                f"{self.path} holds {', '.join(found)} but no {METRICS}, so it may be no run and "
                "is not overwritten; choose another directory with --out."
            )

    def _named(self, out: str | Path) -> Path:
        if not str(out):
            raise FedLPError(
                "the run directory has no name; give one with --out, or leave it away."
            )
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
