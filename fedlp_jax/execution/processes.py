"""Several processes as one machine: which this is, what they tell each other, whose devices.

Every process runs the same host loop, since all that it does is a function of (seed, round,
client), and computes its own devices' share of each round. Only the first writes files. What they
have to say to each other beside that goes through the key-value store of jax's coordination
service, so it needs no device and compiles nothing. With one process all of this is nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # its client has no public name; orbax uses it too
from jax.sharding import Sharding

from fedlp_jax.errors import FedLPError
from fedlp_jax.types import PyTree

_PATIENCE_SECONDS = 3600  # how much later another process may come to the same step
_LOOK_UP_MILLISECONDS = 500  # how often a process that waits asks whether another has failed
_STEPS, _FAILURES, _NOTED = (f"fedlp_jax/{name}" for name in ("step", "failed", "noted"))
_turns = itertools.count()  # every process takes the same steps in the same order
_epoch = 0  # of steps between failures that all have heard of


def count() -> int:
    """How many processes run together."""
    state = distributed.global_state
    return state.num_processes if state.client is not None else 1


def index() -> int:
    """Which of them this is, from 0."""
    state = distributed.global_state
    return state.process_id if state.client is not None else 0


def is_first() -> bool:
    """Whether this is the one that writes."""
    return index() == 0


# --- what they tell each other ------------------------------------------------------------------


def exchange(what: str, word: str) -> list[str]:
    """What each process has to say at a step, in their order. All of them call it.

    Args:
      what: names the step; the same everywhere.
      word: what this one says.

    Raises:
      FedLPError: another process has refused something on its way here, see `together`.
      RuntimeError: another has failed at something, or ended, or does not come.
    """
    client = distributed.global_state.client
    if client is None:
        return [word]
    step = f"{_STEPS}/{_epoch}/{next(_turns)}/{what}"
    client.key_value_set(f"{step}/{index()}", word)
    return [
        _heard(client, f"{step}/{i}", f"process {i} did not come to '{what}'")
        for i in range(count())
    ]


def _heard(client: Any, key: str, otherwise: str) -> str:
    """Waits for a word; what another process has failed at meanwhile is raised here."""
    late = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return client.blocking_key_value_get(key, _LOOK_UP_MILLISECONDS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error) or time.monotonic() > late:
                raise RuntimeError(f"{otherwise}: {error}") from error
        failures = client.key_value_dir_get(f"{_FAILURES}/{_epoch}/")
        for i, kind, text in sorted(json.loads(word) for _, word in failures):
            client.key_value_set(f"{_NOTED}/{_epoch}/{index()}", "", allow_overwrite=True)
            raise (FedLPError if kind == "refused" else RuntimeError)(f"process {i}: {text}")


def agree(what: str, facts: Mapping[str, Any]) -> None:
    """Goes on only if all processes have the same facts, which JSON can hold.

    Raises:
      FedLPError: the same everywhere, with the first fields that differ.
    """
    told = [json.loads(word) for word in exchange(what, json.dumps(facts, default=str))]
    for i, other in enumerate(told):
        found = list(_differences(told[0], other))
        if found:
            raise FedLPError(
                f"process {i} of {len(told)} has another {what} than process 0: "
                f"{'; '.join(found[:5])}{'; ...' if len(found) > 5 else ''}. Give all processes "
                "the same."
            )


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """A step that all processes take or none: what one refuses or fails at, all do.

    Who catches that, in every process, can go on: steps after it are counted anew.

    Raises:
      FedLPError: what another process refused.
      RuntimeError: what another process failed at.
    """
    try:
        yield
    except Exception as error:
        _tell(error)
        _count_anew()
        raise
    try:
        exchange(what, "")
    except (FedLPError, RuntimeError):
        if _has_failed():
            _count_anew()
        raise


def _count_anew() -> None:
    global _epoch, _turns
    _epoch, _turns = _epoch + 1, itertools.count()


def _has_failed() -> bool:
    client: Any = distributed.global_state.client
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody answers any more
        return bool(client.key_value_dir_get(f"{_FAILURES}/{_epoch}/"))
    return False


def _tell(error: Exception) -> None:
    """Lets the others know of an error, unless it is theirs, and waits until they do."""
    client = distributed.global_state.client
    if client is None:
        return
    client.key_value_set(f"{_NOTED}/{_epoch}/{index()}", "", allow_overwrite=True)
    if _has_failed():
        return
    kind = "refused" if isinstance(error, FedLPError) else "failed"
    word = json.dumps([index(), kind, str(error)])
    client.key_value_set(f"{_FAILURES}/{_epoch}/{index()}", word)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the error at hand is the one to tell
        for i in range(count()):
            client.blocking_key_value_get(f"{_NOTED}/{_epoch}/{i}", 1000 * _PATIENCE_SECONDS)


def from_first(what: str, word: str) -> str:
    """What the first process says."""
    return exchange(what, word)[0]


def anywhere(what: str, here: bool) -> bool:
    """Whether it is so in any process."""
    return any(word == "yes" for word in exchange(what, "yes" if here else "no"))


def least(what: str, here: int | None) -> int | None:
    """The smallest of all processes' numbers; None if any has none."""
    said = json.loads(f"[{','.join(exchange(what, json.dumps(here)))}]")
    return None if None in said else min(said)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Says of an error in talking to other processes that this is what it is.

    Raises:
      RuntimeError: another process has ended, or cannot be reached.
    """
    try:
        yield
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        talking = ("Gloo", "NCCL", "RCCL", "oordination service", "ollective")
        if count() == 1 or not any(word in str(error) for word in talking):
            raise
        raise RuntimeError(
            f"another of the {count()} processes has ended or cannot be reached: {error}"
        ) from error


# --- devices ------------------------------------------------------------------------------------


def devices(number: int | None = None) -> list[jax.Device]:
    """The first devices, the same number of each process, in the order of processes.

    Args:
      number: how many in all, a multiple of the number of processes; None = as many as there are.
    """
    if count() == 1:
        return jax.devices()[:number]
    own = [[d for d in jax.devices() if d.process_index == i] for i in range(count())]
    each = min(map(len, own)) if number is None else number // count()
    return [device for here in own for device in here[:each]]


def share(number: int | None) -> int | None:
    """What one process has of a plan's devices.

    Raises:
      FedLPError: they cannot be dealt out evenly.
    """
    if number is not None and number % count():
        raise FedLPError(
            f"plan.devices={number} are all devices together, and cannot be dealt out to "
            f"{count()} processes; make it a multiple of {count()}, or leave it open."
        )
    return None if number is None else number // count()


def evenly(number: int) -> int:
    """The largest number of devices, up to this one, of which each process has as many.

    Raises:
      FedLPError: not even one each.
    """
    if number < count():
        raise FedLPError(
            f"there is work for {number} device(s), but {count()} processes; a cohort has at least "
            f"a client for each process, so start {number} or enlarge the cohort."
        )
    return number // count() * count()


def put(tree: PyTree, sharding: Sharding) -> PyTree:
    """`jax.device_put` of what every process has the same of.

    device_put itself would compare the values over the network first, each time.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def lay(leaf: Any) -> jax.Array:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = lay(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])

    return jax.tree.map(lay, tree)


def _differences(first: Any, other: Any, path: str = "") -> Iterator[str]:
    if isinstance(first, dict) and isinstance(other, dict):
        for key in dict.fromkeys([*first, *other]):
            below = f"{path}.{key}" if path else key
            yield from _differences(first.get(key), other.get(key), below)
    elif first != other:
        yield f"{path} is {other}, not {first}"
