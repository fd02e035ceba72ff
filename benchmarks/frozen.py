"""Do frozen layers cost what they should? Measured rounds of `fl.freeze` against modelled MACs.

    python -m benchmarks.frozen [--steps N] [--json FILE] [--smoke]

The reference CNN of FedLP on generated images of CIFAR-10's shape, one device, width 1, so that
frozen layers skip their backward pass. Each row freezes other layers, or draws them with
probability keep. All rows run one compiled program and alternate with FedAvg, round by round. MACs
are modelled: the forward pass, and twice that for a whole backward pass, of which the blocks run
that a trained layer needs. For a probability they are the expectation.
"""

from __future__ import annotations

import statistics
import warnings
from typing import Any

import jax
import optax

import fedlp_jax as fl
from benchmarks import command
from benchmarks.hetero import Stairs
from benchmarks.timing import Rounds, alternate, spread
from fedlp_jax.accounting.macs import backward_blocks
from fedlp_jax.data.batching import example_of
from fedlp_jax.pruning.layers import layer_table
from fedlp_jax.simulation.staging import on_host

_BATCH = 10
_COHORT = 4
_PER_CLIENT = 50  # examples


def main() -> None:
    """Runs it."""
    parser = command.parser(__doc__)
    parser.add_argument("--steps", type=int, default=10, help="of each client in a round")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of each contender")
    options = parser.parse_args()
    fl.setup()
    if options.smoke:
        result = measure(Stairs(), (8, 8, 1), steps=2, repeats=1)
    else:
        module = fl.models.FedLPCNN(num_classes=10, init="pytorch")
        result = measure(module, (32, 32, 3), options.steps, options.repeats)
    show(result)
    command.write(options.json, result)


def measure(module: Any, image: tuple[int, ...], steps: int, repeats: int) -> dict[str, Any]:
    """Times FedAvg and every choice of trained layers.

    Args:
      module: a linen module, whose layers are named in the order in which they run.
      image: shape of an example.
      steps: S, of each client in a round.
      repeats: timed rounds of each contender.
    """
    examples = _COHORT * _PER_CLIENT
    data = fl.load("synthetic", examples=examples, shape=image, num_classes=10, seed=0)
    clients = fl.partition.iid(data.train.labels, clients=_COHORT, seed=0)
    task = fl.classification(module)
    local = {"client_optimizer": optax.adam(1e-3), "steps": steps, "batch_size": _BATCH}
    run = {"cohort": _COHORT, "plan": fl.Plan(devices=1, width=1)}
    example = example_of(on_host(data.train, data.normalize))
    shapes = jax.eval_shape(task.init, jax.random.key(0), example)
    table = layer_table(shapes)
    names = [name for name, held in zip(table.names, table.params, strict=True) if held]
    keeps = {f"from {name} on": dict.fromkeys(names[:i], 0.0) for i, name in enumerate(names)}
    keeps |= {f"keep {p:g}": dict.fromkeys(names, p) for p in (0.7, 0.5, 0.3)}
    contenders = {"fedavg": Rounds(fl.fedavg(task, **local), data, clients, **run)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of layers that are never sent
        for name, keep in keeps.items():
            made = fl.freeze(task, keep=keep, **local)
            contenders[name] = Rounds(made, data, clients, **run)
    times = alternate(contenders, repeats)
    base = statistics.median(times["fedavg"])
    blocks = backward_blocks(task, shapes, example, table)
    whole = sum(macs for _, macs in blocks)
    rows = {}
    for name, keep in keeps.items():
        done = 0.0
        for needed, macs in blocks:
            idle = 1.0
            for layer in needed:
                idle *= 1 - keep.get(table.names[layer], 1.0)
            done += macs * (1 - idle if needed else 1.0)
        rows[name] = {
            "modelled_macs_to_fedavg": (1 + 2 * done / whole) / 3,
            "measured_to_fedavg": statistics.median(times[name]) / base,
            "measured_seconds": spread(times[name]),
        }
    return {
        "cohort": _COHORT,
        "steps": steps,
        "fedavg_measured_seconds": spread(times["fedavg"]),
        "trained": rows,
    }


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    print(
        f"{result['cohort']} clients x {result['steps']} steps at width 1; a round of FedAvg takes "
        f"{result['fedavg_measured_seconds']['median']:.3f} s"
    )
    print("trained              over FedAvg:   MACs   time   seconds (min to max)")
    for name, row in result["trained"].items():
        t = row["measured_seconds"]
        print(
            f"{name:20} {row['modelled_macs_to_fedavg']:19.2f} {row['measured_to_fedavg']:6.2f}"
            f" {t['median']:8.3f} ({t['min']:.3f} to {t['max']:.3f})"
        )


if __name__ == "__main__":
    main()
