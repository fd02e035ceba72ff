"""Checkpoints: a run on disk after some of its rounds, whole or not there at all.

    ROUND/arrays/   every array, under its number
    ROUND/facts/    JSON: what the arrays are, rows, settings, versions, and SHA-256 sums of it all

orbax writes them and reads them, but does not notice a flipped bit, so the sums are checked here.
There is no pickle in a checkpoint, and nothing written in it or linked from it leads outside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import fedlp_jax
from fedlp_jax.errors import FedLPError, is_number, shown, whole_number, why
from fedlp_jax.execution import processes as hosts
from fedlp_jax.execution.map_clients import Plan
from fedlp_jax.simulation.snapshot import Snapshot, refuse_other

FORMAT = 2
ARRAYS, FACTS = "arrays", "facts"
_ROUND = re.compile("0|[1-9][0-9]{0,9}")  # the name of a checkpoint


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where and how often a run is saved.

        checkpoint = fl.Checkpoint("saved", every=100)
        fl.simulate(..., checkpoint=checkpoint, resume=checkpoint.latest())

    Attributes:
      directory: of this run and no other; made when the first checkpoint is written.
      every: rounds from one checkpoint to the next; None = by time alone.
      minutes: the same in minutes; None = by rounds alone. A run that ends before its first
        checkpoint is due leaves none, as it can be repeated in that time.
      keep: how many are kept, the latest.
      settings: what a run that goes on has in common with the one that was begun, beside seed,
        clients and model; anything that JSON can hold, such as learning rates.
      overwrite: `directory` may have checkpoints of another run, which go when the first of this
        one is due.
    """

    directory: str | Path
    every: int | None = None
    minutes: float | None = 10.0
    keep: int = 2
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Refuses numbers that are too small, and settings that are no JSON."""
        for name in ("every", "keep"):
            if (value := getattr(self, name)) is not None or name == "keep":
                object.__setattr__(self, name, whole_number(f"checkpoint.{name}", value, 1))
        if self.minutes is not None and not (is_number(self.minutes) and self.minutes >= 0):
            raise FedLPError(
                f"checkpoint.minutes={shown(self.minutes)} must be a number of at least 0."
            )
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

    def latest(self) -> Snapshot | None:
        """The last checkpoint that is whole; a damaged one is passed over with a warning.

        Returns:
          What `simulate` takes as `resume`; None if there is no checkpoint.

        Raises:
          FedLPError: all are damaged, or the last is of another version or has other settings.
        """
        rounds = self.rounds()
        for round in reversed(rounds):
            folder = Path(self.directory, str(round)).absolute()
            try:
                facts = _read_facts(folder)
                _check_version(facts, folder)
                if facts["round"] != round:
                    raise ValueError(f"it is of round {shown(facts['round'])}")
                refuse_other(facts["settings"], self.settings, f"{folder} is of another run")
                with _late_reads_unheard():
                    return _unpack(facts, _read_arrays(folder, facts["arrays"]))
            except FedLPError:
                raise
            except Exception as error:  # a damaged file can raise almost anything
                warnings.warn(
                    f"the checkpoint {folder} is damaged and passed over: {why(error)}.",
                    stacklevel=2,
                )
        if rounds:
            raise FedLPError(
                f"all checkpoints in {self.directory} are damaged (after rounds "
                f"{', '.join(map(str, rounds))}); start the run anew in another directory."
            )
        return None


def pack(
    snapshot: Snapshot, settings: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A snapshot as what is written: the arrays under their numbers, and the facts."""
    found = {f"leaf {name}": array for name, array in snapshot.leaves.items()}
    found |= {f"ledger {name}": array for name, array in snapshot.ledger.items()}
    facts = {
        "format": FORMAT,
        "versions": _versions(),
        "settings": settings,
        "round": snapshot.round,
        "rows": snapshot.rows,
        "sums": snapshot.sums,
        "run": snapshot.settings,
        "plan": dataclasses.asdict(snapshot.plan),
        "lowerings": snapshot.lowerings,
        "arrays": [[name, _sum(array)] for name, array in found.items()],
    }
    arrays = {str(i): array for i, array in enumerate(found.values())}
    return arrays, facts | {"sha256": _sum_of_facts(facts)}


