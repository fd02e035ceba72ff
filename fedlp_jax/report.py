"""The run directory: what a run leaves behind, and that it overwrites no other.

    config.yaml     the resolved configuration, which can itself be run
    metrics.jsonl   one object a round
    summary.json    last numbers, totals, versions, device, time
    plots/          accuracy by round and by upload, the partition

Nothing is written before the first round is done, so a run that is refused leaves nothing.
"""

from __future__ import annotations

import json
import math
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np

from fedlp_jax.types import FedLPError

CONFIG, METRICS, SUMMARY, PLOTS = "config.yaml", "metrics.jsonl", "summary.json", "plots"
_WRITTEN = (CONFIG, METRICS, SUMMARY, PLOTS)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


class RunDirectory:
    """One run's directory, claimed at once and filled from the first round on.

    Attributes:
      path: where it is.
    """

    def __init__(self, out: str | Path | None, name: str, overwrite: bool = False):
        """Claims a directory.

        Args:
          out: the directory; None = `runs/NAME-N` with the next free N.
          name: of the run.
          overwrite: allow `out` to hold another run, which is removed when the first round is done.

        Raises:
          FedLPError: `out` holds a run already, is a file, or cannot be made.
        """
        self._made: list[Path] = []  # directories this object created, outermost first
        self._metrics: IO[str] | None = None
        try:
            self.path = self._next_free(name) if out is None else self._named(Path(out), overwrite)
        except OSError as error:
            raise FedLPError(f"the run directory cannot be made: {error}.") from error

    def begin(self, config: str) -> None:
        """Removes what an earlier run wrote here and writes `config.yaml`.

        Args:
          config: YAML text; the versions are put above it as comments.
        """
        for name in (CONFIG, METRICS, SUMMARY):
            (self.path / name).unlink(missing_ok=True)
        for picture in (self.path / PLOTS).glob("*.png"):
            picture.unlink()
        self._metrics = (self.path / METRICS).open("x", encoding="utf-8", buffering=1)
        header = "".join(f"# {name} {version}\n" for name, version in versions().items())
        (self.path / CONFIG).write_text(header + config, encoding="utf-8")

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
        (self.path / SUMMARY).write_text(text + "\n", encoding="utf-8")

    def plot_file(self, name: str) -> Path:
        """Path for a picture."""
        folder = self.path / PLOTS
        folder.mkdir(exist_ok=True)
        return folder / f"{name}.png"

    def close(self) -> None:
        """Ends writing. Where nothing was written, removes the directories that were made."""
        if self._metrics is not None:
            self._metrics.close()
            return
        for folder in reversed(self._made):
            # Somebody else may have put something there, which is then theirs.
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    def _named(self, path: Path, overwrite: bool) -> Path:
        if path.exists() and not path.is_dir():
            raise FedLPError(f"{path} is a file; name a directory with --out.")
        found = [name for name in _WRITTEN if (path / name).exists()]
        if found and not overwrite:
            raise FedLPError(
                f"{path} already holds a run ({', '.join(found)}); choose another directory with "
                "--out, or replace that run with --overwrite."
            )
        if found and METRICS not in found:
            # As `--out .` beside one's own config.yaml.
            raise FedLPError(
                f"{path} holds {', '.join(found)} but no {METRICS}, so it may be no run and is not "
                "overwritten; choose another directory with --out."
            )
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
