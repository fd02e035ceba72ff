"""Lanes: several runs of one structure as one program, whose lanes are (run, client) pairs.

The round is vmapped over runs. What every run has alone stays with its `Run`: the ledger, the
histories, the next cohorts. Draws are functions of (seed, round, client), so masks, cohorts and
counts are those of the run alone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax.errors import FedLPError, collecting
from fedlp_jax.execution import processes
from fedlp_jax.execution.compilation import Same, executable
from fedlp_jax.execution.packing import Packed, size_bytes
from fedlp_jax.execution.plan import (
    RUNS,
    LanesPlan,
    free_bytes,
    needed_bytes,
    over_clients,
    replicated,
    size,
)
from fedlp_jax.nn import conv
from fedlp_jax.simulation.evaluation import evaluator
from fedlp_jax.simulation.program import traceable_rounds
from fedlp_jax.simulation.run import Pending, RoundRecord, Run, records_of
from fedlp_jax.simulation.structure import lasting
from fedlp_jax.types import Array, Cohort, RoundMetrics

_SLOTS = 1  # the axis of runs in arrays of slots, `[P, R, ...]`
_PROGRAMS = 16  # lowered ones kept in the process

_nothing = jax.jit(lambda: ())  # its trace tells one state of jax's settings from another


class LanesProgram(NamedTuple):
    """The compiled round and evaluation of R runs side by side.

    Attributes:
      plan: of each run, and the groups of devices that the runs are dealt out to.
      runs: R, a multiple of the groups.
      round: `traceable_rounds` with a run axis: the second of arrays of slots, the first of others.
      test: `(variables [R, ...], examples) -> {suffix: sums [R]}`.
      lowerings: the form of each convolution, by its shapes.
      seconds: of tracing, lowering and compiling.
      warnings: given while it was traced.
    """

    plan: LanesPlan
    runs: int
    round: Any
    test: Any
    lowerings: dict[str, str]
    seconds: float
    warnings: tuple[str, ...]


class _Lowered(NamedTuple):
    """A `LanesProgram` before XLA compiles it."""

    run: Run  # any of its runs
    program: LanesProgram  # of what is lowered
    held_bytes: int  # of the runs' state, on each device


def compile_lanes(groups: Sequence[tuple[Run, int, LanesPlan]]) -> list[LanesProgram]:
    """Compiles a program for each group of runs, in parallel.

    Args:
      groups: for each any of its runs, how many are to run side by side, and the plan.

    Returns:
      The programs, for fewer runs where memory does not suffice for all.

    Raises:
      FedLPError: one run on each device is too much already, with both sizes.
    """
    # Traced in this thread, where the settings of jax are the caller's; XLA needs no such lock.
    lowered = [_lower(*group) for group in groups]
    with ThreadPoolExecutor() as pool:
        programs = list(pool.map(_compile, lowered))
    return [_fitting(*pair) for pair in zip(lowered, programs, strict=True)]


def _lower(run: Run, count: int, plan: LanesPlan) -> _Lowered:
    """Traces and lowers, unless the process has done so for an equal program."""
    start = time.perf_counter()
    runs = -(-count // plan.groups) * plan.groups
    shapes = _lanes_shapes(run, runs, plan)
    tested = (shapes[0].variables, _resharded(run.stage.test, plan))
    leaves, tree = jax.tree.flatten((shapes, tested))
    # jax returns the jaxpr of before if all its own settings are those of before.
    settings = Same(_nothing.trace().jaxpr), conv.current()
    key = lasting(run.algorithm)
    place = [] if key is None else _place(key, plan, runs, tree, tuple(leaves), settings)
    if not place:
        place.append(_trace(run, runs, plan, shapes, tested))
    program = place[0]._replace(seconds=time.perf_counter() - start)
    return _Lowered(run, program, _held_bytes(shapes[:2], plan))


@functools.lru_cache(maxsize=_PROGRAMS)
def _place(*key: Any) -> list[LanesProgram]:
    """A place for what is lowered, which holds no run."""
    return []


def _trace(run: Run, runs: int, plan: LanesPlan, shapes: Any, tested: Any) -> LanesProgram:
    test = jax.vmap(evaluator(run.algorithm, plan), (0, None), spmd_axis_name=RUNS)
    with conv.recording() as lowerings, collecting() as said:
        rounds = _rounds_of_lanes(run, plan).lower(*shapes)
        tests = jax.jit(test, keep_unused=True).lower(*tested)
    return LanesProgram(plan, runs, rounds, tests, lowerings, 0.0, tuple(said))


def _compile(lowered: _Lowered) -> LanesProgram:
    start, program = time.perf_counter(), lowered.program
    devices = tuple(program.plan.mesh.devices.flat)
    with ThreadPoolExecutor() as pool:
        rounds, test = pool.map(lambda one: executable(one, devices), (program.round, program.test))
    seconds = program.seconds + time.perf_counter() - start
    return program._replace(round=rounds, test=test, seconds=seconds)


def _fitting(lowered: _Lowered, program: LanesProgram) -> LanesProgram:
    """The program, or one of fewer runs if it needs more memory than is free."""
    while True:
        plan, free, need = program.plan, free_bytes(program.plan), needed_bytes(program.round)
        if free is None or need is None or (need := need + lowered.held_bytes) <= free:
            return program
        if program.runs == plan.groups:
            raise FedLPError(
                f"a round of one run on each of {plan.groups} group(s) of devices needs "
                f"{size(need)}, where {size(free)} are free; use a smaller batch, width or model, "
                "or fewer devices."
            )
        # At most half as many; a guess, because some memory does not depend on the number.
        fewer = min(program.runs // 2, program.runs * free // need)
        lowered = _lower(lowered.run, max(fewer // plan.groups * plan.groups, 1), plan)
        program = _compile(lowered)


def _held_bytes(shapes: Any, plan: LanesPlan) -> int:
    """Bytes of arrays that are divided among the groups of devices, on each device."""
    return size_bytes(shapes) // plan.groups


def _rounds_of_lanes(run: Run, plan: LanesPlan) -> Any:
    """The rounds of runs side by side, to be traced."""
    mapped = jax.vmap(
        traceable_rounds(run.algorithm, plan),
        in_axes=(0, _SLOTS, None, _axes(run), None, 0),
        out_axes=(0, _SLOTS, _of_metrics(_SLOTS, 0)),
        spmd_axis_name=RUNS,
    )
    slots, runs = plan.sharded(_SLOTS), plan.sharded(0)
    return jax.jit(
        mapped,
        donate_argnums=(0, 1),
        out_shardings=(runs, slots, _of_metrics(slots, runs)),
        keep_unused=True,
    )


def _of_metrics(slots: Any, halted: Any) -> RoundMetrics:
    """A prefix of the metrics of a round: one value for arrays of slots, one for `halted`."""
    return RoundMetrics(slots, slots, slots, halted, slots, slots)


def _axes(run: Run) -> Cohort:
    """The axis of runs in each array of a cohort.

    A segment that is the same in all rounds of all runs has none: then the loops over clients keep
    one trip count, where JAX would otherwise select every carry by run in every iteration.
    """
    axes = jax.tree.map(lambda _: _SLOTS, run.stage.shapes()[2])
    return dataclasses.replace(axes, segment=None) if _one_segment(run) else axes


def _layout_of(run: Run) -> Hashable:
    """A key: runs of one structure with equal ones have the same cohorts in the same slots."""
    spec, steps = run.spec, run.algorithm.local_steps(run.clients.sizes)
    if callable(spec.cohorts.rule) or spec.exposure is not None:
        return Same(run)  # whose function is called in every round, or whose faults are its own
    digest = hashlib.sha256(spec.assigned.tobytes() + steps.tobytes()).digest()
    drawn = run.seed, spec.cohorts.size, run.algorithm.cohort_rounds
    return *drawn, Same(run.clients), digest, *run.stage.level_cost


def _one_segment(run: Run) -> bool:
    """Whether one device runs the same number of clients of one level in every round."""
    return len(run.spec.levels) == 1 and run.plan.devices == 1 and run.spec.cohorts.fixed


def _lanes_shapes(run: Run, runs: int, plan: LanesPlan) -> tuple[Any, ...]:
    """Shapes and shardings of the arguments of `_rounds_of_lanes`."""
    state, clients, examples, cohorts, count, key = run.round_shapes(run.plan)

    def with_runs(tree: Any, axis: int) -> Any:
        def one(x: Any) -> jax.ShapeDtypeStruct:
            shape = (*x.shape[:axis], runs, *x.shape[axis:])
            return jax.ShapeDtypeStruct(shape, x.dtype, sharding=plan.sharded(axis))

        return jax.tree.map(one, tree)

    stacked = with_runs(cohorts, _SLOTS)
    if _one_segment(run):
        segment = _resharded(cohorts.segment, plan, over_clients(plan))
        stacked = dataclasses.replace(stacked, segment=segment)
    return (
        with_runs(state, 0),
        with_runs(clients, _SLOTS),
        _resharded(examples, plan),
        stacked,
        count,
        with_runs(key, 0),
    )


class LanesPending(NamedTuple):
    """Dispatched rounds that the host has not read."""

    first: int  # the number of the first
    cohorts: dict[int, list[Cohort]]  # of each lane that has not ended: of each round, numpy
    metrics: RoundMetrics  # [P, R, rounds, ...] on the devices; `halted` [R, rounds]
    tested: dict[str, Any] | None  # the evaluation after the last, [R]


class Lanes:
    """Runs in the lanes of a program, as many as it has or fewer.

    Attributes:
      runs: which keep their ledgers and histories; `settle` gives one its state.
      program: compiled.
      live: lanes whose runs have not ended.
    """

    def __init__(self, runs: Sequence[Run], program: LanesProgram):
        """Moves the states of the runs into one.

        Args:
          runs: of the program's structure, which start with the same round.
          program: from `compile_lanes`.
        """
        self.runs, self.program = list(runs), program
        self.live = list(range(len(runs)))
        self._plan, self._one_segment = program.plan, _one_segment(runs[0])
        self._layouts = [_layout_of(run) for run in runs]
        # Spare lanes repeat the first run, and nobody reads them.
        lanes = [*runs, *[runs[0]] * (program.runs - len(runs))]
        states = jax.tree.map(_stacked, *(run.state for run in lanes))
        self._state = processes.put(states, self._plan.sharded(0))
        keys = jnp.stack([run.stage.key for run in lanes])
        self._key = processes.put(keys, self._plan.sharded(0))
        everywhere = replicated(self._plan)
        self._examples = processes.put(runs[0].stage.train, everywhere)
        self._test = processes.put(runs[0].stage.test, everywhere)
        for run in runs:
            jax.tree.map(lambda x: x.delete(), run.state)  # until it is settled
            run.lowerings = program.lowerings
            run.readings["compile_seconds"] = program.seconds / len(runs)
        self._clock = time.perf_counter()

    def dispatch(self, round: int, count: int = 1) -> LanesPending:
        """Starts rounds in all lanes and, where due, an evaluation; see `Run.dispatch`."""
        first = self.runs[self.live[0]]
        cohorts: dict[int, list[Cohort]] = {}
        laid_out: dict[Hashable, Any] = {}
        for lane in self.live:
            run, layout = self.runs[lane], self._layouts[lane]
            if layout not in laid_out:
                laid_out[layout] = run.stage.lay_out(round, count)
            cohorts[lane], layouts = laid_out[layout]
            run.padded_share = sum((x.padded_share for x in layouts), run.padded_share)
            run.imbalance = sum((x.imbalance for x in layouts), run.imbalance)
        self._state, clients, metrics = self.program.round(
            self._state,
            self._kept(cohorts),
            self._examples,
            self._staged(cohorts),
            None if self._plan.rounds_at_once == 1 else np.int32(count),
            self._key,
        )
        for lane in self.live if clients else ():
            run = self.runs[lane]
            own = {dtype: x[:, lane] for dtype, x in clients.items()}
            own = processes.put(own, over_clients(run.plan))
            halted = processes.put(metrics.halted[lane], replicated(run.plan))
            run.stage.keep(cohorts[lane], own, halted)
        last, tested = round + count - 1, None
        if last % first.eval_every == 0 or last == first.last_round:
            tested = self.program.test(self._state.variables, self._test)
        with jax.transfer_guard_device_to_host("allow"):  # intended, as device_get is
            for leaf in jax.tree.leaves(metrics):
                leaf.copy_to_host_async()
        return LanesPending(round, cohorts, metrics, tested)

    def at_once(self, round: int) -> int:
        """How many rounds from this one on may share a dispatch, see `Run.at_once`."""
        return min(self.runs[lane].at_once(round, len(self.live)) for lane in self.live)

    def records(self, pending: LanesPending) -> dict[int, list[RoundRecord]]:
        """Waits for the numbers of dispatched rounds, of each lane that was live.

        The seconds of a round are divided among its runs, so those of a sweep add up.
        """
        metrics, tested = jax.device_get((pending.metrics, pending.tested))
        lanes = pending.cohorts
        rounds = len(next(iter(lanes.values())))
        now = time.perf_counter()
        seconds, self._clock = (now - self._clock) / (rounds * len(lanes)), now
        leaves, tree = jax.tree.flatten(metrics._replace(halted=cast(Any, ())))
        found = {}
        for lane, cohorts in lanes.items():
            own = jax.tree.unflatten(tree, [x[:, lane] for x in leaves])
            of_lane = Pending(
                pending.first,
                cohorts,
                own._replace(halted=metrics.halted[lane]),
                jax.tree.map(lambda x, lane=lane: x[lane], tested),
            )
            found[lane] = records_of(of_lane, seconds)
        return found

    def settle(self, lane: int) -> Run:
        """Gives a run its state after the rounds that were dispatched."""
        run = self.runs[lane]
        run.state = processes.put(_entry(self._state, lane), replicated(run.plan))
        return run

    def end(self, lane: int) -> None:
        """Settles a run whose later rounds do not count; its lane computes on, unread."""
        if lane in self.live:
            self.settle(lane)
            self.live.remove(lane)

    def _of_lanes(self, of_live: dict[int, Any]) -> list[Any]:
        """One for each lane of the program: that of its run, or of the first live one."""
        any_live = of_live[self.live[0]]
        return [of_live.get(lane, any_live) for lane in range(self.program.runs)]

    def _staged(self, cohorts: dict[int, list[Cohort]]) -> Cohort:
        """The cohorts of all lanes, on the devices."""
        distinct = {id(own): lane for lane, own in cohorts.items()}
        stacked = {i: self.runs[k].stage.stacked(cohorts[k]) for i, k in distinct.items()}
        all_lanes = self._of_lanes({lane: stacked[id(own)] for lane, own in cohorts.items()})
        segment: Any = None
        if self._one_segment:
            segment = processes.put(all_lanes[0].segment, over_clients(self._plan))
            all_lanes = [dataclasses.replace(one, segment=None) for one in all_lanes]
        stack = jax.tree.map(lambda *x: np.stack(x, _SLOTS), *all_lanes)
        staged: Cohort = processes.put(stack, self._plan.sharded(_SLOTS))
        return dataclasses.replace(staged, segment=segment) if self._one_segment else staged

    def _kept(self, cohorts: dict[int, list[Cohort]]) -> Packed:
        """What the clients of all lanes keep, on the devices."""
        kept = {lane: self.runs[lane].stage.kept(own) for lane, own in cohorts.items()}
        stack: Packed = jax.tree.map(lambda *x: jnp.stack(x, _SLOTS), *self._of_lanes(kept))
        return processes.put(stack, self._plan.sharded(_SLOTS)) if stack else {}


def _stacked(*arrays: Array) -> Any:
    """Arrays of runs on a new first axis: on the host, where this compiles nothing."""
    if jnp.issubdtype(arrays[0].dtype, jax.dtypes.extended):  # keys, which NumPy does not have
        return jnp.stack(arrays)
    return np.stack(jax.device_get(arrays))


@jax.jit
def _entry(stack: Any, lane: Array | int) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, lane, keepdims=False), stack)


def _resharded(tree: Any, plan: LanesPlan, sharding: Any = None) -> Any:
    """Shapes of arrays that the devices of all lanes hold whole, unless a sharding is given."""
    sharding = replicated(plan) if sharding is None else sharding
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
