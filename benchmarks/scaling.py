"""The cost of a round as the cohort, the population and the plan grow.

    python -m benchmarks.scaling [--json FILE] [--smoke] [--only NAME]

The contenders of each question alternate in one process, after an untimed turn, and are compared by
medians:

* population: 100 clients of 20 steps per round out of 1,000 and out of 1,000,000, with the data on
  the devices and on the host. A round must not depend on the population: the ratio of two rounds is
  that of a turn, so what slows the machine slows both. What the host does in a round is timed
  apart, in milliseconds: drawing the cohort, laying it out, staging (both of these, and sending the
  arrays), reading the clients' numbers, and booking them in ledger and histories.
* cohort: 8 to 512 clients per round on one device, in a loop (width 1) and 8 at a time. The time of
  a round must be linear in the cohort: `slope` is the cost of one more client in milliseconds, from
  each size to the next.
* plan: devices, width and the place of the data, for a larger model; the time, the memory that the
  compiled program predicts, and the memory that a round takes.
* uneven: clients by Dirichlet(0.1), 100 cohorts laid out: the share of padded steps, and the work
  of the busiest device over the mean. Nothing is trained.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import fedlp_jax as fl
from benchmarks import command
from benchmarks.memory import peak_of
from benchmarks.timing import Rounds, alternate, spread
from fedlp_jax.execution.plan import needed_bytes
from fedlp_jax.simulation.cohorts import CohortBuilder, sample
from fedlp_jax.simulation.run import Run

Rows = list[dict[str, Any]]

_FEATURES = 64
_PER_CLIENT = 8


def main() -> None:
    """Answers all questions, or one, and prints a line for each contender."""
    parser = command.parser(__doc__)
    questions: dict[str, Callable[[bool], Rows]] = {
        "population": population,
        "cohort": cohorts,
        "plan": plans,
        "uneven": uneven,
    }
    parser.add_argument("--only", choices=questions, help="one of the questions")
    options = parser.parse_args()
    fl.setup()
    results = {}
    for name, ask in questions.items():
        if options.only not in (None, name):
            continue
        results[name] = ask(options.smoke)
        for row in results[name]:
            print(name, json.dumps(row), flush=True)
    command.write(options.json, results)


def population(smoke: bool) -> Rows:
    """Seconds of a round of 100 clients out of K, and milliseconds of the host's parts of it."""
    sizes = (1_000, 20_000 if smoke else 1_000_000)
    cases = [(clients, data) for data in ("device", "host") for clients in sizes]
    runs = {
        (clients, data): rounds_of_mlp(
            clients, 100, fl.Plan(width=1, data=data), epochs=1 if smoke else 10
        )
        for clients, data in cases
    }
    times = alternate(runs, 3 if smoke else 40)
    host: dict[Any, list[dict[str, float]]] = {case: [] for case in cases}
    for number in range(1, 4 if smoke else 41):
        for case in cases:
            host[case].append(_host_parts(runs[case].run, number))
    rows = []
    for clients, data in cases:
        seconds, smallest = times[clients, data], times[sizes[0], data]
        ratios = [a / b for a, b in zip(seconds, smallest, strict=True)]
        parts = host[clients, data]
        rows.append(
            {"clients": clients, "data": data, "seconds": spread(seconds)}
            | {"ratio_to_smallest": spread(ratios)}
            | {"host_ms": {name: spread([p[name] for p in parts], 1e3) for name in parts[0]}}
        )
    return rows


def _host_parts(run: Run, round: int) -> dict[str, float]:
    """Seconds of what the host does in a round; the round itself is waited for, not counted."""
    found = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        found[name] = time.perf_counter() - start
        return result

    ids = timed("draw", lambda: run.spec.cohorts.members(round))
    timed("layout", lambda: run.stage.builder.build(ids))
    timed("staging", lambda: jax.block_until_ready(run.stage(round).cohorts))
    pending = run.dispatch(round)
    jax.block_until_ready(pending.metrics)
    (record,) = timed("reading", lambda: run.records(pending))
    timed("booking", lambda: run.book(record))
    return found


