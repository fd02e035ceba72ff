"""`--resume`: which run a directory holds, and where it continues."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fedlp_jax.config.loading import load_config
from fedlp_jax.config.schema import Config
from fedlp_jax.errors import FedLPError, warn
from fedlp_jax.reporting.run_directory import CHECKPOINTS, CONFIG, METRICS, SUMMARY, read_metrics
from fedlp_jax.simulation.checkpoint import Checkpoint
from fedlp_jax.simulation.early_stop import Watch
from fedlp_jax.simulation.snapshot import Snapshot, dotted, refuse_other

# What changes the time a run takes and the rounds it shows, but no number in them.
_MAY_DIFFER = {
    "name",
    "rounds",
    "eval_every",
    "early_stop",
    "keep_best",
    "sinks",
    "plan",
    "checkpoint",
}


def run_checkpoint(config: Config, directory: Path, overwrite: bool = False) -> Checkpoint:
    """Where and how often the run of a run directory is saved."""
    return Checkpoint(
        directory / CHECKPOINTS,
        **config.checkpoint.model_dump(),
        settings=identity(config),
        overwrite=overwrite,
    )


def last_snapshot(config: Config, directory: Path) -> Snapshot | None:
    """The last checkpoint; None if there is none, with a warning if the run had started.

    Raises:
      FedLPError: the directory holds another run, or all of its checkpoints are damaged.
    """
    start = run_checkpoint(config, directory).latest(_defaults(config))
    if start is None:
        refuse_other_run(config, directory)
        if (directory / METRICS).exists():
            warn(
                f"{directory} has no checkpoint, so the run starts from its first round.",
                stacklevel=2,
            )
    return start


def finished_rounds(config: Config, directory: Path) -> int:
    """The rounds of a finished run; 0 if any of the requested ones is missing.

    Raises:
      FedLPError: the directory holds another run.
    """
    refuse_other_run(config, directory)
    try:
        summary = json.loads((directory / SUMMARY).read_text("utf-8"))
        done = int(summary["rounds"]) if summary["status"] == "done" else 0
    except Exception:  # malformed JSON can raise almost anything
        return 0  # a finished run has a good summary
    if done and done < config.rounds and config.early_stop is not None:
        stops = Watch(config.early_stop.build(), read_metrics(directory)).stops
        return done if stops else 0
    return done if done >= config.rounds else 0


def resumed_run(path: str, out: str | None) -> tuple[str, str]:
    """The configuration and the run directory that `--resume` refers to.

    Args:
      path: CONFIG, or the run directory, which has its own.
      out: the value of `--out`.

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
        raise FedLPError(f"--resume already names the directory {path}; omit --out.")
    if not (Path(path) / CONFIG).exists():
        raise FedLPError(
            f"{path} has no {CONFIG}, so no run finished a round there; run its configuration "
            "with --out instead."
        )
    return str(Path(path) / CONFIG), path


def refuse_other_run(
    config: Config, directory: Path, may_differ: Collection[str] = _MAY_DIFFER
) -> None:
    """Compares a configuration with that of the run in a directory, if it has one.

    Args:
      config: what is to run.
      directory: a run directory.
      may_differ: sections and fields that are not compared.

    Raises:
      FedLPError: with each field that differs, and both values.
    """
    path = directory / CONFIG
    # A run that was killed in its first moments leaves none, or an empty one.
    if path.exists() and path.stat().st_size:
        ours, theirs = (identity(one, may_differ) for one in (config, load_config(path)))
        refuse_other(theirs, ours, f"{directory} holds another run")


def identity(config: Config, may_differ: Collection[str] = _MAY_DIFFER) -> dict[str, Any]:
    """The settings that a resumed run must not change, without those that may differ.

    Files may move: a checkpoint has digests of the data and the partition.
    """
    settings = config.model_dump(mode="json", exclude=set(may_differ))
    settings["data"].pop("data_dir", None)
    settings["partition"].pop("path", None)
    if settings["data"]["name"].endswith(".npz"):
        settings["data"]["name"] = "an .npz file"
    return settings


def _defaults(config: Config) -> dict[str, Any]:
    """The settings at their default, dotted: a version without such a field ran as they say.

    Those of an optional section are not, if it is there but empty: that version ran without it.
    """
    given = config.model_dump(mode="json", exclude_defaults=True)
    other = tuple(f"{field}." for field, _ in dotted(given))
    return {f: value for f, value in dotted(identity(config)) if not f"{f}.".startswith(other)}
