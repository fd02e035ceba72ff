"""Saving a run while it goes on: when a checkpoint is due, and orbax, which writes it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedlp_jax.errors import FedLPError
from fedlp_jax.simulation.checkpoint import ARRAYS, FACTS, Checkpoint, alone, pack
from fedlp_jax.simulation.snapshot import Snapshot


class Saver:
    """Writes the checkpoints of one run. A context manager: at its end the last one is on disk.

    orbax writes in a thread of its own, into a directory that gets its name when it is complete,
    and only then removes older ones.
    """

    def __init__(self, checkpoint: Checkpoint | None, resume: Snapshot | None):
        """Prepares to save.

        Args:
          checkpoint: where and how often; None = never.
          resume: what the run goes on from.

        Raises:
          FedLPError: there are checkpoints which the run does not go on from.
        """
        self._checkpoint = checkpoint
        self._manager: Any = None
        self._first = self._last = resume.round if resume is not None else 0
        self._saved_at = time.monotonic()
        if checkpoint is None or resume is not None or checkpoint.overwrite:
            return
        if checkpoint.rounds():
            raise FedLPError(
                f"{checkpoint.directory} has the checkpoints of a run, the last after round "
                f"{checkpoint.rounds()[-1]}; go on with resume=checkpoint.latest(), or name "
                "another directory."
            )

    def __enter__(self) -> Saver:
        """Does nothing yet."""
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        """Waits until the last checkpoint is written."""
        if self._manager is None:
            return
        try:
            with self._explained():
                self._manager.wait_until_finished()
        except RuntimeError:
            if kind is None:  # else the run failed of something else, which is what is told
                raise
        finally:
            with contextlib.suppress(Exception):  # it tells the same again
                self._manager.close()

    def due(self, round: int) -> bool:
        """Whether to save after this round.

        Raises:
          RuntimeError: the checkpoint before could not be written.
        """
        if self._checkpoint is None:
            return False
        if self._manager is not None and not self._manager.is_saving_in_progress():
            with self._explained():
                # Waits for nothing, but tells every failure: check_for_errors forgets what another
                # thread of orbax asked before.
                self._manager.wait_until_finished()
        every, minutes = self._checkpoint.every, self._checkpoint.minutes
        late = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        return late or (every is not None and round % every == 0)

    def until_due(self, round: int) -> int:
        """Rounds from this one up to the next after which to save, whatever the time."""
        every = None if self._checkpoint is None else self._checkpoint.every
        return 2**31 if every is None else every - (round - 1) % every

    def due_at_end(self, round: int, interrupted: bool) -> bool:
        """Whether to save after the last round: where a run can go on, or is a long one."""
        if self._checkpoint is None or round == self._last:
            return False
        return interrupted or self._last > 0 or self._checkpoint.every is not None

    def save(self, snapshot: Snapshot) -> None:
        """Starts to write a checkpoint; waits only for the one before.

        Raises:
          RuntimeError: one of them could not be written; it names the directory.
        """
        import orbax.checkpoint as ocp  # here for its half second

        assert self._checkpoint is not None
        arrays, facts = pack(snapshot, self._checkpoint.settings)
        items = {ARRAYS: ocp.args.PyTreeSave(arrays), FACTS: ocp.args.JsonSave(facts)}
        with self._explained():
            if self._manager is None:
                self._manager = self._open()
            self._manager.wait_until_finished()
            self._manager.save(snapshot.round, args=ocp.args.Composite(**items), force=True)
        self._last, self._saved_at = snapshot.round, time.monotonic()

    def _open(self) -> Any:
        import orbax.checkpoint as ocp

        assert self._checkpoint is not None
        folder = Path(self._checkpoint.directory).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            create=False,
            multiprocessing_options=alone(),
            preservation_policy=ocp.checkpoint_managers.LatestN(self._checkpoint.keep),
            cleanup_tmp_directories=True,
            lightweight_initialize=True,
        )
        manager = ocp.CheckpointManager(folder, options=options)
        for round in self._checkpoint.rounds():
            if round > self._first:  # damaged, or of the run that is overwritten
                manager.delete(round)
        return manager

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        assert self._checkpoint is not None
        try:
            yield
        except Exception as error:
            rounds = self._checkpoint.rounds()
            left = f"the last is that after round {rounds[-1]}" if rounds else "there is none yet"
            raise RuntimeError(
                f"a checkpoint in {self._checkpoint.directory} could not be written ({left}): "
                f"{error}"
            ) from error
