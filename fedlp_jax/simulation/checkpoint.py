"""Checkpoints: snapshots of a run on disk, which resume it bit for bit.

    DIRECTORY/ROUND/arrays/   every array of the run, end to end in one vector of bytes
    DIRECTORY/ROUND/facts/    JSON: names, dtypes and shapes, rows, settings, versions, SHA-256

orbax's `CheckpointManager` writes a checkpoint under a temporary name, renames it when it is
complete, and then deletes the oldest. It restores a flipped bit without an error, so the SHA-256 is
ours. The arrays are one vector because a damaged one then fails in a single read, and because no
name in a checkpoint can become a path. Nothing in a checkpoint is unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import fedlp_jax
from fedlp_jax.data.files import check_writable
from fedlp_jax.errors import FedLPError, check_number, shown, warn, why
from fedlp_jax.execution import processes
from fedlp_jax.execution.plan import Plan
from fedlp_jax.simulation.snapshot import Snapshot, digest, refuse_other

FORMAT = 5
_ARRAYS, _FACTS = "arrays", "facts"
_ROUND = re.compile("0|[1-9][0-9]{0,9}")  # the name of a checkpoint
_FIRST_SECONDS = 30.0  # from the start of a run to its first checkpoint, compilation included


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where and how often a run is saved.

        checkpoint = fl.Checkpoint("saved", every=100)
        fl.simulate(..., checkpoint=checkpoint, resume=checkpoint.latest())

    Attributes:
      directory: of this run only; the first checkpoint creates it.
      every: rounds between checkpoints; None = by time alone.
      minutes: minutes between checkpoints; None = by rounds alone. The first is due after 30
        seconds at the latest; a run that ends sooner leaves none, because it is quickly repeated.
      keep: how many checkpoints to keep, the latest ones.
      settings: what a resumed run must share with the run that was saved, in addition to its data,
        seed, clients and model: anything that JSON can hold, such as learning rates.
      overwrite: accept a directory with the checkpoints of another run, and delete them when the
        first of this run is due.
    """

    directory: str | Path
    every: int | None = None
    minutes: float | None = 10.0
    keep: int = 2
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Refuses numbers that are too small, and settings that JSON cannot hold."""
        if self.every is not None:
            check_number("checkpoint.every", self.every, ge=1, integer=True, optional=True)
        if self.minutes is not None:
            check_number("checkpoint.minutes", self.minutes, ge=0, optional=True)
        check_number("checkpoint.keep", self.keep, ge=1, integer=True)
        try:
            settings = json.loads(json.dumps(self.settings))
        except (TypeError, ValueError) as error:
            raise FedLPError(f"checkpoint.settings cannot be written as JSON: {error}.") from error
        object.__setattr__(self, "settings", settings)

    def rounds(self) -> list[int]:
        """The rounds after which there is a checkpoint, ascending."""
        try:
            names = os.listdir(self.directory)
        except FileNotFoundError:
            names = []
        except (OSError, ValueError) as error:
            raise FedLPError(
                f"the checkpoints in {shown(str(self.directory))} cannot be read: {why(error)}."
            ) from error
        return sorted(int(name) for name in names if _ROUND.fullmatch(name))

    def latest(self, defaults: Mapping[str, Any] | None = None) -> Snapshot | None:
        """Reads the last intact checkpoint; warns of each damaged one that it skips.

        Args:
          defaults: what settings count as that a checkpoint lacks, because the program that wrote
            it did not have them yet.

        Returns:
          What `simulate` takes as `resume`; None if there is no checkpoint.

        Raises:
          FedLPError: all checkpoints are damaged, or the last one has another format or other
            settings.
        """
        rounds = self.rounds()
        for round in reversed(rounds):
            folder = Path(self.directory, str(round)).absolute()
            try:
                return self._read(folder, round, defaults or {})
            except FedLPError:
                raise
            except Exception as error:  # a damaged file can raise almost anything
                warn(f"the checkpoint {folder} is damaged and skipped: {why(error)}.", stacklevel=2)
        if rounds:
            raise FedLPError(
                f"all checkpoints in {self.directory} are damaged (after rounds "
                f"{', '.join(map(str, rounds))}); start a new run in another directory."
            )
        return None

    def _read(self, folder: Path, round: int, defaults: Mapping[str, Any]) -> Snapshot:
        """Reads one checkpoint; whatever is wrong with its files raises."""
        import orbax.checkpoint as ocp  # imported late: it takes half a second

        with _quiet(), _manager(folder.parent) as manager:
            items = ocp.args.Composite(**{_FACTS: ocp.args.JsonRestore()})
            facts = manager.restore(round, args=items)[_FACTS]
            if facts.pop("sha256") != digest(_json(facts)):
                raise ValueError("the SHA-256 of its facts differs")
            _check_version(facts, folder)
            saved = facts["snapshot"]
            if saved["round"] != round:
                raise ValueError(f"it is of round {shown(saved['round'])}")
            what = f"{folder} belongs to another run"
            refuse_other(facts["settings"], self.settings, what, defaults)
            numpy = ocp.args.PyTreeRestore(
                {"data": 0}, restore_args={"data": ocp.RestoreArgs(restore_type=np.ndarray)}
            )
            data = manager.restore(round, args=ocp.args.Composite(**{_ARRAYS: numpy}))
        data = data[_ARRAYS]["data"]
        if facts["data_sha256"] != digest(data):
            raise ValueError("the SHA-256 of its arrays differs")
        snapshot = Snapshot(**saved | {"plan": Plan(**saved["plan"]), "data": data})
        if sum(array.nbytes for array in snapshot.arrays.values()) != data.size:
            raise ValueError("its arrays are not those of its facts")
        return snapshot


class Saver:
    """Decides when a run is saved, and saves it."""

    def __init__(self, checkpoint: Checkpoint | None, resume: Snapshot | None):
        """Checks before the run starts that it can be saved.

        Args:
          checkpoint: where and how often; None = never.
          resume: what the run starts from.

        Raises:
          FedLPError: the directory cannot be written, or has checkpoints that the run neither
            resumes nor may overwrite.
        """
        self._checkpoint = checkpoint
        self._last = 0 if resume is None else resume.round
        if checkpoint is None:
            return
        rounds = checkpoint.rounds()
        if rounds and resume is None and not checkpoint.overwrite:
            raise FedLPError(
                f"{checkpoint.directory} has the checkpoints of a run, the last after round "
                f"{rounds[-1]}; resume it with resume=checkpoint.latest(), or name another "
                "directory."
            )
        check_writable(Path(checkpoint.directory))
        self._interval = math.inf if checkpoint.minutes is None else 60 * checkpoint.minutes
        self._due_at = time.monotonic() + self._interval
        if checkpoint.minutes is not None:
            self._due_at = time.monotonic() + min(self._interval, _FIRST_SECONDS)

    def due(self, round: int) -> bool:
        """Whether to save after this round."""
        if self._checkpoint is None:
            return False
        every = self._checkpoint.every
        return time.monotonic() >= self._due_at or (every is not None and round % every == 0)

    def rounds_until_due(self, round: int) -> int:
        """Rounds from this one up to the next that is saved, whatever the time."""
        every = None if self._checkpoint is None else self._checkpoint.every
        return 2**31 if every is None else every - (round - 1) % every

    def due_at_end(self, round: int, interrupted: bool) -> bool:
        """Whether to save after the last round: an interrupted run, or a long one."""
        if self._checkpoint is None or round == self._last:
            return False
        return interrupted or self._last > 0 or self._checkpoint.every is not None

    def save(self, snapshot: Snapshot) -> None:
        """Writes a checkpoint, and deletes those that are no longer kept.

        Raises:
          RuntimeError: it could not be written; names the directory and the last good checkpoint.
        """
        import orbax.checkpoint as ocp  # imported late: it takes half a second

        assert self._checkpoint is not None
        folder = Path(self._checkpoint.directory).absolute()
        saved = snapshot._asdict() | {"plan": dataclasses.asdict(snapshot.plan)}
        data = saved.pop("data")
        facts = {
            "format": FORMAT,
            "versions": _versions(),
            "settings": self._checkpoint.settings,
            "snapshot": saved,
            "data_sha256": digest(data),
        }
        items = {
            _ARRAYS: ocp.args.PyTreeSave({"data": data}),
            _FACTS: ocp.args.JsonSave(facts | {"sha256": digest(_json(facts))}),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)  # somebody may have deleted it
            with _quiet(), _manager(folder, self._checkpoint.keep) as manager:
                for round in self._checkpoint.rounds():
                    if round > self._last:  # damaged, or of a run that is overwritten
                        manager.delete(round)
                manager.save(snapshot.round, args=ocp.args.Composite(**items), force=True)
        except Exception as error:
            rounds = self._checkpoint.rounds()
            left = f"the last is after round {rounds[-1]}" if rounds else "there is none yet"
            raise RuntimeError(
                f"a checkpoint in {self._checkpoint.directory} could not be written ({left}): "
                f"{why(error)}."
            ) from error
        self._last, self._due_at = snapshot.round, time.monotonic() + self._interval


def _manager(folder: Path, keep: int | None = None) -> Any:
    """Orbax's manager, without other processes, threads, or OCDBT.

    OCDBT merges its files by a glob, and writes nothing that can be read into a directory such as
    `run[1]`.
    """
    import orbax.checkpoint as ocp

    this = processes.index()
    alone = ocp.options.MultiprocessingOptions(primary_host=this, active_processes={this})
    options = ocp.CheckpointManagerOptions(
        create=False,
        multiprocessing_options=alone,
        preservation_policy=keep and ocp.checkpoint_managers.LatestN(keep),
        cleanup_tmp_directories=keep is not None,  # of runs that were killed
        enable_async_checkpointing=False,
        lightweight_initialize=True,
    )
    handlers = {
        _ARRAYS: ocp.PyTreeCheckpointHandler(use_ocdbt=False, multiprocessing_options=alone),
        _FACTS: ocp.JsonCheckpointHandler(multiprocessing_options=alone),
    }
    return ocp.CheckpointManager(folder, options=options, item_handlers=handlers)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps orbax from logging what it also raises, and that it has no OCDBT files to merge."""
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _check_version(facts: Mapping[str, Any], folder: Path) -> None:
    here, there = _versions(), facts["versions"]
    if facts["format"] != FORMAT:
        raise FedLPError(
            f"{folder} was written by fedlp_jax {there['fedlp_jax']} in format {facts['format']}, "
            f"but fedlp_jax {here['fedlp_jax']} reads format {FORMAT}; resume with that version, "
            "or start a new run in another directory."
        )
    other = [
        f"{name} {there[name]}, not {here[name]}" for name in here if here[name] != there[name]
    ]
    if other:
        warn(
            f"{folder} was written with {', '.join(other)}: the bits of later rounds may differ.",
            stacklevel=4,
        )


def _versions() -> dict[str, str]:
    import jaxlib

    return {
        "fedlp_jax": fedlp_jax.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
    }


def _json(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts, sort_keys=True).encode()
