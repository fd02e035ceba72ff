"""Going on with a run directory: from where, and whether it is the same run and not at its end."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from fedlp_jax.config.loading import load_config
from fedlp_jax.config.schema import Config
from fedlp_jax.data.files import read_plain
from fedlp_jax.errors import FedLPError
from fedlp_jax.reporting.run_directory import CHECKPOINTS, CONFIG, METRICS, SUMMARY
from fedlp_jax.simulation.checkpoint import Checkpoint
from fedlp_jax.simulation.snapshot import Snapshot, refuse_other

# What changes how long a run goes on, what is seen of it and what it costs, but no number in it.
_MAY_DIFFER = {"name", "rounds", "eval_every", "plan", "checkpoint"}


def run_checkpoint(config: Config, directory: Path, overwrite: bool = False) -> Checkpoint:
    """Where and how often a run directory's run is saved."""
    return Checkpoint(
        directory / CHECKPOINTS,
        **config.checkpoint.model_dump(),
        settings=_essence(config),
        overwrite=overwrite,
    )


def earlier(config: Config, directory: Path) -> Snapshot | None:
    """Where a run goes on; None, with a warning if it was begun, where there is no checkpoint.

    Raises:
      FedLPError: the directory holds another run, or no checkpoint of it is whole.
    """
    start = run_checkpoint(config, directory).latest()
    if start is None:
        _refuse_other(config, directory)
        if (directory / METRICS).exists():
            warnings.warn(
                f"{directory} has no checkpoint, so the run starts from its first round.",
                stacklevel=2,
            )
    return start


def finished(config: Config, directory: Path) -> int:
    """The rounds of a run that is done, 0 if any of those asked for are left.

    Raises:
      FedLPError: the directory holds another run.
    """
    _refuse_other(config, directory)
    try:
        summary = json.loads(read_plain(directory / SUMMARY))
        done = int(summary["rounds"]) if summary["status"] == "done" else 0
    except Exception:  # what is no such JSON can raise almost anything
        return 0  # a run ends with its summary
    return done if done >= config.rounds else 0


def run_directory(path: str, out: str | None) -> tuple[str, str]:
    """The configuration and the run directory that `--resume` is about.

    Args:
      path: CONFIG, or the run directory, which has its own.
      out: what `--out` says.

    Raises:
      FedLPError: no directory is named, or two are.
    """
    if not Path(path).is_dir():
        if out is None:
            raise FedLPError(
                "--resume needs the directory of the run, as in fedlp run runs/quickstart-1 "
                "--resume; with a configuration, name the directory with --out."
            )
        return path, out
    if out is not None:
        raise FedLPError(f"--resume goes on in {path}; leave --out away.")
    if not (Path(path) / CONFIG).exists():
        raise FedLPError(
            f"{path} has no {CONFIG}, so no round of a run was done there; start it anew."
        )
    return str(Path(path) / CONFIG), path


def _refuse_other(config: Config, directory: Path) -> None:
    if (directory / CONFIG).exists():
        begun = load_config(directory / CONFIG)
        refuse_other(_essence(begun), _essence(config), f"{directory} holds another run")


def _essence(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude=_MAY_DIFFER)
