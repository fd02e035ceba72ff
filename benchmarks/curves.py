"""Do fast convolutions learn the same? Learning curves of one workload in several forms.

    python -m benchmarks.curves [--workload W1|W4] [--rounds N] [--json FILE] [--smoke] [RUN ...]

A RUN is FORM:SEED: a form of the convolutions, as in `fedlp_jax.nn.conv.using`, and a seed. The
default is `auto:0 auto:1 auto:2 direct:0`. `direct` is `lax.conv`, which on a CPU is tens of times
slower: W1 takes about five minutes per round. Runs of one seed have the same initial weights,
cohorts and batches, so a form differs from `auto` only by rounding, which training amplifies. The
effect of another seed is shown next to it.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any

import numpy as np

import fedlp_jax as fl
from benchmarks import command, parts
from benchmarks.workloads import WORKLOADS, Workload, smoke
from fedlp_jax.nn import conv

_RUNS = ["auto:0", "auto:1", "auto:2", "direct:0"]
_CURVES = ("train_loss", "test_loss", "test_accuracy")


def main() -> None:
    """Runs it."""
    parser = command.parser(__doc__)
    parser.add_argument("--workload", choices=["W1", "W4"], default="W1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", type=_run, default=[_run(run) for run in _RUNS]
    )
    options = parser.parse_args()
    fl.setup()
    workload = WORKLOADS[options.workload]
    result = measure(smoke(workload) if options.smoke else workload, options.rounds, options.runs)
    command.write(options.json, {"workload": options.workload} | result)


def measure(workload: Workload, rounds: int, runs: list[tuple[str, int]]) -> dict[str, Any]:
    """Runs the curves one after the other, and prints each."""
    data = parts.dataset(workload)
    clients = parts.partition(workload, data)
    curves: dict[str, dict[str, list[float]]] = {}
    lowerings = {}
    print("form:seed   test accuracy by round")
    for form, seed in runs:
        run = f"{form}:{seed}"
        with conv.using(form):
            result = fl.simulate(
                parts.algorithm(workload),
                data,
                clients,
                rounds=rounds,
                cohort=workload.cohort,
                seed=seed,
                eval_every=1,
            )
        curves[run] = {name: [row[name] for row in result.history] for name in _CURVES}
        lowerings[run] = result.lowerings
        print(f"{run:10}  " + "  ".join(f"{x:.4f}" for x in curves[run]["test_accuracy"]))
        sys.stdout.flush()
    differences = {}
    for run in curves:
        base = f"auto:{run.split(':')[1]}"
        if base in curves and base != run:
            differences[run] = _apart(curves[run], curves[base])
            print(f"{run} from {base}, test accuracy: at most {differences[run]:.4f}")
    seeds = [curve for run, curve in curves.items() if run.startswith("auto:")]
    noise = max((_apart(a, b) for a, b in itertools.combinations(seeds, 2)), default=None)
    if noise is not None:
        print(f"between seeds of auto: up to {noise:.4f}")
    return {
        "rounds": rounds,
        "curves": curves,
        "lowerings": lowerings,
        "largest_difference_from_auto": differences,
        "largest_difference_between_seeds": noise,
    }


def _run(word: str) -> tuple[str, int]:
    """`"auto:0"` -> `("auto", 0)`."""
    form, _, seed = word.partition(":")
    if not seed.isdecimal():
        raise argparse.ArgumentTypeError(f"'{word}' is not FORM:SEED, such as auto:0.")
    try:
        with conv.using(form):  # refuses an unknown form
            return form, int(seed)
    except fl.FedLPError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _apart(a: dict[str, list[float]], b: dict[str, list[float]]) -> float:
    """The largest difference of two curves of test accuracy in any round."""
    gaps = np.subtract(a["test_accuracy"], b["test_accuracy"])
    return float(np.abs(gaps).max(initial=0.0))


if __name__ == "__main__":
    main()
