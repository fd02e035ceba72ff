"""map_sum: many clients on many devices, in chunks of W, vmapped, over a mesh, with one psum.

The only module that knows of vmap, chunks, shard_map and psum. Everything else is written for one
client.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from fedlp_jax.execution import processes
from fedlp_jax.execution.loops import side_by_side
from fedlp_jax.execution.plan import AXIS, SIDE_BY_SIDE, Plan, over_clients
from fedlp_jax.types import Array, PyTree


def open_connections(plan: Plan) -> None:
    """Connects the devices of a plan, which processes must do within half a minute of each other.

    Once connected, a device waits for the others as long as they compile or compute.
    """
    one = processes.put(np.zeros(plan.devices or 1, np.float32), over_clients(plan))
    total = on_each_device(lambda x: jax.lax.psum(x, AXIS), plan, (True,), False)
    jax.block_until_ready(jax.jit(total)(one))


def over_columns(rows: Array, plan: Plan) -> Array:
    """Divides the columns of `[D * P, n]` among the devices, not its rows; pads n for D."""
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % (plan.devices or 1))))
    return jax.lax.with_sharding_constraint(rows, NamedSharding(plan.mesh, Spec(None, AXIS)))


class Level(NamedTuple):
    """The work of one submodel level, for one client. Only `run` is vmapped."""

    # (shared, client, client_state, active bool[], bounds) -> (summable, output, client_state), all
    # of the same shapes at every level
    run: Callable[[PyTree, PyTree, PyTree, Array, PyTree], tuple[PyTree, PyTree, PyTree]]
    bounds: Callable[[PyTree], PyTree]  # clients of a chunk -> loop bounds they share
    embed: Callable[[PyTree, PyTree], PyTree]  # (shared, sum) -> sum in the common structure
    # Where bounds must be constants: `run` for each bucket of clients, without its bounds; beside
    # other levels it also gets, as `run`, what runs its `Loops`, ...
    buckets: Sequence[Callable[..., tuple[PyTree, PyTree, PyTree]]] = ()
    # ... and clients of a chunk -> its bucket, i32[]
    bucket: Callable[[PyTree], Array] = lambda clients: jnp.zeros((), jnp.int32)


def map_sum(
    levels: Sequence[Level],
    shared: PyTree,
    clients: PyTree,
    segment: Array,
    plan: Plan,
    sharded: PyTree = False,
    client_state: PyTree = (),
    widths: Sequence[int] = (),
) -> tuple[PyTree, PyTree, PyTree]:
    """Runs every client at its level, in chunks of W, and sums over all of them.

    Memory is O(W x model) on each device: a sum is carried, never a stack of models. How many
    clients a level has is data, so no composition of a cohort compiles again, and no level computes
    another one's layers. Where the plan wants known trip counts, a level has as many chunks as its
    cohort could need, and skips the empty ones.

    Args:
      levels: G levels.
      shared: what every client reads; replicated where it is not `sharded`.
      clients: tree of `[D * P, ...]`.
      segment: `i32[D, G + 1]`, bounds of each level within a device's slots.
      plan: resolved.
      sharded: a prefix of the tree `shared`, True where the first axis of an array is divided among
        the devices, `[D * R, ...]`, so that each reads its own R entries.
      client_state: tree of `[D * P, ...]`; each client changes its own entry, in place if the
        compiled program donates the tree.
      widths: how many clients of each level run at once; levels that idle may follow. () = W of
        every level.

    Returns:
      `(sum over clients, outputs [D * P, ...], client_state)`. A slot that did not run has zeros as
      its output and keeps its state.
    """
    widths = widths[: len(levels)] or [plan.width or 1] * len(levels)
    if plan.levels == SIDE_BY_SIDE and len(levels) > 1:
        run_levels = partial(_side_by_side, levels, widths)
    else:
        run_levels = partial(_in_turn, levels, plan, widths)

    def on_device(shared: PyTree, clients: PyTree, state: PyTree, segment: Array) -> Any:
        total, outputs, state = run_levels(shared, clients, state, segment[0])
        return _sum_over_devices(total), outputs, state

    mapped = on_each_device(on_device, plan, (sharded, True, True, True), (False, True, True))
    return mapped(shared, clients, client_state, segment)


def on_each_device(
    f: Callable[..., Any], plan: Plan, sharded: PyTree, returns_sharded: PyTree
) -> Callable[..., Any]:
    """`f`, run by every device of a plan on its own part.

    Args:
      f: takes and returns the arrays of one device.
      plan: resolved.
      sharded: a prefix of the tuple of arguments, True where the first axis of an array is divided
        among the devices, False where every device has the whole array.
      returns_sharded: the same for the results.
    """
    specs = jax.tree.map(lambda split: Spec(AXIS) if split else Spec(), (sharded, returns_sharded))
    # Loop carries start as constants, equal on all devices, and then differ: the check of varying
    # axes would ask for a cast of each.
    return jax.shard_map(f, mesh=plan.mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False)


def of_all_devices(tree: PyTree) -> PyTree:
    """Within `on_each_device`: the arrays of all devices, concatenated along the first axis."""
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


def summed_bytes(program: Any) -> int:
    """Bytes that a traced program sums over devices; those of a loop count once.

    Args:
      program: a jaxpr.
    """
    count = 0
    for equation in program.eqns:
        if equation.primitive.name.startswith("psum"):
            count += sum(x.aval.size * x.aval.dtype.itemsize for x in equation.invars)
        count += sum(map(summed_bytes, jaxprs_in_params(equation.params)))
    return count


def _in_turn(
    levels: Sequence[Level],
    plan: Plan,
    widths: Sequence[int],
    shared: PyTree,
    clients: PyTree,
    state: PyTree,
    segment: Array,
) -> Any:
    """Runs the slots of one device, level after level, some at a time."""
    slots = jax.tree.leaves(clients)[0].shape[0]
    # Traced once, for the shapes of its results and for the loop; then no call remains.
    levels = [
        level._replace(
            run=jax.jit(level.run, inline=True),
            buckets=[jax.jit(run, inline=True) for run in level.buckets],
        )
        for level in levels
    ]
    chunks = partial(_known_chunks, only=len(levels) == 1) if plan.known_trip_counts else _chunks
    total, outputs = None, None
    for g, (level, width) in enumerate(zip(levels, widths, strict=True)):
        shapes = _shapes(level, shared, clients, state)
        outputs = _zeros(shapes[1], slots) if outputs is None else outputs
        carry = (_zeros(shapes[0]), outputs, state)
        part, outputs, state = chunks(
            level, shared, clients, segment[g], segment[g + 1], width, carry
        )
        part = level.embed(shared, part)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    return total, outputs, state


def _side_by_side(
    levels: Sequence[Level],
    widths: Sequence[int],
    shared: PyTree,
    clients: PyTree,
    state: PyTree,
    segment: Array,
) -> Any:
    """Runs the slots of one device, some of every level at a time, with known trip counts."""
    slots = jax.tree.leaves(clients)[0].shape[0]
    shapes = [_shapes(level, shared, clients, state) for level in levels]
    stops = [segment[g + 1] for g in range(len(levels))]

    def chunk(i: Array, carry: Any) -> Any:
        firsts = [segment[g] + i * width for g, width in enumerate(widths)]
        places = list(zip(firsts, stops, widths, strict=True))

        def branch(bucket: int) -> Callable[[Any], Any]:
            runs = [level.buckets[bucket] for level in levels]

            def run(carry: Any) -> Any:
                totals, outputs, states = carry
                lanes = [_taken(clients, states, *place) for place in places]
                results = side_by_side(runs, shared, lanes)
                ends = []
                for total, place, result in zip(totals, places, results, strict=True):
                    end, outputs, states = _added((total, outputs, states), result, slots, *place)
                    ends.append(end)
                return ends, outputs, states

            return run

        due = jnp.stack([first < stop for first, stop, _ in places])
        buckets = [
            level.bucket(_lanes(clients, *place))
            for level, place in zip(levels, places, strict=True)
        ]
        index = jnp.where(due, 1 + jnp.stack(buckets), 0).max()  # of the longest; 0 = all are idle
        branches = [branch(bucket) for bucket in range(len(levels[0].buckets))]
        return jax.lax.switch(index, [lambda carry: carry, *branches], carry)

    carry = [_zeros(of_level[0]) for of_level in shapes], _zeros(shapes[0][1], slots), state
    # As many chunks as there are if all clients are of the level that runs the fewest at once.
    totals, outputs, state = jax.lax.fori_loop(0, -(-slots // min(widths)), chunk, carry)
    parts = [level.embed(shared, total) for level, total in zip(levels, totals, strict=True)]
    return reduce(partial(jax.tree.map, jnp.add), parts), outputs, state


def _shapes(level: Level, shared: PyTree, clients: PyTree, state: PyTree) -> Any:
    """Of what one client of a level returns."""
    one = jax.tree.map(lambda x: jax.typeof(x[0]), (clients, state))
    return jax.eval_shape(partial(_run_one, level), shared, *one)


def _run_one(level: Level, shared: PyTree, client: PyTree, state: PyTree) -> Any:
    """Runs one client with its own loop bounds."""
    return level.run(shared, client, state, jnp.ones((), bool), level.bounds(client))


def _chunks(
    level: Level, shared: PyTree, clients: PyTree, start: Array, stop: Array, width: int, carry: Any
) -> Any:
    """Runs slots `start` to `stop`, W at a time; the last chunk may have idle lanes."""
    if width == 1:

        def body(slot: Array, carry: Any) -> Any:
            total, outputs, states = carry
            part, *new = _run_one(level, shared, entry(clients, slot), entry(states, slot))
            outputs, states = with_entry((outputs, states), slot, tuple(new))
            return jax.tree.map(jnp.add, total, part), outputs, states

        return jax.lax.fori_loop(start, stop, body, carry)

    def chunk(i: Array, carry: Any) -> Any:
        first = start + i * width
        bounds = level.bounds(_lanes(clients, first, stop, width))
        run = _with_bounds(level, bounds)
        return _run_chunk(run, shared, clients, first, stop, width, carry)

    return jax.lax.fori_loop(0, -(-(stop - start) // width), chunk, carry)


def _known_chunks(
    level: Level,
    shared: PyTree,
    clients: PyTree,
    start: Array,
    stop: Array,
    width: int,
    carry: Any,
    only: bool,
) -> Any:
    """As `_chunks`, with known trip counts; `only` = the cohort has no other level."""
    slots = jax.tree.leaves(clients)[0].shape[0]
    chunks = -(-slots // width)
    runs = level.buckets or [_with_bounds(level, ())]  # work without loops has no bounds

    def chunk(i: Array | int, carry: Any) -> Any:
        first = start + i * width

        def branch(run: Callable[..., Any]) -> Callable[[Any], Any]:
            return lambda carry: _run_chunk(run, shared, clients, first, stop, width, carry)

        if only and chunks == 1 and len(runs) == 1:
            return branch(runs[0])(carry)
        bucket = level.bucket(_lanes(clients, first, stop, width))
        index = jnp.where(first < stop, 1 + bucket, 0)
        return jax.lax.switch(index, [lambda carry: carry, *map(branch, runs)], carry)

    return jax.lax.fori_loop(0, chunks, chunk, carry)


def _with_bounds(level: Level, bounds: PyTree) -> Callable[..., Any]:
    return lambda shared, client, state, active: level.run(shared, client, state, active, bounds)


def _lanes(stack: PyTree, first: Array, stop: Array, width: int) -> PyTree:
    """Entries `first` to `first + W`; those past `stop` repeat the last one before it.

    So the clients that run set the loop bounds.
    """
    lanes = first + jnp.arange(width, dtype=jnp.int32)
    return jax.tree.map(lambda x: x[jnp.minimum(lanes, stop - 1)], stack)


def _run_chunk(
    run: Callable[..., Any],
    shared: PyTree,
    clients: PyTree,
    first: Array,
    stop: Array,
    width: int,
    carry: Any,
) -> Any:
    """Runs W slots from `first` on; those past `stop` are idle."""
    slots = jax.tree.leaves(clients)[0].shape[0]
    lanes = _taken(clients, carry[2], first, stop, width)
    result = jax.vmap(run, (None, 0, 0, 0))(shared, *lanes)
    return _added(carry, result, slots, first, stop, width)


def _taken(
    clients: PyTree, states: PyTree, first: Array, stop: Array, width: int
) -> tuple[PyTree, PyTree, Array]:
    """The clients of W slots from `first` on, what they keep, and which of them are active."""
    client, state = _lanes((clients, states), first, stop, width)
    return client, state, first + jnp.arange(width, dtype=jnp.int32) < stop


def _added(
    carry: Any, result: Any, slots: int, first: Array, stop: Array, width: int
) -> tuple[PyTree, PyTree, PyTree]:
    """The carry with the results of the clients that `_taken` takes."""
    total, outputs, states = carry
    part, *new = result
    lanes = first + jnp.arange(width, dtype=jnp.int32)
    # Idle lanes write past the end, each to its own place: if places could repeat, a GPU that must
    # repeat to the bit would write one after the other.
    idle = slots + jnp.arange(width, dtype=jnp.int32)
    lanes = jnp.where(lanes < stop, lanes, idle)
    outputs, states = jax.tree.map(
        lambda s, x: s.at[lanes].set(x, mode="drop", unique_indices=True),
        (outputs, states),
        tuple(new),
    )
    part = jax.tree.map(lambda x: x.sum(axis=0), part)
    return jax.tree.map(jnp.add, total, part), outputs, states


def entry(stack: PyTree, index: Array | int) -> PyTree:
    """The tree at `index` (`i32[]`) of a stack of trees, `[N, ...]`."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stack)


def with_entry(stack: PyTree, index: Array, tree: PyTree) -> PyTree:
    """A stack `[N, ...]` with `tree` at `index` (`i32[]`); in place where the stack is a carry."""
    return jax.tree.map(
        lambda s, x: jax.lax.dynamic_update_index_in_dim(s, x, index, 0), stack, tree
    )


def _zeros(shapes: PyTree, slots: int | None = None) -> PyTree:
    lead = () if slots is None else (slots,)
    return jax.tree.map(lambda x: jnp.zeros(lead + x.shape, x.dtype), shapes)
