"""A run at the end of a round: all it needs to go on, on the host, and how it is put back."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path

from fedlp_jax.data.loading import Dataset
from fedlp_jax.errors import FedLPError, shown
from fedlp_jax.execution import processes as hosts
from fedlp_jax.execution.map_clients import Plan
from fedlp_jax.simulation.leaves import check_sum, is_key, kind, raw
from fedlp_jax.simulation.result import Row
from fedlp_jax.simulation.run import Run
from fedlp_jax.types import Array, PyTree

_OTHER = "the checkpoint is of another run"


class Snapshot(NamedTuple):
    """What a run needs to go on after a round.

    `leaves` has the server's state (variables, and the states of policy, aggregator and server
    optimizer) and the clients' private variables. Draws need nothing but the seed and the round.
    """

    round: int  # rounds done, R
    leaves: dict[str, np.ndarray]  # by path
    ledger: dict[str, np.ndarray]  # as `Ledger.arrays` has it
    rows: list[Row]  # R
    sums: dict[str, float]  # of shares of the layout, over rounds
    settings: dict[str, Any]  # of the run, to tell it from others
    plan: Plan
    lowerings: dict[str, str]  # of convolutions, see `conv.recording`


def take(run: Run) -> Snapshot:
    """The run after the round that was read last; none may be in flight."""
    return Snapshot(
        len(run.history),
        {path: np.array(raw(leaf)) for path, leaf in _leaves(run).items()},
        run.ledger.arrays(),
        list(run.history.rows),
        {"padded_share": run.padded_share, "imbalance": run.imbalance},
        _settings(run),
        run.plan,
        dict(run.lowerings),
    )


def facts(run: Run, data: Dataset, resume: Snapshot | None) -> dict[str, Any]:
    """What several processes must have in common for their numbers to be those of one run."""
    arrays = {"train": data.train.inputs, "test": data.test.inputs, "labels": data.test.labels}
    arrays |= {path: np.asarray(raw(leaf)) for path, leaf in _leaves(run).items()}
    return _settings(run) | {
        "rounds": run.last_round,
        "eval_every": run.eval_every,
        "plan": dataclasses.asdict(run.plan),
        "rounds in the checkpoint it reads": 0 if resume is None else resume.round,
        "arrays": {name: check_sum(array) for name, array in arrays.items()},
    }


def check(run: Run, snapshot: Snapshot) -> None:
    """Refuses the snapshot of another run, before anything is compiled.

    Raises:
      FedLPError: with what differs.
    """
    refuse_other(_plain(snapshot.settings), _plain(_settings(run)), _OTHER)
    needs = {path: kind(raw(leaf)) for path, leaf in _leaves(run).items()}
    has = {path: kind(leaf) for path, leaf in snapshot.leaves.items()}
    for path in sorted(needs.keys() | has.keys()):
        if needs.get(path) != has.get(path):
            raise FedLPError(
                f"the checkpoint is of another algorithm or model: as {path} it holds "
                f"{has.get(path, 'nothing')}, but this run {needs.get(path, 'nothing')}."
            )
    # Rounds take their numbers from the state, so those of the checkpoint would win.
    refuse_other(snapshot.settings, _settings(run), _OTHER)


def put_back(run: Run, snapshot: Snapshot) -> None:
    """Makes a run that is compiled the one that was taken; warns if sums change their order."""
    if snapshot.plan != run.plan or (run.lowerings and snapshot.lowerings != run.lowerings):
        warnings.warn(
            f"the run goes on with {_words(run.plan)}, and was begun with {_words(snapshot.plan)}; "
            "where plans or forms of convolutions differ, sums are taken in another order.",
            stacklevel=3,
        )

    def filled(path: Any, old: Array) -> Array:
        new: Any = snapshot.leaves.get(keystr(path))
        if new is None:
            return old  # it has no elements
        if is_key(old):
            new = jax.random.wrap_key_data(new, impl=jax.random.key_impl(old))
        sharding = old.sharding
        old.delete()  # before its successor is made: a store may take over half of the memory
        return hosts.put(new, sharding)

    trees = tree_map_with_path(filled, _trees(run))
    run.state = trees["state"]
    if run.stage.store is not None:
        run.stage.store.stacks = trees["private"]
    run.ledger.load(snapshot.ledger)
    run.history.rows = list(snapshot.rows)
    run.padded_share, run.imbalance = snapshot.sums["padded_share"], snapshot.sums["imbalance"]


def refuse_other(old: Mapping[str, Any], new: Mapping[str, Any], what: str) -> None:
    """Compares the settings of two runs.

    Args:
      old: those of the run that was begun, nested.
      new: those of the one that should go on with it.
      what: the beginning of the sentence.

    Raises:
      FedLPError: with each field that differs, and both values.
    """
    before, now = dict(_dotted(old)), dict(_dotted(new))
    differing = [
        f"{_word(field)} was {_word(before.get(field, 'not set'))} and is "
        f"{_word(now.get(field, 'not set'))}"
        for field in dict.fromkeys([*before, *now])
        if (field in before, before.get(field)) != (field in now, now.get(field))
    ]
    if differing:
        raise FedLPError(
            f"{what}: {'; '.join(differing)}. Go on with the settings it was begun with, or start "
            "a new run in another directory."
        )


def _word(value: Any) -> str:
    """A setting in a sentence: text without quotes, unless it is long or cannot be printed."""
    plain = isinstance(value, str) and value.isprintable() and len(value) <= 100
    return value if plain else shown(value)


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
    return {"state": run.state, "private": () if store is None else store.stacks}


def _leaves(run: Run) -> dict[str, Array]:
    """What has elements, by path."""
    return {keystr(path): x for path, x in tree_leaves_with_path(_trees(run)) if x.size}


def _settings(run: Run) -> dict[str, Any]:
    return {
        "seed": run.seed,
        "clients": run.population,
        "cohort": run.size,
        "partition": run.clients.hash,
        "begun with": run.begun_with,
    }


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "begun with"}


def _words(plan: Plan) -> str:
    return f"{plan.devices} devices of width {plan.width}"
