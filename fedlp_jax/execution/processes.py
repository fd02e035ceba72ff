"""Several processes as one machine: `connect` joins them, and they agree on what they run.

Every process runs the same host loop, because all that it does is a function of (seed, round,
client), and computes its own devices' share of each round. Only the first one writes files. jax
does the rest: `jax.distributed` connects the processes and ends them when one dies. With a single
process every function here returns at once.

Functions marked *collective* must be called by all processes, in the same order.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as Spec

import fedlp_jax
from fedlp_jax.errors import FedLPError
from fedlp_jax.types import PyTree

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
_PAGE = 4096  # bytes; texts of similar length share one compiled gather


class SharedError(FedLPError):
    """One process refused its input, and every process knows."""


def connect(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    seconds: float = 120.0,
) -> None:
    """Makes this process one of several that run together. Call it before jax is used.

    Then every process calls the same functions with the same arguments: `fl.setup`, within half a
    minute of each other, then `fl.simulate` or `fl.run`. A plan's devices are those of all
    processes together. If several processes share the GPUs of a host, `CUDA_VISIBLE_DEVICES` deals
    them out.

    Args:
      coordinator: `HOST:PORT` of process 0, which listens there; None = detected by jax, on TPU
        pods, Slurm, Open MPI and Kubernetes.
      num_processes: number of processes.
      process_id: this process, from 0.
      seconds: how long to wait for the others. jax aborts the process if they do not come.

    Raises:
      FedLPError: an argument is missing or out of range, the port is taken, jax was used before,
        or there is no cluster to detect.
    """
    _check_place(coordinator, num_processes, process_id)
    if jax.distributed.is_initialized():
        raise FedLPError("this process is already connected; call fl.connect() once, at the start.")
    # Otherwise jax takes SIGTERM, which here ends a run after a round, as Ctrl-C does.
    jax.config.update("jax_enable_preemption_service", False)
    alarm = threading.Timer(seconds, _warn_of_absence, (num_processes, seconds))
    alarm.daemon = True
    alarm.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method=None if coordinator is None else "deactivate",
            initialization_timeout=math.ceil(seconds) + 1,  # after the alarm
        )
    except (RuntimeError, ValueError) as error:
        text = str(error)
        if "must be called before" in text:
            text = "jax is already in use; call fl.connect() first"
        elif "RPC server" in text:
            text = f"process 0 cannot listen at {coordinator}; choose a free port for all processes"
        elif coordinator is None and "should be defined" in text:
            text = (
                "no cluster was detected: this is not a TPU pod, and neither Slurm, Open MPI nor "
                "Kubernetes started it; give the coordinator, the number of processes and the id "
                "of this one"
            )
        raise FedLPError(f"cannot connect: {text}.") from error
    finally:
        alarm.cancel()


def count() -> int:
    """Number of processes; does not start jax's backend if there is only one."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
    """The number of this process, from 0."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def is_first() -> bool:
    """True for the process that writes files."""
    return index() == 0


def gather(text: str = "", error: FedLPError | None = None) -> list[str]:
    """The text of every process, in their order. Collective.

    Args:
      text: of this process; any length.
      error: why this process cannot continue; the others then raise it.

    Raises:
      SharedError: another process passed an error.
    """
    if count() == 1:
        return [text]
    word = json.dumps([None if error is None else str(error), text]).encode()
    with losses_explained():
        size = int(_rows(np.asarray([len(word)], np.int32)).max())
        padded = np.frombuffer(word.ljust(-(-size // _PAGE) * _PAGE), np.uint8)
        answers = [json.loads(bytes(row)) for row in _rows(padded)]
    for i, (refusal, _) in enumerate(answers):
        if refusal is not None and error is None:
            raise SharedError(f"process {i}: {refusal}")
    return [answer for _, answer in answers]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A step that all processes complete, or that all of them refuse. Collective.

    Raises:
      SharedError: this or another process raised a FedLPError.
    """
    try:
        yield
    except SharedError:
        raise
    except FedLPError as error:
        if count() == 1:
            raise
        gather(error=error)
        raise SharedError(str(error)) from error
    gather()


def agree(what: str, facts: Mapping[str, Any]) -> None:
    """Checks that all processes have the same facts. Collective.

    Args:
      what: names the facts in the error.
      facts: nested, of values that JSON holds.

    Raises:
      FedLPError: in all processes, with the first fields that differ.
    """
    if count() == 1:
        return
    first, *others = (_fields(text) for text in gather(json.dumps(facts, default=str)))
    for i, other in enumerate(others, 1):
        differing = [
            f"{field} is {other.get(field)}, not {first.get(field)}"
            for field in dict.fromkeys([*first, *other])
            if first.get(field) != other.get(field)
        ]
        if differing:
            raise FedLPError(
                f"process {i} of {count()} has another {what} than process 0: "
                f"{'; '.join(differing[:5])}{'; ...' if differing[5:] else ''}. Give all "
                "processes the same."
            )


def least(number: int | None) -> int | None:
    """The smallest number of all processes; None if one of them has none. Collective."""
    numbers = [json.loads(text) for text in gather(json.dumps(number))]
    return None if None in numbers else min(numbers)


