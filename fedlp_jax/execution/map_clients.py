"""Where clients run: chunks of W, vmapped, over a mesh of D devices, one psum.

The only module that knows devices. Everything else is written for one client; a plan changes what a
round costs, never what it computes beyond the order of a sum.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from fedlp_jax.errors import FedLPError, check_choice, whole_number
from fedlp_jax.execution import processes as hosts
from fedlp_jax.execution.compilation import keep_programs
from fedlp_jax.execution.packing import entry, with_entry
from fedlp_jax.types import Array, PyTree

AXIS = "clients"
DEVICE, HOST = PLACES = ("device", "host")
# A loop of plain GEMMs beats vmapped clients on CPU (measured). An accelerator wants many at once,
# as it takes time to start each kernel of a step; how many has not been measured.
_WIDTH = {"cpu": 1}
_ACCELERATOR_WIDTH = 128
_DETERMINISTIC_FLAG = "--xla_gpu_deterministic_ops"
_COLLECTIVE_TIMEOUT_FLAG = "--xla_cpu_collective_call_terminate_timeout_seconds"


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a round is laid on the hardware. None = chosen: by `resolve`, and `data` by the memory.

    Two plans are equal if results under them are, bit for bit: where the data lies and how many
    rounds are dispatched at once are not compared.

    Attributes:
      devices: D, devices on the mesh, of all processes together.
      width: W, clients vmapped at once on a device; memory grows as W models.
      data: "device", the whole training split on every device; or "host", from where each device is
        sent the examples of its own clients, a round ahead. Chosen, it is the device if its memory
        suffices.
      rounds_at_once: the most rounds that one call of the compiled program runs, which is worth it
        where a round is as short as such a call, a millisecond or less. Evaluations, checkpoints,
        callbacks and half a second of rounds end a call sooner. 1 unless it is given, and where
        clients keep variables of their own, the data lies on the host, or several processes run.
    """

    devices: int | None = None
    width: int | None = None
    data: str | None = dataclasses.field(default=None, compare=False)
    rounds_at_once: int | None = dataclasses.field(default=None, compare=False)

    @property
    def mesh(self) -> Mesh:
        """The mesh of a resolved plan: its D devices on the axis `clients`."""
        devices = hosts.devices(self.devices)
        return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def resolve(plan: Plan | None, cohort: int) -> Plan:
    """Fills the open fields of a plan for a cohort of C clients on the devices of this machine.

    Raises:
      FedLPError: more devices than there are, a number below 1, or an unknown place of the data.
    """
    plan = plan or Plan()
    if plan.data is not None:
        check_choice("plan.data", plan.data, PLACES)
    for name in ("devices", "width", "rounds_at_once"):
        if (value := getattr(plan, name)) is not None:
            whole: Any = whole_number(f"plan.{name}", value, 1, ", or None")
            plan = dataclasses.replace(plan, **{name: whole})
    have = len(hosts.devices())
    if plan.devices is not None and plan.devices > have:
        hint = "; on CPU, call fl.setup(cpu_devices=...) first" if _on_cpu() else ""
        raise FedLPError(f"plan.devices={plan.devices} but jax sees {have}{hint}.")
    processes = hosts.count()
    if plan.devices is not None and plan.devices % processes:
        raise FedLPError(
            f"plan.devices={plan.devices} counts the devices of all processes, and {processes} "
            f"processes cannot share them equally; make it a multiple of {processes}, or leave it "
            "open."
        )
    devices = min(plan.devices or have, cohort) // processes * processes
    if not devices:
        raise FedLPError(
            f"a cohort of {cohort} has no client for each of {processes} processes; start fewer, "
            "or enlarge the cohort."
        )
    width = plan.width or _WIDTH.get(jax.default_backend(), _ACCELERATOR_WIDTH)
    width = min(width, -(-cohort // devices))
    at_once = plan.rounds_at_once or 1
    return dataclasses.replace(plan, devices=devices, width=width, rounds_at_once=at_once)


def setup(cpu_devices: int | None = None) -> None:
    """Makes jax ready: CPU devices, GPUs that repeat, programs kept. Call it before using jax.

    A device per core, each with one stream of clients, is faster on CPU than one device with all
    cores. On GPUs XLA by default tries several kernels for each product as it compiles, takes the
    one that was the quickest that time, and so computes other bits in another process. This turns
    that off, which also leaves less to compile; `XLA_FLAGS` with
    `--xla_gpu_deterministic_ops=false` leaves it on, for the quickest rounds. Compiled programs are
    kept on disk for the next start, see `keep_programs`. Importing fedlp_jax changes no setting of
    jax; this does.

    Args:
      cpu_devices: number of CPU devices; None = one per usable core.

    Raises:
      FedLPError: jax was used before, so its devices are fixed.
    """
    cpu_devices = cpu_devices or _usable_cores()
    before = flags = os.environ.get("XLA_FLAGS", "")
    if _COLLECTIVE_TIMEOUT_FLAG not in flags:
        # XLA aborts the process when one device waits over a minute for another at the end of a
        # round; uneven clients on a slow machine may well take longer.
        flags = f"{flags} {_COLLECTIVE_TIMEOUT_FLAG}=86400".strip()
    if _DETERMINISTIC_FLAG not in flags:
        flags = f"{flags} {_DETERMINISTIC_FLAG}=true"
    os.environ["XLA_FLAGS"] = flags.strip()
    try:
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    except RuntimeError as error:
        os.environ["XLA_FLAGS"] = before  # for processes that this one starts later
        raise FedLPError(
            f"cannot set {cpu_devices} CPU devices: jax is already in use. Call fl.setup() first."
        ) from error
    keep_programs()
    hosts.gather()  # opens the connections, which processes must do within half a minute


def replicated(plan: Plan) -> NamedSharding:
    """Sharding of what every device holds whole."""
    return NamedSharding(plan.mesh, Spec())


def over_clients(plan: Plan) -> NamedSharding:
    """Sharding of arrays whose first axis is slots, `[D * P, ...]` or `[D, ...]`."""
    return NamedSharding(plan.mesh, Spec(AXIS))


def over_clients_of_rounds(plan: Plan) -> NamedSharding:
    """Sharding of arrays of several rounds, whose second axis is slots, `[R, D * P, ...]`."""
    return NamedSharding(plan.mesh, Spec(None, AXIS))


def open_connections(plan: Plan) -> None:
    """Connects the devices of a plan, which processes must do within half a minute of each other.

    Once connected, a device waits for the others as long as they compile or compute.
    """
    one = hosts.put(np.zeros(plan.devices or 1, np.float32), over_clients(plan))
    total = on_each_device(lambda x: jax.lax.psum(x, AXIS), plan, (True,), False)
    jax.block_until_ready(jax.jit(total)(one))


def over_columns(rows: Array, plan: Plan) -> Array:
    """Deals the columns of `[D * P, n]` to the devices, in place of its rows; pads n to D's."""
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % (plan.devices or 1))))
    return jax.lax.with_sharding_constraint(rows, NamedSharding(plan.mesh, Spec(None, AXIS)))


