"""Rounds of one plan to be timed, again and again from the same model."""

from __future__ import annotations

import collections
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fedlp_jax.simulation.program import Pending
from fedlp_jax.simulation.run import Simulation


class Rounds:
    """A simulation, compiled when it is made; calls run rounds of it, without a test.

    Every call starts from the initial model: what training makes of it, as numbers that are not
    finite after a thousand rounds, is no matter of time.

    Attributes:
      run: the simulation.
      compile_seconds: tracing, lowering and compiling the round.
    """

    def __init__(self, *arguments: Any, **settings: Any):
        """Compiles a `Simulation` of these arguments."""
        self.run = Simulation(*arguments, rounds=10**6, **settings)
        self.run.compile()
        self.compile_seconds = sum(
            self.run.readings[f"round_{part}_seconds"] for part in ("trace", "lowering", "compile")
        )
        self.number = 0
        self._first = jax.tree.map(jnp.copy, self.run.state)  # rounds donate theirs

    def __call__(self, rounds: Sequence[int] | None = None) -> float:
        """Seconds of some rounds: laying cohorts out, running them, reading their numbers.

        Private variables that persist are back in their store at the end, and go on from there.

        Args:
          rounds: whose cohorts to take, one after the other and one ahead of what was read, as in
            `simulate`; None = that of the next round alone.
        """
        if rounds is None:
            self.number += 1
            rounds = (self.number,)
        pending: collections.deque[Pending] = collections.deque()
        self.run.state = jax.block_until_ready(jax.tree.map(jnp.copy, self._first))
        start = time.perf_counter()
        most = self.run.plan.rounds_at_once or 1
        for first in range(0, len(rounds), most):
            call = rounds[first : first + most]
            pending.extend(self.run.dispatch_several(call))
            while len(pending) > len(call):
                self.run.read(pending.popleft())
        while pending:
            self.run.read(pending.popleft())
        if self.run.stage.store is not None:
            jax.block_until_ready(self.run.stage.store.stacks)
        return time.perf_counter() - start


def without_plan(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `simulate`, less those that are tuned or say how long it runs."""
    ignored = ("rounds", "eval_every", "plan")
    return {key: value for key, value in arguments.items() if key not in ignored}
