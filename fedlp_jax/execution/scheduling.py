"""Which client runs in which slot of which device, laid out on the host."""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fedlp_jax.execution.map_clients import Plan


class Layout(NamedTuple):
    """Slots of a round, on the host."""

    member: np.ndarray  # i32[D * P], position in the cohort; -1 = empty slot
    segment: np.ndarray  # i32[D, G + 1], bounds of each level within a device's slots
    padded_share: float  # steps computed for nobody / all steps computed
    imbalance: float  # steps of the busiest device / mean over devices, by modelled work


def slots_per_device(cohort: int, devices: int) -> int:
    """P: room for twice the even share, so that heavy clients can have a device of their own."""
    return min(cohort, 2 * -(-cohort // devices)) if devices > 1 else cohort


def most_clients(cohort: int, devices: int, evenness: float) -> int:
    """The most clients that `lay_out` gives one device, whatever the cohort.

    A device gets its last client, after n others, as the least busy one that has room. So every
    other has at least as much to do, hence at least `n evenness` clients, or is full; and all of
    them together are at most the cohort without that last client.

    Args:
      cohort: C.
      devices: D.
      evenness: the least work of a client over the largest, over the whole population.
    """
    for most in range(slots_per_device(cohort, devices), 1, -1):
        elsewhere = (devices - 1) * math.ceil((most - 1) * evenness - 1e-9)
        if most + elsewhere <= cohort:
            return most
    return 1


def with_even_chunks(plan: Plan, cohort: int, assigned: np.ndarray) -> Plan:
    """A resolved plan whose width was chosen, narrowed to leave few lanes idle.

    A chunk is of clients of one level, so a cohort of many levels wants narrower ones.

    Args:
      plan: resolved.
      cohort: C.
      assigned: `i32[K]`, submodel level of each client.
    """
    share = np.bincount(assigned).max() / len(assigned)
    most = max(math.ceil(cohort * share / (plan.devices or 1) - 1e-9), 1)  # of a level, expected
    width = min(plan.width or 1, most)
    return dataclasses.replace(plan, width=-(-most // -(-most // width)))


def lay_out(
    steps: np.ndarray,
    level: np.ndarray,
    cost: Sequence[float],
    plan: Plan,
    largest: int | None = None,
) -> Layout:
    """Gives clients to devices by modelled work, longest first, each to the least busy one.

    Args:
      steps: `i64[C]`, local steps of each client of the cohort, which is sorted by id.
      level: `i32[C]`, submodel level.
      cost: G numbers, modelled cost of one step of each level.
      plan: resolved.
      largest: clients of the largest cohort, which fixes the slots; None = of this one.

    Returns:
      The layout. Within a device clients stand by level, then longest first, then by id, so that
      the clients of a chunk are alike.
    """
    devices, width = plan.devices or 1, plan.width or 1
    capacity = slots_per_device(largest or len(steps), devices)
    work = steps * np.asarray(cost, np.float64)[level]
    device, load = _to_the_least_busy(work, devices, capacity)

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


def _to_the_least_busy(
    work: np.ndarray, devices: int, capacity: int
) -> tuple[np.ndarray, np.ndarray]:
    """`i64[C]`, the device of each client, and `f64[D]`, the work of each device."""
    device, load = np.zeros(len(work), np.int64), np.zeros(devices)
    if devices == 1:
        return device, load + work.sum()
    room = [capacity] * devices
    idlest = [(0.0, d) for d in range(devices)]  # a heap, of those that have room
    for i in np.argsort(-work, kind="stable").tolist():
        busy, d = idlest[0]
        device[i], load[d], room[d] = d, busy + work[i], room[d] - 1
        if room[d]:
            heapq.heapreplace(idlest, (load[d].item(), d))
        else:
            heapq.heappop(idlest)
    return device, load
