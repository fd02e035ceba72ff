"""Do narrow clients cost what they should? Rounds of HeteroFL in which all have one width.

    python -m benchmarks.widths [--steps N] [--repeats N] [--json FILE] [--smoke]

An MLP with two hidden layers of 1,024 units on generated 28 x 28 images; one device runs one client
after the other. All rounds run one compiled program; they alternate. Shares are of width 1. "MACs"
are those of an example's forward pass, "bytes" what a client uploads.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import optax

import fedlp_jax as fl
from benchmarks import command
from benchmarks.timing import Rounds, alternate, spread
from fedlp_jax.accounting.macs import forward_macs

_RATES = (1.0, 0.5, 0.25)
_BATCH = 10


def main() -> None:
    """Runs it."""
    parser = command.parser(__doc__)
    parser.add_argument("--steps", type=int, default=20, help="of each client in a round")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each width")
    options = parser.parse_args()
    fl.setup()
    if options.smoke:
        result = measure(fl.models.MLP(hidden=(8,)), (4, 4, 1), steps=1, repeats=1)
    else:
        module = fl.models.MLP(hidden=(1024, 1024))
        result = measure(module, (28, 28, 1), options.steps, options.repeats)
    show(result)
    command.write(options.json, result)


def measure(
    module: Any, image: tuple[int, ...], steps: int, repeats: int, cohort: int = 4
) -> dict[str, Any]:
    """Times a round of every width.

    Args:
      module: a linen module with widths.
      image: shape of an example.
      steps: S, of each client in a round.
      repeats: timed rounds of each width.
      cohort: C.
    """
    count = cohort * len(_RATES)
    data = fl.load("synthetic", examples=20 * count, shape=image, num_classes=10, seed=0)
    clients = fl.partition.iid(data.train.labels, clients=count, seed=0)
    chosen = np.arange(cohort)  # the cohort of the next round
    rounds = Rounds(
        fl.heterofl(
            fl.classification(module),
            widths=np.repeat(_RATES, cohort).tolist(),
            client_optimizer=optax.sgd(0.1),
            steps=steps,
            batch_size=_BATCH,
        ),
        data,
        clients,
        cohort=lambda *_: chosen,
        plan=fl.Plan(devices=1, width=1),
    )

    def of(place: int) -> Any:
        def once() -> float:
            nonlocal chosen
            chosen = place * cohort + np.arange(cohort)
            return rounds()

        return once

    times = alternate({rate: of(i) for i, rate in enumerate(_RATES)}, repeats)
    spec = rounds.run.spec
    rows = []
    for rate, level, sent in zip(
        _RATES, reversed(spec.levels), reversed(spec.wire.upload.tolist()), strict=True
    ):
        held = level.extract(spec.algorithm.task.init(spec.root, spec.example))
        macs = sum(forward_macs(level.task, held, spec.example).values())
        row = {"width": rate, "modelled_macs": macs, "upload_bytes": sum(sent)}
        rows.append(row | {"measured_seconds": spread(times[rate])})
    whole = rows[0]
    for row in rows:
        row["share"] = {
            "macs": row["modelled_macs"] / whole["modelled_macs"],
            "bytes": row["upload_bytes"] / whole["upload_bytes"],
            "measured_time": statistics.median(times[row["width"]]) / statistics.median(times[1.0]),
        }
    return {"cohort": cohort, "steps": steps, "batch": _BATCH, "widths": rows}


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    print(f"{result['cohort']} clients x {result['steps']} steps of {result['batch']} examples")
    print("width   MACs of an example   seconds of a round   share:  MACs   bytes   time")
    for row in result["widths"]:
        share = row["share"]
        print(
            f"{row['width']:5} {row['modelled_macs']:20,} "
            f"{row['measured_seconds']['median']:20.3f} {share['macs']:13.2f} "
            f"{share['bytes']:7.2f} {share['measured_time']:6.2f}"
        )


if __name__ == "__main__":
    main()
