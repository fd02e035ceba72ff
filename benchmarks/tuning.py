"""Is the plan that `fedlp tune` writes as fast as one found by hand?

    python -m benchmarks.tuning [--workload W1|W2|W3|W4|all] [--seconds S] [--json FILE] [--smoke]

`tune` searches for S seconds. Then its plan alternates with a grid: every power of two of devices
and of widths, and the widest; and the fastest of these with its data on the host. Plans are dropped
after their first round if it takes twice as long as the fastest one's. `ratio_to_best_by_hand` is
the time of the plan of `tune` over that of the fastest of all, by medians of the same turns.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import fedlp_jax as fl
from benchmarks import command, parts
from benchmarks.timing import Rounds, alternate, spread
from benchmarks.workloads import WORKLOADS, Workload, smoke
from fedlp_jax.execution.plan import DEVICE, HOST, resolve
from fedlp_jax.simulation.tuning import tune, words

_DROPPED = 2.0  # times as slow as the fastest
_TURN = 16  # rounds, if they are short; else one
_TURN_SECONDS = 5.0


def main() -> None:
    """Runs one workload, or all."""
    parser = command.parser(__doc__)
    parser.add_argument("--workload", choices=[*WORKLOADS, "all"], default="all")
    parser.add_argument("--seconds", type=float, default=120.0, help="of `tune`")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each plan")
    options = parser.parse_args()
    fl.setup()
    names = list(WORKLOADS) if options.workload == "all" else [options.workload]
    results = {}
    for name in names:
        workload = smoke(WORKLOADS[name]) if options.smoke else WORKLOADS[name]
        seconds, repeats = (1.0, 1) if options.smoke else (options.seconds, options.repeats)
        results[name] = measure(workload, seconds, repeats)
        print(f"{name}: {results[name]['ratio_to_best_by_hand']:.3f} of the best by hand")
        command.write(options.json, {"workloads": results})


def measure(workload: Workload, seconds: float, repeats: int) -> dict[str, Any]:
    """Tunes one workload, then times its plan against the grid."""
    data = parts.dataset(workload)
    arguments: dict[str, Any] = {
        "algorithm": parts.algorithm(workload),
        "data": data,
        "clients": parts.partition(workload, data),
        "cohort": workload.cohort,
    }
    tuning = tune(arguments, seconds)
    plans = {words(plan): plan for plan in [tuning.best, *grid(workload.cohort)]}
    rivals = _prepared(arguments, plans)
    fastest = plans[min(rivals, key=lambda name: rivals[name][1])]
    on_host = dataclasses.replace(fastest, data=HOST)
    rivals |= _prepared(arguments, {words(on_host): on_host})
    least = min(first for _, first in rivals.values())
    turn = range(1, 1 + (_TURN if least * _TURN < _TURN_SECONDS else 1))
    remaining = {
        name: lambda once=once: once(turn) / len(turn)
        for name, (once, first) in rivals.items()
        if first < _DROPPED * least or name == words(tuning.best)
    }
    times = alternate(remaining, repeats)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    best = min(medians, key=lambda name: medians[name])
    for name in sorted(medians, key=lambda name: medians[name]):
        print(f"  {1e3 * medians[name]:9.1f} ms a round  {name}")
    return {
        "found": words(tuning.best),
        "measured_by_tune": [words(trial.plan) for trial in tuning.trials],
        "best_by_hand": best,
        "ratio_to_best_by_hand": medians[words(tuning.best)] / medians[best],
        "measured_seconds": {name: spread(seconds) for name, seconds in times.items()},
        "dropped_first_round_seconds": {
            name: first for name, (_, first) in rivals.items() if name not in remaining
        },
    }


def grid(cohort: int) -> list[fl.Plan]:
    """The plans that one would try first by hand."""
    default = resolve(fl.Plan(data=DEVICE, rounds_at_once=1), cohort)
    plans = []
    devices = default.devices or 1
    while devices:
        widest = -(-cohort // devices)
        widths = {2**i for i in range(widest.bit_length())} | {widest}
        plans += [
            dataclasses.replace(default, devices=devices, width=width) for width in sorted(widths)
        ]
        devices //= 2
    return plans


def _prepared(
    arguments: dict[str, Any], plans: dict[str, fl.Plan]
) -> dict[str, tuple[Rounds, float]]:
    """Each plan compiled, and the seconds of its first round after a warm-up."""
    ready = {}
    for name, plan in plans.items():
        once = Rounds(**arguments, plan=plan)
        once([1])
        ready[name] = (once, once([1]))
    return ready


if __name__ == "__main__":
    main()