def _unpack(facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Snapshot:
    def part(kind: str) -> dict[str, np.ndarray]:
        names = (name for name in arrays if name.startswith(kind))
        return {name.removeprefix(kind): arrays[name] for name in names}

    return Snapshot(
        facts["round"],
        part("leaf "),
        part("ledger "),
        facts["rows"],
        facts["sums"],
        facts["run"],
        Plan(**facts["plan"]),
        facts["lowerings"],
    )


def hush() -> None:
    """Keeps off stderr what orbax and its event loop log, with a traceback, of what they raise.

    A command tells it in a sentence. What is logged depends on which of several reads fails first.
    """
    import logging

    from absl import logging as of_orbax

    of_orbax.set_verbosity(of_orbax.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)


def alone() -> Any:
    """What tells orbax that no other process takes part: each can read, and the first writes."""
    import orbax.checkpoint as ocp  # here for its half second

    this = hosts.index()
    return ocp.options.MultiprocessingOptions(primary_host=this, active_processes={this})


def _reader() -> Any:
    import orbax.checkpoint as ocp

    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=alone())
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone())


def _read_facts(folder: Path) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    for path in (folder, *folder.rglob("*")):
        if path.is_symlink():
            raise ValueError(f"{path} is a link, and a checkpoint has none")
        if not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is a pipe or a device, and a checkpoint has none")
    reader = _reader()
    facts = reader.restore(folder, args=ocp.args.Composite(**{FACTS: ocp.args.JsonRestore()}))[
        FACTS
    ]
    if facts.pop("sha256") != _sum_of_facts(facts):
        raise ValueError("the SHA-256 of its facts is another")
    return facts


def _read_arrays(folder: Path, listed: list[tuple[str, str]]) -> dict[str, np.ndarray]:
    """The arrays by name. orbax is asked for numbers only: no name of a file leads anywhere."""
    import orbax.checkpoint as ocp

    as_numpy = {str(i): ocp.RestoreArgs(restore_type=np.ndarray) for i in range(len(listed))}
    wanted = ocp.args.PyTreeRestore(dict.fromkeys(as_numpy, 0), restore_args=as_numpy)
    reader = _reader()
    found = reader.restore(folder, args=ocp.args.Composite(**{ARRAYS: wanted}))[ARRAYS]
    for i, (name, digest) in enumerate(listed):
        if _sum(found[str(i)]) != digest:
            raise ValueError(f"the SHA-256 of {name} is another")
    return {name: found[str(i)] for i, (name, _) in enumerate(listed)}


@contextlib.contextmanager
def _late_reads_unheard() -> Iterator[None]:
    """Where one array cannot be read, keeps the reads of others from telling so in tracebacks.

    orbax leaves them running in threads, which find its loop closed when they end.
    """
    before = sys.unraisablehook

    def unheard(told: Any) -> None:
        if str(told.exc_value) != "Event loop is closed":
            before(told)

    sys.unraisablehook = unheard
    yield
    sys.unraisablehook = before  # only where all went well: nobody says when the last read ends


def _check_version(facts: Mapping[str, Any], folder: Path) -> None:
    here, there = _versions(), facts["versions"]
    if facts["format"] != FORMAT:
        raise FedLPError(
            f"{folder} was written by fedlp_jax {there['fedlp_jax']} in format {facts['format']}, "
            f"but fedlp_jax {here['fedlp_jax']} reads format {FORMAT}; go on with that version."
        )
    other = [
        f"{name} {there[name]}, not {here[name]}" for name in here if here[name] != there[name]
    ]
    if other:
        warnings.warn(
            f"{folder} was written with {', '.join(other)}: the bits of what follows may differ.",
            stacklevel=3,
        )


def _versions() -> dict[str, str]:
    import jaxlib

    return {
        "fedlp_jax": fedlp_jax.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
    }


def _sum(array: np.ndarray) -> str:
    """SHA-256 of dtype, shape and bytes."""
    digest = hashlib.sha256(f"{array.dtype}{list(array.shape)}".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _sum_of_facts(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
