"""Loops of a client's work, as data: so that the loops of several levels can become one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax

from fedlp_jax.types import Array, PyTree


class Loops(NamedTuple):
    """Epochs of steps, for ONE client; the bounds are common to those who are vmapped with it."""

    epochs: Array | int | None  # None = one, without a loop of its own
    steps: Callable[[Any], Array | int]  # number of an epoch -> its steps
    begin: Callable[[Any], PyTree]  # number of an epoch -> what its steps share
    step: Callable[..., Any]  # (what they share, epoch, number in it, carry) -> carry


# (loops, carry) -> carry
RunLoops = Callable[[Loops, Any], Any]


def run_loops(loops: Loops, carry: Any) -> Any:
    """Runs all epochs."""

    def epoch(index: Array | int, carry: Any) -> Any:
        step = partial(loops.step, loops.begin(index), index)
        return jax.lax.fori_loop(0, loops.steps(index), step, carry)

    if loops.epochs is None:
        return epoch(0, carry)
    return jax.lax.fori_loop(0, loops.epochs, epoch, carry)


def side_by_side(
    runs: Sequence[Callable[..., Any]], shared: PyTree, lanes: Sequence[tuple[Any, ...]]
) -> list[Any]:
    """Runs clients of several levels, each level vmapped, with the loops of all levels as one.

    A step of that loop is a step of every level; no level's step reads another's, so an accelerator
    may overlap them. The work of a level is written for one client and runs its loops by the
    function that it is given. Here that function is called under the level's vmap, and goes on
    with the next level, whose arrays have no axis of this one's clients; the last runs the loop.

    Args:
      runs: for each level `(shared, *lane, run=RunLoops) -> result`, for ONE client. The bounds of
        their loops are equal.
      shared: what every client reads.
      lanes: for each level the arguments of W clients, `[W, ...]`; W may differ.

    Returns:
      For each level its results, `[W, ...]`.
    """

    def from_level(g: int, loops: list[Loops], carries: list[Any]) -> tuple[list[Any], list[Any]]:
        """The last carries of all levels, and the results of level g and those after it."""
        if g == len(runs):
            return run_loops(_joined(loops), carries), []

        def one(*lane: Any) -> Any:
            rest: Any = None

            def run_all(own: Loops, carry: Any) -> Any:
                nonlocal rest
                ends, results = from_level(g + 1, [*loops, own], [*carries, carry])
                rest = ends[:g], results
                return ends[g]

            return runs[g](shared, *lane, run=run_all), rest

        own, (ends, results) = jax.vmap(one, out_axes=(0, None))(*lanes[g])
        return ends, [own, *results]

    return from_level(0, [], [])[1]


def _joined(parts: Sequence[Loops]) -> Loops:
    """One loop over all; carries and what steps share are lists."""

    def begin(epoch: Any) -> PyTree:
        return [part.begin(epoch) for part in parts]

    def step(shared: PyTree, epoch: Any, number: Any, carries: list[Any]) -> list[Any]:
        return [
            part.step(own, epoch, number, carry)
            for part, own, carry in zip(parts, shared, carries, strict=True)
        ]

    return parts[0]._replace(begin=begin, step=step)