def code() -> dict[str, str]:
    """Versions of the packages that determine the numbers, and a digest of this package's files."""
    digest = hashlib.sha256()
    for path in sorted(Path(fedlp_jax.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    versions = {name: metadata.version(name) for name in _PACKAGES}
    return versions | {"fedlp_jax": digest.hexdigest()[:12]}


def stop_together(stop: Callable[[], bool], mesh: Mesh) -> Callable[[], bool]:
    """A `stop` that becomes true before the same round in all processes. Call it before each round.

    Each call sends this process's answer and reads the answers of the call before, which have
    arrived by then: no process waits, and a run ends one round later than a single process would.

    Args:
      stop: of this process.
      mesh: the one that rounds run on. XLA keeps the order of what is dispatched to the same
        devices only, and processes that exchange messages in different orders wait forever.
    """
    if count() == 1:
        return stop
    sent: list[jax.Array] = []

    def stopped() -> bool:
        sent.append(_send(np.asarray([stop()], np.int32), mesh))
        return len(sent) > 1 and bool(jax.device_get(sent.pop(0)).any())

    return stopped


@contextlib.contextmanager
def losses_explained() -> Iterator[None]:
    """Says of an error in the exchange with another process that this is what it is.

    Raises:
      RuntimeError: another process ended or cannot be reached.
    """
    try:
        yield
    except (ValueError, jax.errors.JaxRuntimeError) as error:  # jax raises both
        exchange = ("Gloo", "NCCL", "RCCL", "oordination service", "ollective")
        if count() == 1 or not any(word in str(error) for word in exchange):
            raise
        raise RuntimeError(
            f"another of the {count()} processes ended or cannot be reached: {error}"
        ) from error


def devices(number: int | None = None) -> list[jax.Device]:
    """The first devices, equally many of each process, in the order of the processes.

    Args:
      number: of devices in all, a multiple of the number of processes; None = the most possible.
    """
    if count() == 1:
        return jax.devices()[:number]
    per_process = [[d for d in jax.devices() if d.process_index == i] for i in range(count())]
    each = min(map(len, per_process)) if number is None else number // count()
    return [device for local in per_process for device in local[:each]]


def put(tree: PyTree, sharding: Sharding) -> PyTree:
    """`jax.device_put` of a tree that is equal in all processes.

    `device_put` itself would compare the values over the network, each time.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def put_leaf(leaf: Any) -> jax.Array:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = put_leaf(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])

    return jax.tree.map(put_leaf, tree)


@functools.cache
def _gatherer(mesh: Mesh) -> Any:
    """The program that brings the rows of all devices to all devices."""
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, Spec()))


def _send(row: np.ndarray, mesh: Mesh) -> jax.Array:
    """`[n]` of each process -> `[D, n]`, the row of each device's process; does not wait."""
    sharding = NamedSharding(mesh, Spec(mesh.axis_names))
    rows = jax.make_array_from_callback((mesh.size, *row.shape), sharding, lambda _: row[None])
    gathered: jax.Array = _gatherer(mesh)(rows)
    return gathered


def _rows(row: np.ndarray) -> np.ndarray:
    """`[n]` of each process -> `[number of processes, n]`; waits for all of them."""
    everything = jax.devices()
    types = (AxisType.Auto,)
    mesh = jax.make_mesh((len(everything),), ("devices",), axis_types=types, devices=everything)
    of_process = [device.process_index for device in everything]
    first = [of_process.index(i) for i in range(count())]
    return np.asarray(jax.device_get(_send(row, mesh)))[first]


def _warn_of_absence(num_processes: int | None, seconds: float) -> None:
    """Says why jax, which cannot be stopped, is about to abort this process."""
    warnings.warn(
        f"after {seconds:g} s not all {num_processes or 'of the'} processes are connected, and jax "
        "ends this one. Start all of them, with one coordinator and the same number of processes.",
        RuntimeWarning,
        stacklevel=2,
    )


def _fields(text: str) -> dict[str, Any]:
    """JSON -> its leaves by dotted path."""
    leaves = jax.tree.leaves_with_path(json.loads(text), is_leaf=lambda x: x is None)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def _check_place(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise FedLPError(
                "num_processes and process_id need a coordinator, the HOST:PORT of process 0."
            )
        return
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise FedLPError(
            f"coordinator={coordinator!r} must be HOST:PORT, the address of process 0 and a free "
            "port there, as in 10.0.0.1:1234."
        )
    place = {"num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in place.items() if value is None]
    if num_processes is None or process_id is None:
        raise FedLPError(
            f"a coordinator needs {' and '.join(missing)} too: the number of processes, and which "
            "of them this is, counting from 0."
        )
    if num_processes < 1:
        raise FedLPError(f"num_processes={num_processes} must be at least 1.")
    if not 0 <= process_id < num_processes:
        raise FedLPError(
            f"process_id={process_id} is out of range for num_processes={num_processes}: processes "
            f"count from 0 to {num_processes - 1}."
        )
