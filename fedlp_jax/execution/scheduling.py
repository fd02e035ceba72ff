"""Scheduling: which client runs in which slot of which device, decided on the host."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fedlp_jax.execution.plan import SIDE_BY_SIDE, Plan

# Each bucket of sizes is compiled by itself, and an accelerator takes seconds for each.
_BUCKETS = 4


class Layout(NamedTuple):
    """The slots of a round, in NumPy."""

    member: np.ndarray  # i32[D * P], position in the cohort; -1 = empty slot
    segment: np.ndarray  # i32[D, G + 1], bounds of each level within a device's slots
    padded_share: float  # steps of idle lanes / all steps computed
    imbalance: float  # steps of the busiest device / mean over devices, by modelled work


def slots_per_device(cohort: int, devices: int) -> int:
    """P: twice the even share, so that a heavy client can have a device for itself."""
    return min(cohort, 2 * -(-cohort // devices)) if devices > 1 else cohort


def most_clients(cohort: int, devices: int, evenness: float) -> int:
    """The most clients that `lay_out` puts on one device, for any cohort.

    A device gets its last client, after n others, because it is the least busy one with room. So
    every other device has at least as much work, hence at least `n evenness` clients, or is full;
    and all devices together have at most the cohort without that last client.

    Args:
      cohort: C.
      devices: D.
      evenness: least / largest work of a client in the population.
    """
    for most in range(slots_per_device(cohort, devices), 1, -1):
        others = (devices - 1) * math.ceil((most - 1) * evenness - 1e-9)
        if most + others <= cohort:
            return most
    return 1


def with_even_chunks(plan: Plan, cohort: int, assigned: np.ndarray) -> Plan:
    """Narrows the width that `resolve` chose, to leave few lanes idle.

    The clients of a chunk have one level, so a cohort of many levels needs narrower chunks.

    Args:
      plan: resolved.
      cohort: C.
      assigned: `i32[K]`, submodel level of each client.
    """
    share = np.bincount(assigned).max() / len(assigned)
    most = max(math.ceil(cohort * share / (plan.devices or 1) - 1e-9), 1)  # expected, of one level
    width = min(plan.width or 1, most)
    return dataclasses.replace(plan, width=-(-most // -(-most // width)))


def widths_by_level(plan: Plan, assigned: np.ndarray, levels: int) -> tuple[int, ...]:
    """How many clients of each level run at once; none where all levels run W.

    W of the most common level, and of the others in proportion, so that a cohort like the
    population needs equally many chunks of every level, and few lanes of a rare level idle.

    Args:
      plan: resolved.
      assigned: `i32[K]`, submodel level of each client.
      levels: G.
    """
    width = plan.width or 1
    if levels == 1 or (width == 1 and plan.levels != SIDE_BY_SIDE):
        return ()
    counts = np.bincount(assigned, minlength=levels)
    widths = -(-width * counts // counts.max())
    return tuple(np.maximum(widths, 1).tolist())


def size_buckets(sizes: np.ndarray, steps: np.ndarray) -> tuple[int, ...]:
    """Sizes at which the clients of a population are cut into buckets of like work.

    A program that must know its trip counts holds the training of each bucket, as long as that of
    its largest client. Buckets of as many clients each, but those of equal work are one.

    Args:
      sizes: `i64[K]`, examples of each client.
      steps: `i64[K]`, their local steps.

    Returns:
      The largest size of each bucket, ascending; at most four.
    """
    order = np.argsort(sizes, kind="stable")
    ends = -(-len(sizes) * np.arange(1, _BUCKETS + 1) // _BUCKETS) - 1
    largest = {int(steps[i]): int(sizes[i]) for i in order[ends]}
    return tuple(largest.values())


def lay_out(
    steps: np.ndarray,
    level: np.ndarray,
    cost: Sequence[float],
    plan: Plan,
    largest: int | None = None,
    bounds: np.ndarray | None = None,
    widths: Sequence[int] = (),
) -> Layout:
    """Assigns clients to devices by modelled work, longest first, each to the least busy device.

    Args:
      steps: `i64[C]`, local steps of each client; the cohort is sorted by id.
      level: `i32[C]`, submodel level.
      cost: G numbers, modelled cost of one step of each level.
      plan: resolved.
      largest: clients of the largest cohort, which fixes the slots; None = of this one.
      bounds: `i64[]` ascending, the steps that the clients of each bucket compute; None = a chunk
        computes those of its longest client.
      widths: see `widths_by_level`.

    Returns:
      The layout. Within a device, clients are ordered by level, then longest first, then by id, so
      the clients of a chunk are alike.
    """
    devices = plan.devices or 1
    capacity = slots_per_device(largest or len(steps), devices)
    work = steps * np.asarray(cost, np.float64)[level]
    device, load = _to_the_least_busy(work, devices, capacity)

    levels = len(cost)
    member = np.full((devices, capacity), -1, np.int32)
    segment = np.zeros((devices, levels + 1), np.int32)
    computed = 0
    for d in range(devices):
        local = np.flatnonzero(device == d)
        local = local[np.lexsort((local, -steps[local], level[local]))]
        member[d, : len(local)] = local
        segment[d, 1:] = np.cumsum(np.bincount(level[local], minlength=levels))
        for lanes, longest in _chunks(steps[local], segment[d], plan, widths):
            if bounds is not None:
                longest = bounds[np.searchsorted(bounds, longest)]
            computed += lanes * int(longest.sum())
    padded = 1.0 - steps.sum() / computed if computed else 0.0
    return Layout(member.ravel(), segment, float(padded), float(load.max() * devices / load.sum()))


def _chunks(
    steps: np.ndarray, segment: np.ndarray, plan: Plan, widths: Sequence[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Of the chunks of one device, with equally many lanes: these, and the longest client of each.

    Longest first: the first client of a chunk sets its trip count.
    """
    levels = [steps[a:b] for a, b in itertools.pairwise(segment)]
    widths = widths or [plan.width or 1] * len(levels)
    firsts = [of_level[::w] for of_level, w in zip(levels, widths, strict=True)]
    if plan.levels != SIDE_BY_SIDE:
        yield from zip(widths, firsts, strict=True)
        return
    longest = map(max, itertools.zip_longest(*firsts, fillvalue=0))
    yield sum(widths), np.fromiter(longest, np.int64)


def _to_the_least_busy(
    work: np.ndarray, devices: int, capacity: int
) -> tuple[np.ndarray, np.ndarray]:
    """`i64[C]`, the device of each client, and `f64[D]`, the work of each device."""
    device, load = np.zeros(len(work), np.int64), np.zeros(devices)
    if devices == 1:
        return device, load + work.sum()
    room = [capacity] * devices
    idlest = [(0.0, d) for d in range(devices)]  # a heap of the devices with room
    for i in np.argsort(-work, kind="stable").tolist():
        busy, d = idlest[0]
        device[i], load[d], room[d] = d, busy + work[i], room[d] - 1
        if room[d]:
            heapq.heapreplace(idlest, (load[d].item(), d))
        else:
            heapq.heappop(idlest)
    return device, load