class Level(NamedTuple):
    """The work of one submodel level, for one client. Only `run` is vmapped."""

    # (shared, client, own, active bool[], bounds) -> (summable, output, own): alike at all levels
    run: Callable[[PyTree, PyTree, PyTree, Array, PyTree], tuple[PyTree, PyTree, PyTree]]
    bounds: Callable[[PyTree], PyTree]  # clients of a chunk -> loop bounds they share
    embed: Callable[[PyTree, PyTree], PyTree]  # (shared, sum) -> sum in the common structure


def map_sum(
    levels: Sequence[Level],
    shared: PyTree,
    clients: PyTree,
    segment: Array,
    plan: Plan,
    dealt: PyTree = False,
    own: PyTree = (),
) -> tuple[PyTree, PyTree, PyTree]:
    """Runs every client at its level, in chunks of W, and sums over all of them.

    Memory is O(W x model) on each device: a sum is carried, never a stack of models. A level's loop
    has a traced trip count, so no composition of a cohort compiles anew, and no level computes
    another's layers.

    Args:
      levels: G levels.
      shared: what every client reads, replicated unless `dealt`.
      clients: tree of `[D * P, ...]`.
      segment: `i32[D, G + 1]`.
      plan: resolved.
      dealt: a prefix of the tree `shared`, True where the first axis of an array is dealt to the
        devices, `[D * R, ...]`, so that each reads its own R entries.
      own: tree of `[D * P, ...]`, of which each client changes its own entry; in place, if whoever
        compiles this donates it.

    Returns:
      `(sum over clients, outputs [D * P, ...], own)`; slots that did not run have zeros as output,
      and their own entries as they were.
    """
    width = plan.width or 1
    # Traced once, for the shapes of what it returns and for the loop; then no call remains.
    levels = [level._replace(run=jax.jit(level.run, inline=True)) for level in levels]

    def on_device(shared: PyTree, clients: PyTree, own: PyTree, segment: Array) -> Any:
        slots = jax.tree.leaves(clients)[0].shape[0]
        total, outputs = None, None
        for g, level in enumerate(levels):
            one = jax.tree.map(lambda x: jax.typeof(x[0]), (clients, own))
            shapes = jax.eval_shape(partial(_alone, level), shared, *one)
            outputs = _zeros(shapes[1], slots) if outputs is None else outputs
            carry = (_zeros(shapes[0]), outputs, own)
            part, outputs, own = _chunks(
                level, shared, clients, segment[0, g], segment[0, g + 1], width, carry
            )
            part = level.embed(shared, part)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
        return _sum_over_devices(total), outputs, own

    mapped = on_each_device(on_device, plan, (dealt, True, True, True), (False, True, True))
    return mapped(shared, clients, own, segment)