def cohorts(smoke: bool) -> Rows:
    """Seconds of a round of C clients on one device, one and eight at a time."""
    sizes = (4, 8) if smoke else (8, 32, 128, 512)
    runs = {
        (size, width): rounds_of_mlp(
            1_000, cohort=size, plan=fl.Plan(devices=1, width=width), examples=64
        )
        for size in sizes
        for width in (1, sizes[0])
    }
    times = alternate(runs, _repeats(smoke))
    rows = []
    for (size, width), seconds in times.items():
        row = {
            "cohort": size,
            "width": width,
            "seconds": spread(seconds),
            "ms_per_client": 1e3 * statistics.median(seconds) / size,
        }
        if size != sizes[0]:
            smaller = sizes[sizes.index(size) - 1]
            before = times[smaller, width]
            # Turn by turn, because the machine drifts.
            slopes = [(b - a) / (size - smaller) for a, b in zip(before, seconds, strict=True)]
            row["slope"] = 1e3 * statistics.median(slopes)
        rows.append(row)
    return rows


def plans(smoke: bool) -> Rows:
    """Seconds and memory of a round of 64 clients of a model of 400,000 parameters, by plan."""
    cohort, hidden = (4, 8) if smoke else (64, 512)
    most = len(jax.devices())
    chosen = [
        fl.Plan(devices, width, data)
        for devices in ((most,) if smoke else sorted({1, most}))
        for width in ((2,) if smoke else (1, 8, 32))
        for data in ("device", "host")
    ]
    runs = {
        plan_words(plan): rounds_of_mlp(1_000, cohort, plan, features=784, hidden=(hidden,))
        for plan in chosen
    }
    times = alternate(runs, _repeats(smoke))
    base = next(iter(times.values()))
    rows = []
    for plan, (name, seconds) in zip(chosen, times.items(), strict=True):
        run = runs[name].run
        needed = needed_bytes(run.program.round)
        staged = (plan.devices or 1) * run.stage.round_bytes  # if the data are on the host
        predicted = None if needed is None else (run.plan.devices or 1) * needed + staged
        measured = peak_of(runs[name])
        rows.append(
            {"devices": plan.devices, "width": run.plan.width, "data": plan.data}
            | {"seconds": spread(seconds), "ratio_to_first": _ratio(seconds, base)}
            | {"predicted_bytes": predicted, "measured_bytes": measured}
        )
    return rows


def uneven(smoke: bool) -> Rows:
    """Padded share and imbalance of cohorts of Dirichlet(0.1), by cohort, devices and width."""
    labels = np.random.default_rng(0).integers(0, 10, 50_000)
    clients = fl.partition.dirichlet(labels, clients=1_000, alpha=0.1, seed=0, min_size=1)
    level = np.zeros(clients.clients, np.int32)
    rows = []
    for cohort in (10, 100, 512):
        for devices in (1, 2, 4):
            for width in (1, 4, 16, 64):
                if width > -(-cohort // devices):
                    continue
                plan = fl.Plan(devices, width)
                builder = CohortBuilder(clients, level, lambda n: -(-n // 10), [1.0], plan)
                layouts = [
                    builder.build(sample(0, round, clients.clients, cohort))[1]
                    for round in range(1, 4 if smoke else 101)
                ]
                rows.append(
                    {"cohort": cohort, "devices": devices, "width": width}
                    | {name: _mean(name, layouts) for name in ("padded_share", "imbalance")}
                )
    return rows


def plan_words(plan: fl.Plan) -> str:
    """A name for a plan."""
    return f"{plan.devices}x{plan.width} {plan.data}"


def _mean(name: str, layouts: list[Any]) -> float:
    return statistics.fmean(getattr(layout, name) for layout in layouts)


def _repeats(smoke: bool) -> int:
    return 3 if smoke else 15


def _ratio(seconds: list[float], base: list[float]) -> float:
    """The median over turns of the ratio of two contenders."""
    return statistics.median(a / b for a, b in zip(seconds, base, strict=True))


def rounds_of_mlp(
    clients: int,
    cohort: int,
    plan: fl.Plan,
    features: int = _FEATURES,
    examples: int = _PER_CLIENT,
    hidden: tuple[int, ...] = (128, 64),
    epochs: int = 1,
) -> Rounds:
    """A small model and few examples per client, so that the round itself dominates."""
    data = fl.load(
        "synthetic", examples=clients * examples, shape=(features,), num_classes=10, seed=0
    )
    partition = fl.partition.iid(data.train.labels, clients=clients, seed=0)
    task = fl.classification(fl.models.MLP(hidden=hidden, num_classes=10))
    algorithm = fl.fedlp_homo(
        task, keep=0.5, client_optimizer=optax.sgd(0.1), epochs=epochs, batch_size=4
    )
    return Rounds(algorithm, data, partition, cohort=cohort, plan=plan)


if __name__ == "__main__":
    main()
