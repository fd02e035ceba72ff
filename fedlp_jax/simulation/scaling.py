"""Scaling: the seconds of a round on other numbers of devices, modelled from a measured pace.

    seconds(D) = fixed + steps(D) step + 2 ceil(log2 D) latency + 2 (D - 1) / D bytes / bandwidth

The first two terms are a device's own. The others are an all-reduce that halves the vector and
doubles the distance (Rabenseifner; Thakur et al., "Optimization of Collective Communication
Operations in MPICH", 2005), which sends the fewest bytes that one can.
"""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

import numpy as np

from fedlp_jax.errors import check_number
from fedlp_jax.execution.map_clients import summed_bytes
from fedlp_jax.execution.plan import Plan
from fedlp_jax.execution.scheduling import lay_out
from fedlp_jax.simulation.program import rounds_of
from fedlp_jax.simulation.run import Run

_COHORTS = 8  # whose mean load is taken
_PAYS = 0.9  # twice the devices pay if a round takes less than this share of its time


class Pace(NamedTuple):
    """What a device takes for its part of a round, without the reduction."""

    step: float  # seconds of a local step of one client, at the deepest level
    fixed: float = 0.0  # seconds of a round whatever its clients do


class Link(NamedTuple):
    """What connects the devices."""

    bandwidth: float = 50e9  # bytes a second of each device, each way: 400 Gb/s, as in a DGX H100
    latency: float = 5e-6  # seconds of a message, what NCCL's src/graph/tuning.cc has for networks


class Modelled(NamedTuple):
    """A round on D devices, in seconds; all of it modelled."""

    devices: int
    idle: int  # devices without a client
    steps: float  # local steps of the busiest device
    training: float
    uneven: float  # the part of `training` beyond an even share of all steps
    fixed: float
    reduction: float

    @property
    def seconds(self) -> float:
        """Of the round."""
        return self.fixed + self.training + self.reduction

    @property
    def lost(self) -> dict[str, float]:
        """Seconds that more devices do not shorten, by their cause."""
        return {"cohort": self.uneven, "reduction": self.reduction, "fixed part": self.fixed}

    @property
    def limit(self) -> str:
        """The cause of most of them."""
        return max(self.lost, key=lambda cause: self.lost[cause])


class Scaling:
    """A model of the rounds of a run on any number of devices.

    Attributes:
      cohort: C.
      pace: of one device.
      link: between devices.
      reduced_bytes: that the round sums over the devices.
      complete: the round exchanges nothing else. A robust rule needs the updates of all clients.
    """

    def __init__(self, run: Run, pace: Pace, link: Link | None = None):
        """Traces the round, for the bytes of its reduction.

        Args:
          run: need not be compiled.
          pace: measured by `measure_pace`, or known.
          link: None = the default.

        Raises:
          FedLPError: a step or a bandwidth that is not positive, or a negative latency.
        """
        link = Link() if link is None else link
        check_number("pace.step", pace.step, gt=0)
        check_number("link.bandwidth", link.bandwidth, gt=0)
        check_number("link.latency", link.latency, ge=0)
        self._run, self.pace, self.link = run, pace, link
        self.cohort, self.complete = run.size, not run.algorithm.stacked
        program = rounds_of(run.algorithm, run.plan).trace(*run.round_shapes(run.plan))
        self.reduced_bytes = summed_bytes(program.jaxpr)

    def __call__(self, devices: int) -> Modelled:
        """Models a round on D devices.

        Raises:
          FedLPError: fewer than one.
        """
        check_number("devices", devices, ge=1, integer=True)
        busy = min(devices, self.cohort)  # as many as `resolve` takes
        first = self._run.first_round
        loads = [load(self._run, busy, r) for r in range(first, first + _COHORTS)]
        steps, total = (statistics.fmean(column) for column in zip(*loads, strict=True))
        return Modelled(
            devices,
            devices - busy,
            steps,
            steps * self.pace.step,
            (steps - total / devices) * self.pace.step,
            self.pace.fixed,
            reduction_seconds(busy, self.reduced_bytes, self.link),
        )

    def worthwhile(self) -> int:
        """The devices, a power of two or C, of which twice as many save less than a tenth."""
        devices, here = 1, self(1).seconds
        while (there := self(2 * devices).seconds) < _PAYS * here:
            devices, here = 2 * devices, there
        return min(devices, self.cohort)


def reduction_seconds(devices: int, size: int, link: Link) -> float:
    """Modelled seconds of an all-reduce of `size` bytes over D devices."""
    messages, share = 2 * math.ceil(math.log2(devices)), 2 * (devices - 1) / devices
    return messages * link.latency + share * size / link.bandwidth


def load(run: Run, devices: int, round: int) -> tuple[float, float]:
    """Local steps of the busiest of D devices in a round, and of all together.

    A step of a shallow or narrow level counts its share of a step of the last, by modelled work.
    """
    ids = run.spec.cohorts.members(round)
    steps, level = run.algorithm.local_steps(run.clients.sizes[ids]), run.spec.assigned[ids]
    cost = np.asarray(run.stage.level_cost) / run.stage.level_cost[-1]
    layout = lay_out(steps, level, cost.tolist(), Plan(devices, 1))
    total = float((steps * cost[level]).sum())
    return layout.imbalance * total / devices, total
