"""Where clients run: chunks of W, vmapped, over a mesh of D devices, one psum.

The only module that knows devices. Everything else is written for one client; a plan changes what a
round costs, never what it computes beyond the order of a sum.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from fedlp_jax import hosts
from fedlp_jax.types import Array, FedLPError, PyTree

AXIS = "clients"
# A loop of plain GEMMs beats vmapped clients on CPU (measured); an accelerator wants many at once.
_WIDTH = {"cpu": 1}
_ACCELERATOR_WIDTH = 64
_COLLECTIVE_TIMEOUT_FLAG = "--xla_cpu_collective_call_terminate_timeout_seconds"


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a round is laid on the hardware. None = chosen by `resolve`.

    Attributes:
      devices: D, devices on the mesh, of all processes together.
      width: W, clients vmapped at once on a device; memory grows as W models.
    """

    devices: int | None = None
    width: int | None = None

    @property
    def mesh(self) -> Mesh:
        """The mesh of a resolved plan: its D devices on the axis `clients`."""
        devices = hosts.devices(self.devices)
        return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def resolve(plan: Plan | None, cohort: int) -> Plan:
    """Fills the open fields of a plan for a cohort of C clients on the devices of this machine.

    Raises:
      FedLPError: more devices than there are, or a number below 1.
    """
    plan = plan or Plan()
    for name, value in dataclasses.asdict(plan).items():
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise FedLPError(
                f"plan.{name}={value!r} must be a whole number of at least 1, or None."
            )
    have = len(hosts.devices())
    if plan.devices is not None and plan.devices > have:
        hint = "; on CPU, call fl.setup(cpu_devices=...) first" if _on_cpu() else ""
        raise FedLPError(f"plan.devices={plan.devices} but jax sees {have}{hint}.")
    hosts.share(plan.devices)
    devices = hosts.evenly(min(plan.devices or have, cohort))
    width = plan.width or _WIDTH.get(jax.default_backend(), _ACCELERATOR_WIDTH)
    return Plan(devices, min(width, -(-cohort // devices)))


def setup(cpu_devices: int | None = None) -> None:
    """Gives this process several CPU devices. Call it before the first jax operation.

    A device per core, each with one stream of clients, is faster on CPU than one device with all
    cores. Importing fedlp_jax changes no setting of jax; this does.

    Args:
      cpu_devices: number of CPU devices; None = one per usable core.

    Raises:
      FedLPError: jax was used before, so its devices are fixed.
    """
    cpu_devices = cpu_devices or _usable_cores()
    flags = os.environ.get("XLA_FLAGS", "")
    if _COLLECTIVE_TIMEOUT_FLAG not in flags:
        # XLA aborts the process when one device waits over a minute for another at the end of a
        # round; uneven clients on a slow machine may well take longer.
        os.environ["XLA_FLAGS"] = f"{flags} {_COLLECTIVE_TIMEOUT_FLAG}=86400".strip()
    try:
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    except RuntimeError as error:
        raise FedLPError(
            f"cannot set {cpu_devices} CPU devices: jax is already in use. Call fl.setup() first."
        ) from error


def replicated(plan: Plan) -> NamedSharding:
    """Sharding of what every device holds whole."""
    return NamedSharding(plan.mesh, Spec())


def over_clients(plan: Plan) -> NamedSharding:
    """Sharding of arrays whose first axis is slots, `[D * P, ...]` or `[D, ...]`."""
    return NamedSharding(plan.mesh, Spec(AXIS))


def over_columns(rows: Array, plan: Plan) -> Array:
    """Deals the columns of `[D * P, n]` to the devices, in place of its rows; pads n to D's."""
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % (plan.devices or 1))))
    return jax.lax.with_sharding_constraint(rows, NamedSharding(plan.mesh, Spec(None, AXIS)))


# --- host: which client in which slot ---------------------------------------------------------


class Layout(NamedTuple):
    """Slots of a round, on the host."""

    member: np.ndarray  # i32[D * P], position in the cohort; -1 = empty slot
    segment: np.ndarray  # i32[D, G + 1], bounds of each level within a device's slots
    padded_share: float  # steps computed for nobody / all steps computed
    imbalance: float  # steps of the busiest device / mean over devices, by modelled work


