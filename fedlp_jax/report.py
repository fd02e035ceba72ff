"""The run directory: what a run leaves behind, and that it overwrites no other.

    config.yaml     the resolved configuration, which can itself be run
    metrics.jsonl   one object a round
    variables.npz   the trained model: everything the server holds, see `fl.load_variables`
    summary.json    last numbers, totals, versions, device, time
    plots/          accuracy by round and by upload, the partition

Until the first round is done there is nothing but the claim, `.claim`, which goes when the run
ends, so a run that is refused leaves nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np

from fedlp_jax.types import FedLPError, Variables
from fedlp_jax.variables import VARIABLES, save_variables

CONFIG, METRICS, SUMMARY, PLOTS = "config.yaml", "metrics.jsonl", "summary.json", "plots"
CLAIM = ".claim"
_WRITTEN = (CONFIG, METRICS, VARIABLES, SUMMARY, PLOTS)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


class RunDirectory:
    """One run's directory, claimed at once and filled from the first round on.

    The claim is a file that only one process can create, and that shows before anything is trained
    that the directory can be written. It says whose it is; a run that was killed leaves it behind.
    With `overwrite` a claim is replaced too; the run it was taken from gets a RuntimeError when it
    writes its next file.

    Attributes:
      path: where it is.
    """

    def __init__(self, out: str | Path | None, name: str, overwrite: bool = False):
        """Claims a directory, which `close` gives up.

        Args:
          out: the directory; None = `runs/NAME-N` with the next free N.
          name: of the run.
          overwrite: allow `out` to hold another run, which is removed when the first round is done.

        Raises:
          FedLPError: `out` is in use or holds a run already, is a file, cannot be made or cannot be
            written.
        """
        self._made: list[Path] = []  # directories this object created, outermost first
        self._metrics: IO[str] | None = None
        self._overwrite = overwrite
        now = datetime.now().isoformat(" ")
        self._claim = f"process {os.getpid()} on {platform.node()} since {now}"
        try:
            self.path = self._next_free(name) if out is None else self._named(Path(out))
        except OSError as error:
            raise FedLPError(f"the run directory cannot be made: {error}.") from error
        try:
            self._take(self.path / CLAIM)
            self._refuse_other_run()
        except BaseException:
            self.close()
            raise

    def begin(self, config: str) -> None:
        """Writes `config.yaml`; where that is allowed, removes what an earlier run wrote here.

        Args:
          config: YAML text; the versions are put above it as comments.
        """
        metrics, settings = self._own(METRICS), self._own(CONFIG)
        if self._overwrite:
            for picture in (self.path / PLOTS).glob("*.png"):
                picture.unlink()
            # The metrics last: what has them is known as a run, which may be overwritten.
            for name in (CONFIG, VARIABLES, SUMMARY, METRICS):
                (self.path / name).unlink(missing_ok=True)
        self._metrics = metrics.open("x", encoding="utf-8", buffering=1)
        header = "".join(f"# {name} {version}\n" for name, version in versions().items())
        with settings.open("x", encoding="utf-8") as file:
            file.write(header + config)

    @property
    def begun(self) -> bool:
        """Whether anything has been written."""
        return self._metrics is not None

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds one round to `metrics.jsonl`; it is on the disk when this returns."""
        assert self._metrics is not None
        self._metrics.write(json.dumps(plain(row), allow_nan=False) + "\n")

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Writes `summary.json`."""
        text = json.dumps(plain(summary), indent=2, allow_nan=False)
        self._own(SUMMARY).write_text(text + "\n", encoding="utf-8")

    def save(self, variables: Variables) -> None:
        """Writes `variables.npz`."""
        save_variables(self._own(VARIABLES), variables)

    def plot_file(self, name: str) -> Path:
        """Path for a picture."""
        folder = self._own(PLOTS)
        folder.mkdir(exist_ok=True)
        return folder / f"{name}.png"

    def close(self) -> None:
        """Ends writing. Where nothing was written, removes the directories that were made."""
        if self._metrics is not None:
            self._metrics.close()
        if self._claimant() == self._claim:
            (self.path / CLAIM).unlink()
        if self._metrics is not None:
            return
        for folder in reversed(self._made):
            # Somebody else may have put something there, which is then theirs.
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _take(self, claim: Path) -> None:
        try:
            if self._overwrite:
                claim.unlink(missing_ok=True)
            with claim.open("x", encoding="utf-8") as file:
                file.write(self._claim)
        except FileExistsError:
            raise FedLPError(
                f"{self.path} is in use by another run ({self._claimant()}); wait for it or choose "
                "another directory with --out. If that run was killed, replace it with --overwrite."
            ) from None
        except OSError as error:
            with contextlib.suppress(OSError):
                claim.unlink()  # a full disk may take the name but not the text
            raise FedLPError(
                f"the run directory {self.path} cannot be written ({error.strerror}); choose "
                "another with --out."
            ) from error

    def _claimant(self) -> str:
        try:
            return (self.path / CLAIM).read_text("utf-8", errors="replace")
        except OSError:
            return "which has just ended"

    def _own(self, name: str) -> Path:
        """A path within the directory, as long as no other run has taken that over."""
        if self._claimant() != self._claim:
            raise RuntimeError(f"another run has taken over {self.path} with --overwrite.")
        return self.path / name

    def _refuse_other_run(self) -> None:
        found = [name for name in _WRITTEN if (self.path / name).exists()]
        if found and not self._overwrite:
            raise FedLPError(
                f"{self.path} already holds a run ({', '.join(found)}); choose another directory "
                "with --out, or replace that run with --overwrite."
            )
        if found and METRICS not in found:
            # As `--out .` beside one's own config.yaml.
            raise FedLPError(
                f"{self.path} holds {', '.join(found)} but no {METRICS}, so it may be no run and "
                "is not overwritten; choose another directory with --out."
            )

    def _named(self, path: Path) -> Path:
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


def environment() -> dict[str, Any]:
    """What a result depends on beside configuration and seed: versions, device, commit."""
    import jax

    devices = jax.devices()
    return {
        "versions": versions(),
        "device": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
        },
        "commit": commit(),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    import fedlp_jax

    own = {"python": platform.python_version(), "fedlp_jax": fedlp_jax.__version__}
    return own | {name: metadata.version(name) for name in _PACKAGES}


def commit() -> str | None:
    """The git commit this package runs from, `-dirty` if files differ; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    ask = (
        [*git, "ls-files", "--error-unmatch", Path(__file__).name],
        [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
    )
    try:
        for command in ask:
            said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip()
