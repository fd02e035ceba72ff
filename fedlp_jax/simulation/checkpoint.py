"""Checkpoints: save a run after a round, and resume it bit for bit.

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
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path

import fedlp_jax
from fedlp_jax.data.files import check_writable
from fedlp_jax.errors import FedLPError, check_number, shown, warn, why
from fedlp_jax.execution import processes
from fedlp_jax.execution.plan import Plan
from fedlp_jax.types import Array, PyTree, ServerState

if TYPE_CHECKING:
    from fedlp_jax.simulation.result import Row
    from fedlp_jax.simulation.run import Run

FORMAT = 5
_BOOKS = ("ledger ", "history ")  # prefixes of arrays that grow with the rounds
_ARRAYS, _FACTS = "arrays", "facts"
_ROUND = re.compile("0|[1-9][0-9]{0,9}")  # the name of a checkpoint
_FIRST_SECONDS = 30.0  # from the start of a run to its first checkpoint, compilation included
_FEW = 8  # numbers that a sentence can show


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

    def latest(self) -> Snapshot | None:
        """Reads the last intact checkpoint; warns of each damaged one that it skips.

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
                return self._read(folder, round)
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

    def _read(self, folder: Path, round: int) -> Snapshot:
        """Reads one checkpoint; whatever is wrong with its files raises."""
        import orbax.checkpoint as ocp  # imported late: it takes half a second

        with _quiet(), _manager(folder.parent) as manager:
            items = ocp.args.Composite(**{_FACTS: ocp.args.JsonRestore()})
            facts = manager.restore(round, args=items)[_FACTS]
            if facts.pop("sha256") != _digest(_json(facts)):
                raise ValueError("the SHA-256 of its facts differs")
            _check_version(facts, folder)
            saved = facts["snapshot"]
            if saved["round"] != round:
                raise ValueError(f"it is of round {shown(saved['round'])}")
            refuse_other(facts["settings"], self.settings, f"{folder} belongs to another run")
            numpy = ocp.args.PyTreeRestore(
                {"data": 0}, restore_args={"data": ocp.RestoreArgs(restore_type=np.ndarray)}
            )
            data = manager.restore(round, args=ocp.args.Composite(**{_ARRAYS: numpy}))
        data = data[_ARRAYS]["data"]
        if facts["data_sha256"] != _digest(data):
            raise ValueError("the SHA-256 of its arrays differs")
        snapshot = Snapshot(**saved | {"plan": Plan(**saved["plan"]), "data": data})
        if sum(array.nbytes for array in snapshot.arrays.values()) != data.size:
            raise ValueError("its arrays are not those of its facts")
        return snapshot


