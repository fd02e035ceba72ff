"""Snapshots: a run after a round, copied to the host and back, and what two runs must share."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path

from fedlp_jax.errors import FedLPError, shown, warn
from fedlp_jax.execution import processes
from fedlp_jax.execution.plan import Plan
from fedlp_jax.types import Array, PyTree, ServerState

if TYPE_CHECKING:
    from fedlp_jax.simulation.result import Row
    from fedlp_jax.simulation.run import Run

_BOOKS = ("ledger ", "history ")  # prefixes of arrays that grow with the rounds
_FEW = 8  # numbers that a sentence can show


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


def refuse_other(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    what: str,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Compares the settings of two runs.

    Args:
      old: nested, of the run that was saved.
      new: nested, of the run that resumes it.
      what: the beginning of the sentence.
      defaults: nested, the values of fields that `old` may lack.

    Raises:
      FedLPError: with each field that differs, and both values.
    """

    def words(settings: Mapping[str, Any], field: str) -> str:
        value = settings.get(field, "not set")
        plain = isinstance(value, str) and value.isprintable() and len(value) <= 100
        return value if plain else shown(value)

    before, now = dict(dotted(defaults or {})) | dict(dotted(old)), dict(dotted(new))
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


def digest(data: Any) -> str:
    """The SHA-256 of bytes, as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def summary(array: np.ndarray) -> str:
    """Dtype, shape and the beginning of a SHA-256, for comparison."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return f"{describe(array)} of SHA-256 {digest(data)[:16]}"


def dotted(settings: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """`{"a": {"b": 1}}` -> `[("a.b", 1)]`."""
    fields = []
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            fields += dotted(value, f"{before}{name}.")
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
