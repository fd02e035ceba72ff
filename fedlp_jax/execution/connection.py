"""connect: makes this process one of several; part: ends that.

A process that dies takes the others with it: at once where its connections break, after
`HEARTBEAT_SECONDS` where nothing is heard of its machine at all. What they computed until their
last checkpoint is there, and any number of processes can go on from it.
"""

from __future__ import annotations

import hashlib
import os
import sys
from importlib import metadata
from pathlib import Path

import jax
from jax._src import distributed, xla_bridge  # what follows has no public name

import fedlp_jax
from fedlp_jax.errors import FedLPError
from fedlp_jax.execution import processes as hosts
from fedlp_jax.execution.meeting import check_place, meet, parse_address

CONNECT_SECONDS = 120.0
HEARTBEAT_SECONDS = 100  # after which a process that says nothing counts as dead
_PARTING_SECONDS = 3.0  # after a failure, in which others may need as long to see it
_LONG_PARTING_SECONDS = 3600.0  # the first may still be writing
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def connect(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    seconds: float = CONNECT_SECONDS,
) -> None:
    """Makes this process one of several that run together. Call it before jax is used.

    Each of them then calls the same functions with the same arguments: on CPU `fl.setup`, then
    `fl.simulate` or `fl.run`. A plan's devices are those of all processes together. Where several
    share the GPUs of a host, `CUDA_VISIBLE_DEVICES` deals these out.

    Args:
      coordinator: `HOST:PORT` of process 0, which listens there; None = found as jax does, on TPU
        pods, Slurm, Open MPI and Kubernetes.
      num_processes: how many there are.
      process_id: which this is, from 0.
      seconds: how long to wait for the others; without a coordinator given, it is jax that waits,
        and that ends the process when they do not come.

    Raises:
      FedLPError: an argument is missing or out of range, not all processes came in time, they run
        different code, jax was used before, or no cluster is found.
    """
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise FedLPError(
                "num_processes and process_id need a coordinator, the HOST:PORT of process 0."
            )
    else:
        address = parse_address(coordinator)
        num_processes, process_id = check_place(num_processes, process_id)
        _refuse_late()
        meet(address, num_processes, process_id, seconds)
    _refuse_late()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # jax would take SIGTERM for itself; here it ends a run as Ctrl-C does, see `interruption`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method=None if coordinator is None else "deactivate",
            initialization_timeout=max(int(seconds), 1),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=2 * HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        distributed.global_state.client = distributed.global_state.service = None
        if coordinator is None and num_processes is None and "should be defined" in str(error):
            raise FedLPError(
                "no cluster is found: this is no TPU pod, and not started by Slurm, Open MPI or "
                "Kubernetes. Name the coordinator, the number of processes and the id of this one."
            ) from error
        raise FedLPError(f"the processes could not be connected: {error}") from error
    hosts.agree("code", _code())


def part(code: int) -> None:
    """Leaves the others; call it last, with the exit code.

    After a failure the others may be anywhere, even waiting for this one: then the process ends
    here after some seconds, and they see it go.
    """
    client = distributed.global_state.client
    if client is None:
        return
    seconds = _LONG_PARTING_SECONDS
    if code not in (0, 130):
        # The first ends last, since the others end with it.
        seconds = _PARTING_SECONDS * (1 if hosts.index() else 2)
    try:
        client.wait_at_barrier("fedlp_jax/part", int(1000 * seconds))
    except jax.errors.JaxRuntimeError:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 1)
    jax.distributed.shutdown()


def _refuse_late() -> None:
    if jax.distributed.is_initialized():
        raise FedLPError("this process is connected already; connect once, at the start.")
    if xla_bridge.backends_are_initialized():
        raise FedLPError("cannot connect: jax is already in use. Call fl.connect() first.")


def _code() -> dict[str, str]:
    """What has to be the same everywhere for the numbers to be: versions, and the package."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    own = {"fedlp_jax": fedlp_jax.__version__, "fedlp_jax's files": digest.hexdigest()[:12]}
    return own | {name: metadata.version(name) for name in _PACKAGES}
