"""Rounds on 1, 2 and 4 devices of this host, beside what the model of `fedlp plan --devices` says.

    python -m benchmarks.devices [--json FILE] [--smoke] [--only NAME]

The devices are made of this host's cores, so more of them than cores share those: `busy_cores` is
the processor time of the shortest turn over its wall time. Contenders alternate in one process,
after an untimed turn, and are compared by their shortest turns: the devices of a round wait for
each other, so a neighbour on one core delays them all, and the more devices the more often. For the
same reason rounds are short.

* cohort: strong scaling, 16 clients on every number of devices, and weak scaling, 12 on each. The
  prediction is the model's, from three measurements on two devices: rounds of 16 clients, of one on
  each, and sums. Devices that share a core are predicted to take turns.
* sweep: the same with runs of 10 clients, which devices share among them: 12 in all, and 3 on each.
* memory: what a round takes on each device, predicted by the compiled program, and measured as the
  growth of the process over the number of devices. Best in a process of its own, `--only memory`:
  what other questions have freed is reused unseen, and large blocks are slower to allocate then.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import psutil

import fedlp_jax as fl
from benchmarks import command
from benchmarks.memory import peak_of
from benchmarks.scaling import rounds_of_mlp
from benchmarks.timing import Rounds, alternate, spread
from fedlp_jax.execution.map_clients import on_each_device
from fedlp_jax.execution.plan import AXIS, LanesPlan, needed_bytes, over_clients
from fedlp_jax.simulation.estimate import pace_between
from fedlp_jax.simulation.lanes import Lanes, compile_lanes
from fedlp_jax.simulation.scaling import Link, Scaling, load

Rows = list[dict[str, Any]]

_CORES = psutil.cpu_count() or 1
_DEVICES = (1, 2, 4)
_EXAMPLES = 64  # of a client: 16 steps
_SIZES = (1, 4 * 2**20)  # floats that are summed over two devices, to measure the link


def main() -> None:
    """Answers all questions, or one, and prints a line for each contender."""
    parser = command.parser(__doc__)
    questions: dict[str, Callable[[bool], Rows]] = {
        "cohort": cohort,
        "sweep": sweep,
        "memory": memory,
    }
    parser.add_argument("--only", choices=questions, help="one of the questions")
    options = parser.parse_args()
    fl.setup(cpu_devices=max(_DEVICES))
    results: dict[str, Any] = {"cores": _CORES}
    for name, ask in questions.items():
        if options.only in (None, name):
            results[name] = ask(options.smoke)
            for row in results[name]:
                print(name, json.dumps(row), flush=True)
    command.write(options.json, results)


class _Case(NamedTuple):
    """A contender: so many devices, and so much work."""

    kind: str  # "strong" or "weak"
    devices: int
    work: int  # clients or runs


def _cases(whole: int, each: int) -> list[_Case]:
    strong = [_Case("strong", devices, whole) for devices in _DEVICES]
    return strong + [_Case("weak", devices, devices * each) for devices in _DEVICES]


def cohort(smoke: bool) -> Rows:
    """Seconds of a round by devices and clients, measured and predicted."""
    cases = _cases(*((8, 4) if smoke else (16, 12)))
    rounds = {case: _rounds(case.devices, case.work) for case in cases}
    whole, few = cases[1], _Case("few", 2, 2)
    rounds[few] = _rounds(2, 2)
    timers = {case: _Timer(one) for case, one in rounds.items()}
    times = alternate(timers, 3 if smoke else 200)
    pace = pace_between(
        [min(times[case]) for case in (whole, few)],
        [load(rounds[case].run, 2, 1)[0] for case in (whole, few)],
    )
    link = _link(smoke)
    rows = []
    for case in cases:
        seconds, model = times[case], Scaling(rounds[case].run, pace, link)
        predicted = _predicted(model, case.devices)
        rows.append(
            _row(case, "clients", seconds, times[_first(cases, case)], timers[case])
            | {"predicted_seconds": predicted, "predicted_to_measured": predicted / min(seconds)}
            | {"reduced_bytes": model.reduced_bytes}
        )
    return [*rows, {"pace": pace._asdict(), "link": link._asdict()}]


def sweep(smoke: bool) -> Rows:
    """Seconds of a round of all runs, by devices and runs."""
    cases = _cases(*((4, 2) if smoke else (12, 3)))
    timers = {case: _Timer(_lanes(case)) for case in cases}
    times = alternate(timers, 3 if smoke else 200)
    return [
        _row(case, "runs", times[case], times[_first(cases, case)], timers[case]) for case in cases
    ]


def _lanes(case: _Case) -> Callable[[], float]:
    """Times the next round of runs side by side, from its cohorts to its numbers."""
    data = fl.load("synthetic", examples=1_000, shape=(64,), num_classes=10, seed=0)
    clients = fl.partition.iid(data.train.labels, clients=50, seed=0)
    task = fl.classification(fl.models.MLP(hidden=(64,), num_classes=10))
    algorithm = fl.fedlp_homo(
        task, keep=0.5, client_optimizer=optax.sgd(0.1), epochs=4, batch_size=4
    )
    runs = [
        fl.Simulation(
            algorithm, data, clients, rounds=10**6, cohort=10, seed=seed, plan=fl.Plan(1, 1)
        )
        for seed in range(case.work)
    ]
    plan = LanesPlan(**dataclasses.asdict(runs[0].plan), groups=case.devices)
    (program,) = compile_lanes([(runs[0], len(runs), plan)])
    lanes, numbers = Lanes(runs, program), itertools.count(1)

    def seconds() -> float:
        start = time.perf_counter()
        lanes.records(lanes.dispatch(next(numbers)))
        return time.perf_counter() - start

    return seconds


def memory(smoke: bool) -> Rows:
    """Bytes of a round on each device, of a model of 400,000 parameters, by clients at once."""
    hidden, clients, widths = ((8,), 8, (2,)) if smoke else ((512,), 64, (8, 16))
    rows = []
    for width in widths:
        for devices in _DEVICES:
            plan = fl.Plan(devices, width)
            rounds = rounds_of_mlp(1_000, clients, plan, features=784, hidden=hidden)
            program: Any = rounds.run.program
            rounds()  # starts threads, which keep memory of their own
            measured = peak_of(rounds)
            rows.append(
                {"devices": devices, "width": width, "clients": clients}
                | {"argument_bytes": int(program.round.memory_analysis().argument_size_in_bytes)}
                | {"predicted_bytes": needed_bytes(program.round)}
                | {"measured_bytes": None if measured is None else measured // devices}
            )
    return rows


class _Timer:
    """A contender whose turns are also timed by processor: `processor` has its seconds a turn."""

    def __init__(self, contender: Callable[[], float]):
        self._contender = contender
        self.processor: list[float] = []

    def __call__(self) -> float:
        start = time.process_time()
        seconds = self._contender()
        self.processor.append(time.process_time() - start)
        return seconds


def _first(cases: list[_Case], case: _Case) -> _Case:
    """The case of the same kind on one device."""
    return next(one for one in cases if one.kind == case.kind)


def _row(
    case: _Case, unit: str, seconds: list[float], one: list[float], timer: _Timer
) -> dict[str, Any]:
    """A contender beside one device: how many times as much work it does in a second."""
    work = case.devices if case.kind == "weak" else 1
    row = {"kind": case.kind, "devices": case.devices, unit: case.work}
    row |= {"seconds": spread(seconds), "speedup": work * min(one) / min(seconds)}
    processor = timer.processor[1:]  # the first turn is not timed
    busy = processor[seconds.index(min(seconds))] / min(seconds)
    return row | {"processor_seconds": spread(processor), "busy_cores": busy}


def _rounds(devices: int, clients: int) -> Rounds:
    return rounds_of_mlp(1_000, clients, fl.Plan(devices, 1), examples=_EXAMPLES)


def _predicted(model: Scaling, devices: int) -> float:
    """Seconds of a round, where devices beyond the cores take turns with the others."""
    found = model(devices)
    turns = max(devices / _CORES, 1.0)
    return found.fixed + turns * found.training + found.reduction


def _link(smoke: bool) -> Link:
    """The link between two devices, from sums of a number and of 16 MiB."""
    plan = fl.Plan(2, 1)
    total = on_each_device(lambda x: jax.lax.psum(x, AXIS), plan, (True,), False)
    program = jax.jit(total)
    times = []
    for size in _SIZES[:1] * 2 if smoke else _SIZES:
        x = jax.device_put(np.zeros(2 * size, np.float32), over_clients(plan))
        program(x).block_until_ready()
        readings = []
        for _ in range(50):
            start = time.perf_counter()
            program(x).block_until_ready()
            readings.append(time.perf_counter() - start)
        times.append(min(readings))
    # Two devices: two messages, and each sends all bytes once.
    return Link(4 * _SIZES[1] / max(times[1] - times[0], 1e-9), times[0] / 2)


if __name__ == "__main__":
    main()