def on_each_device(
    f: Callable[..., Any], plan: Plan, dealt: PyTree, returns_dealt: PyTree
) -> Callable[..., Any]:
    """`f`, run by every device of a plan on its own part.

    Args:
      f: the arguments and results of one device.
      plan: resolved.
      dealt: a prefix of the tuple of arguments, True where the first axis of an array is dealt to
        the devices, and False where all have it whole.
      returns_dealt: the same for the results.
    """
    specs = jax.tree.map(lambda own: Spec(AXIS) if own else Spec(), (dealt, returns_dealt))
    # Loop carries start as constants, equal on all devices, and become different ones: the check of
    # varying axes would ask for a cast of each.
    return jax.shard_map(f, mesh=plan.mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)


def of_all_devices(tree: PyTree) -> PyTree:
    """Within `on_each_device`: what all devices have, one after the other along the first axis."""
    return jax.lax.all_gather(tree, AXIS, tiled=True)


def _sum_over_devices(tree: PyTree) -> PyTree:
    """One psum for all leaves of a dtype: one message over the network, whatever the model."""
    leaves, treedef = jax.tree.flatten(tree)
    totals = list(leaves)
    for dtype in dict.fromkeys(x.dtype for x in leaves):
        of_dtype = [i for i, x in enumerate(leaves) if x.dtype == dtype]
        flat = jax.lax.psum(jnp.concatenate([leaves[i].ravel() for i in of_dtype]), AXIS)
        ends = np.cumsum([leaves[i].size for i in of_dtype])
        for i, part in zip(of_dtype, jnp.split(flat, ends[:-1]), strict=True):
            totals[i] = part.reshape(leaves[i].shape)
    return jax.tree.unflatten(treedef, totals)


def _alone(level: Level, shared: PyTree, client: PyTree, own: PyTree) -> Any:
    """One client with the loop bounds of its own."""
    return level.run(shared, client, own, jnp.ones((), bool), level.bounds(client))


def _chunks(
    level: Level, shared: PyTree, clients: PyTree, start: Array, stop: Array, width: int, carry: Any
) -> Any:
    """Runs slots `start` to `stop`, W at a time; the last chunk may have idle lanes."""
    slots = jax.tree.leaves(clients)[0].shape[0]
    if width == 1:

        def body(slot: Array, carry: Any) -> Any:
            total, outputs, own = carry
            part, *new = _alone(level, shared, entry(clients, slot), entry(own, slot))
            outputs, own = with_entry((outputs, own), slot, tuple(new))
            return jax.tree.map(jnp.add, total, part), outputs, own

        return jax.lax.fori_loop(start, stop, body, carry)

    def chunk(i: Array, carry: Any) -> Any:
        total, outputs, own = carry
        lanes = start + i * width + jnp.arange(width, dtype=jnp.int32)
        active = lanes < stop
        # Idle lanes repeat the last client, so that the chunk's loop bounds stay those of its own.
        chosen, mine = jax.tree.map(lambda x: x[jnp.minimum(lanes, stop - 1)], (clients, own))
        run = jax.vmap(level.run, (None, 0, 0, 0, None))
        part, *new = run(shared, chosen, mine, active, level.bounds(chosen))
        # Idle lanes write nowhere, each past the end in a place of its own: of places that may
        # repeat, a GPU asked to repeat to the bit would write one after the other.
        lanes = jnp.where(active, lanes, slots + jnp.arange(width, dtype=jnp.int32))
        outputs, own = jax.tree.map(
            lambda s, x: s.at[lanes].set(x, mode="drop", unique_indices=True),
            (outputs, own),
            tuple(new),
        )
        part = jax.tree.map(lambda x: x.sum(axis=0), part)
        return jax.tree.map(jnp.add, total, part), outputs, own

    return jax.lax.fori_loop(0, -(-(stop - start) // width), chunk, carry)


def _zeros(shapes: PyTree, slots: int | None = None) -> PyTree:
    lead = () if slots is None else (slots,)
    return jax.tree.map(lambda x: jnp.zeros(lead + x.shape, x.dtype), shapes)


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux; other systems do not say
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"