class Snapshot(NamedTuple):
    """A run after a round, on the host.

    Its arrays are the server's state (variables, and the states of policy, aggregator and server
    optimizer), what the clients keep, the ledger and the history of clients. Random draws need only
    the seed and the round, so they leave nothing to save.
    """

    round: int  # rounds done, R
    rows: list[Row]  # R
    sums: dict[str, float]  # of shares of the layout, over rounds
    settings: dict[str, Any]  # what identifies the run
    plan: Plan
    lowerings: dict[str, str]  # of convolutions, see `conv.recording`
    layout: list[tuple[str, str, list[int]]]  # name, dtype and shape of each array
    data: np.ndarray  # u8, all arrays end to end

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Views of `data`, by name."""
        arrays, end = {}, 0
        for name, dtype, shape in self.layout:
            start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
            arrays[name] = self.data[start:end].view(dtype).reshape(shape)
        return arrays


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
            "data_sha256": _digest(data),
        }
        items = {
            _ARRAYS: ocp.args.PyTreeSave({"data": data}),
            _FACTS: ocp.args.JsonSave(facts | {"sha256": _digest(_json(facts))}),
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


def _digest(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


def _json(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts, sort_keys=True).encode()


# --- a run and its snapshot -----------------------------------------------------------------------


def capture(run: Run) -> Snapshot:
    """Copies a run to the host, after the round that was read last; none may be in flight."""
    arrays: dict[str, Any] = {name: key_data(leaf) for name, leaf in _leaves(run).items()}
    arrays |= {f"ledger {name}": array for name, array in run.ledger.arrays().items()}
    arrays |= {f"history {name}": array for name, array in run.client_history.arrays().items()}
    snapshot = Snapshot(
        len(run.history),
        list(run.history.rows),
        {"padded_share": run.padded_share, "imbalance": run.imbalance},
        _settings(run),
        run.plan,
        dict(run.lowerings),
        [(name, str(array.dtype), list(array.shape)) for name, array in arrays.items()],
        np.empty(sum(array.nbytes for array in arrays.values()), np.uint8),
    )
    for name, view in snapshot.arrays.items():
        view[...] = arrays[name]
    return snapshot


def check(run: Run, snapshot: Snapshot) -> None:
    """Refuses the snapshot of another run, before anything is compiled.

    Raises:
      FedLPError: with what differs.
    """
    before, now = snapshot.settings, _settings(run)
    other = "the checkpoint belongs to another run"
    refuse_other({**before, "begun with": {}}, {**now, "begun with": {}}, other)
    needs = {name: describe(key_data(leaf)) for name, leaf in _leaves(run).items()}
    arrays = snapshot.arrays.items()
    has = {name: describe(array) for name, array in arrays if not name.startswith(_BOOKS)}
    for name in sorted(needs.keys() | has.keys()):
        if needs.get(name) != has.get(name):
            raise FedLPError(
                f"the checkpoint has another algorithm or model: {name} is "
                f"{has.get(name, 'nothing')} in it and {needs.get(name, 'nothing')} in this run."
            )
    # Rounds take their numbers from the state, so those of the checkpoint would win.
    refuse_other(before, now, other)


def restore(run: Run, snapshot: Snapshot) -> None:
    """Continues a compiled run from a snapshot; warns if sums change their order."""
    before, now = (
        f"{plan.devices} devices of width {plan.width}" for plan in (snapshot.plan, run.plan)
    )
    if now != before or (run.lowerings and snapshot.lowerings != run.lowerings):
        warn(
            f"the run resumes with {now}, but started with {before}; where plans or convolution "
            "algorithms differ, sums are taken in another order.",
            stacklevel=3,
        )
    arrays = snapshot.arrays

    def filled(path: Any, old: Array) -> Array:
        new: Any = arrays.get(keystr(path))
        if new is None:
            return old  # it has no elements
        if jax.dtypes.issubdtype(old.dtype, jax.dtypes.prng_key):
            new = jax.random.wrap_key_data(new, impl=jax.random.key_impl(old))
        sharding = old.sharding
        old.delete()  # first: client state may fill over half of the memory
        return processes.put(new, sharding)

    trees = tree_map_with_path(filled, _trees(run))
    run.state = trees["state"]
    if run.stage.store is not None:
        run.stage.store.stacks = trees["clients"]
    run.ledger.load({name: arrays[f"ledger {name}"] for name in run.ledger.arrays()})
    client_history = run.client_history
    client_history.load({name: arrays[f"history {name}"] for name in client_history.arrays()})
    run.history.rows = list(snapshot.rows)
    run.padded_share, run.imbalance = snapshot.sums["padded_share"], snapshot.sums["imbalance"]


def shared_facts(run: Run, resume: Snapshot | None) -> dict[str, Any]:
    """What several processes must have in common for their numbers to be those of one run."""
    arrays = {name: np.asarray(key_data(leaf)) for name, leaf in _leaves(run).items()}
    return _settings(run) | {
        "rounds": run.last_round,
        "eval_every": run.eval_every,
        "plan": dataclasses.asdict(run.plan),
        "rounds in the checkpoint": 0 if resume is None else resume.round,
        "arrays": {name: summary(array) for name, array in arrays.items()},
    }


def first_numbers(state: ServerState) -> dict[str, Any]:
    """The numbers that a run begins with and that identify it: keep, clip, ...

    Args:
      state: before the first round.

    Returns:
      `{"policy": [[0.5]], ...}`: up to eight numbers as lists, more as a digest, all of them JSON.
      The model and the optimizer's averages are left out.
    """
    numbers: dict[str, Any] = {}
    for path, leaf in tree_leaves_with_path(state._replace(variables=())):
        name = keystr(path, simple=True, separator=".")
        if leaf.size <= _FEW:
            numbers[name] = np.asarray(key_data(leaf)).tolist()
        elif not name.startswith("optimizer"):
            numbers[name] = summary(np.asarray(key_data(leaf)))
    return numbers


def refuse_other(old: Mapping[str, Any], new: Mapping[str, Any], what: str) -> None:
    """Compares the settings of two runs.

    Args:
      old: nested, of the run that was saved.
      new: nested, of the run that resumes it.
      what: the beginning of the sentence.

    Raises:
      FedLPError: with each field that differs, and both values.
    """

    def words(settings: Mapping[str, Any], field: str) -> str:
        value = settings.get(field, "not set")
        plain = isinstance(value, str) and value.isprintable() and len(value) <= 100
        return value if plain else shown(value)

    before, now = dict(_dotted(old)), dict(_dotted(new))
    differing = [
        f"{field} was {words(before, field)} and is {words(now, field)}"
        for field in dict.fromkeys([*before, *now])
        if (field in before, before.get(field)) != (field in now, now.get(field))
    ]
    if differing:
        raise FedLPError(
            f"{what}: {'; '.join(differing)}. Resume with the original settings, or start a new "
            "run in another directory."
        )


def key_data(leaf: Array) -> Array:
    """The array; of random keys the `u32` that they consist of, which numpy can hold."""
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf


def describe(array: Any) -> str:
    """`"float32[3, 4]"`, of an array or its shape."""
    return f"{array.dtype}{list(array.shape)}"


def summary(array: np.ndarray) -> str:
    """Dtype, shape and the beginning of a SHA-256, for comparison."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return f"{describe(array)} of SHA-256 {_digest(data)[:16]}"


def _dotted(settings: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """`{"a": {"b": 1}}` -> `[("a.b", 1)]`."""
    fields = []
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            fields += _dotted(value, f"{before}{name}.")
        else:
            fields.append((f"{before}{name}", value))
    return fields


def _trees(run: Run) -> dict[str, PyTree]:
    store = run.stage.store
    return {"state": run.state, "clients": () if store is None else store.stacks}


def _leaves(run: Run) -> dict[str, Array]:
    """The arrays that have elements, by path."""
    return {keystr(path): x for path, x in tree_leaves_with_path(_trees(run)) if x.size}


def _settings(run: Run) -> dict[str, Any]:
    return {
        "seed": run.seed,
        "clients": run.population,
        "cohort": run.size,
        "data": run.spec.data.hash,
        "partition": run.clients.hash,
        "begun with": run.begun_with,
    }