def slots_per_device(cohort: int, devices: int) -> int:
    """P: room for twice the even share, so that heavy clients can have a device of their own."""
    return min(cohort, 2 * -(-cohort // devices)) if devices > 1 else cohort


def lay_out(steps: np.ndarray, level: np.ndarray, cost: Sequence[float], plan: Plan) -> Layout:
    """Gives clients to devices by modelled work, longest first, each to the least busy one.

    Args:
      steps: `i64[C]`, local steps of each client of the cohort, which is sorted by id.
      level: `i32[C]`, submodel level.
      cost: G numbers, modelled cost of one step of each level.
      plan: resolved.

    Returns:
      The layout. Within a device clients stand by level, then longest first, then by id, so that
      the clients of a chunk are alike.
    """
    devices, width = plan.devices or 1, plan.width or 1
    capacity = slots_per_device(len(steps), devices)
    work = steps * np.asarray(cost, np.float64)[level]
    load, count = np.zeros(devices), np.zeros(devices, np.int64)
    device = np.empty(len(steps), np.int64)
    for i in np.argsort(-work, kind="stable"):
        d = int(np.argmin(np.where(count < capacity, load, np.inf)))
        device[i], load[d], count[d] = d, load[d] + work[i], count[d] + 1

    levels = len(cost)
    member = np.full((devices, capacity), -1, np.int32)
    segment = np.zeros((devices, levels + 1), np.int32)
    computed = 0
    for d in range(devices):
        mine = np.flatnonzero(device == d)
        mine = mine[np.lexsort((mine, -steps[mine], level[mine]))]
        member[d, : len(mine)] = mine
        segment[d, 1:] = np.cumsum(np.bincount(level[mine], minlength=levels))
        for a, b in zip(segment[d, :-1], segment[d, 1:], strict=True):
            # Longest first: the first client of a chunk sets its trip count.
            computed += width * int(steps[mine[a:b]][::width].sum())
    padded = 1.0 - steps.sum() / computed if computed else 0.0
    return Layout(member.ravel(), segment, float(padded), float(load.max() * devices / load.sum()))


# --- device: the map and the sum ----------------------------------------------------------------


class Level(NamedTuple):
    """The work of one submodel level, for one client. Only `run` is vmapped."""

    # (shared, client, active bool[], bounds) -> (summable, common output, own output)
    run: Callable[[PyTree, PyTree, Array, PyTree], tuple[PyTree, PyTree, PyTree]]
    bounds: Callable[[PyTree], PyTree]  # clients of a chunk -> loop bounds they share
    embed: Callable[[PyTree, PyTree], PyTree]  # (shared, sum) -> sum in the common structure


def map_sum(
    levels: Sequence[Level], shared: PyTree, clients: PyTree, segment: Array, plan: Plan
) -> tuple[PyTree, PyTree, tuple[PyTree, ...]]:
    """Runs every client at its level, in chunks of W, and sums over all of them.

    Memory is O(W x model) on each device: a sum is carried, never a stack of models. A level's loop
    has a traced trip count, so no composition of a cohort compiles anew, and no level computes
    another's layers.

    Args:
      levels: G levels.
      shared: what every client reads, replicated.
      clients: tree of `[D * P, ...]`.
      segment: `i32[D, G + 1]`.
      plan: resolved.

    Returns:
      `(sum over clients, common outputs [D * P, ...], own outputs of each level [D * P, ...])`;
      slots that did not run hold zeros.
    """
    width = plan.width or 1

    def on_device(shared: PyTree, clients: PyTree, segment: Array) -> Any:
        slots = jax.tree.leaves(clients)[0].shape[0]
        total, common, own = None, None, []
        for g, level in enumerate(levels):
            one = jax.tree.map(lambda x: jax.typeof(x[0]), clients)
            shapes = jax.eval_shape(_alone(level), shared, one, jnp.ones((), bool))
            common = _zeros(shapes[1], slots) if common is None else common
            carry = (_zeros(shapes[0]), common, _zeros(shapes[2], slots))
            part, common, mine = _chunks(
                level, shared, clients, segment[0, g], segment[0, g + 1], width, carry
            )
            part = level.embed(shared, part)
            total = part if total is None else jax.tree.map(jnp.add, total, part)
            own.append(mine)
        return _sum_over_devices(total), common, tuple(own)

    # Loop carries start as constants, equal on all devices, and become different ones: the check of
    # varying axes would ask for a cast of each.
    return jax.shard_map(
        on_device,
        mesh=plan.mesh,
        in_specs=(Spec(), Spec(AXIS), Spec(AXIS)),
        out_specs=(Spec(), Spec(AXIS), Spec(AXIS)),
        check_vma=False,
    )(shared, clients, segment)


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


def _alone(level: Level) -> Callable[[PyTree, PyTree, Array], Any]:
    """One client with the loop bounds of its own."""
    return lambda shared, client, active: level.run(shared, client, active, level.bounds(client))


def _chunks(
    level: Level, shared: PyTree, clients: PyTree, start: Array, stop: Array, width: int, carry: Any
) -> Any:
    """Runs slots `start` to `stop`, W at a time; the last chunk may have idle lanes."""
    slots = jax.tree.leaves(clients)[0].shape[0]
    if width == 1:

        def body(slot: Array, carry: Any) -> Any:
            total, *stacks = carry
            client = jax.tree.map(
                lambda x: jax.lax.dynamic_index_in_dim(x, slot, keepdims=False), clients
            )
            part, *outputs = _alone(level)(shared, client, jnp.ones((), bool))
            stacks = jax.tree.map(
                lambda s, x: jax.lax.dynamic_update_index_in_dim(s, x, slot, 0), stacks, outputs
            )
            return jax.tree.map(jnp.add, total, part), *stacks

        return jax.lax.fori_loop(start, stop, body, carry)

    def chunk(i: Array, carry: Any) -> Any:
        total, *stacks = carry
        lanes = start + i * width + jnp.arange(width, dtype=jnp.int32)
        active = lanes < stop
        # Idle lanes repeat the last client, so that the chunk's loop bounds stay those of its own.
        chosen = jax.tree.map(lambda x: x[jnp.minimum(lanes, stop - 1)], clients)
        bounds = level.bounds(chosen)
        part, *outputs = jax.vmap(level.run, (None, 0, 0, None))(shared, chosen, active, bounds)
        lanes = jnp.where(active, lanes, slots)  # idle lanes write nowhere
        stacks = jax.tree.map(lambda s, x: s.at[lanes].set(x, mode="drop"), stacks, outputs)
        part = jax.tree.map(lambda x: x.sum(axis=0), part)
        return jax.tree.map(jnp.add, total, part), *stacks

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
