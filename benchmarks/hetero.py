"""Do shallow clients cost what they should? Measured rounds of FedLP-Hetero against their parts.

    python -m benchmarks.hetero [--steps N] [--heads persist|reset_to_init] [--json FILE] [--smoke]

The reference CNN of FedLP on CIFAR-10 (or generated images of its shape), the default plan, ten
full chunks of clients on every device. Rounds in which all clients have one depth give the time of
a step at each depth. Rounds of mixed cohorts (Hetero(f): 60% of depth f and 10% of each other; u:
20% of each) are compared with the sum of their parts, clients of each depth x steps x time of a
step: on the busiest device of the real layout ("sum of its levels"), and as if the devices could
share it evenly ("evenly"). All rounds run one compiled program, as in any FedLP-Hetero run.

The time of a step at depth c over that at depth 5 is shown next to what one may expect: "MACs", its
share of multiply-accumulates; "+ bytes", the time of these at the measured peak plus that of the
memory traffic at the measured bandwidth; "as lowered + bytes", the same with the operations of the
convolutions' Winograd forms. Memory traffic is modelled without a cache: each layer's output passes
memory 5 times (written and read forward; read backward, its gradient written and read), a parameter
6 times, and each number of the optimizer state twice. A shallow client holds a large exit head, so
it moves more parameters than a deep one.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
import optax

import fedlp_jax as fl
from benchmarks import command, peaks, step
from benchmarks.timing import Rounds, alternate, spread
from fedlp_jax.execution.plan import resolve
from fedlp_jax.types import Array

_BATCH = 10
_PER_CLIENT = 50  # examples, if images are generated
_CHUNKS = 10  # on each device, so that every mixture has full chunks


class Stairs(nn.Module):
    """A small network with depths, for `--smoke`: equal hidden layers, then a head of its own."""

    depth: int = 3

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """`f32[B, ...] -> logits f32[B, 10]`."""
        del train
        x = x.reshape(x.shape[0], -1)
        for i in range(self.depth):
            x = nn.relu(nn.Dense(64, name=f"fc{i}")(x))
        return nn.Dense(10, name=f"exit{self.depth}")(x)


def main() -> None:
    """Runs it."""
    parser = command.parser(__doc__)
    parser.add_argument("--steps", type=int, default=20, help="of each client in a round")
    parser.add_argument("--heads", choices=["persist", "reset_to_init"], default="persist")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each contender")
    options = parser.parse_args()
    fl.setup()
    if options.smoke:
        result = measure(Stairs(), (8, 8, 1), steps=2, heads=options.heads, repeats=1, smoke=True)
    else:
        module = fl.models.FedLPCNN(num_classes=10, init="pytorch")
        result = measure(module, (32, 32, 3), options.steps, options.heads, options.repeats)
    show(result)
    command.write(options.json, result)


def measure(
    module: Any,
    image: tuple[int, ...],
    steps: int,
    heads: Any,
    repeats: int,
    cohort: int | None = None,
    smoke: bool = False,
) -> dict[str, Any]:
    """Times every depth, every mixture and FedAvg; they alternate, round by round.

    Args:
      module: a linen module with depths.
      image: shape of an example.
      steps: S, of each client in a round.
      heads: as in `fl.fedlp_hetero`.
      repeats: timed rounds of each contender.
      cohort: C; None = ten full chunks of clients on every device.
      smoke: read the ceilings of the hardware from tiny arrays.
    """
    depths = module.depth
    full = resolve(None, cohort or 10**6)
    devices, width = full.devices or 1, full.width or 1
    cohort = cohort or _CHUNKS * width * devices
    data = _dataset(image, cohort * depths)
    clients = fl.partition.iid(data.train.labels, clients=cohort * depths, seed=0)
    task = fl.classification(module)
    local = {"client_optimizer": optax.adam(1e-3), "steps": steps, "batch_size": _BATCH}
    fedavg = Rounds(fl.fedavg(task, **local), data, clients, cohort=cohort)
    # Clients c * C to (c + 1) * C have depth c + 1; `chosen` is the cohort of the next round.
    assigned = np.repeat(np.arange(1, depths + 1), cohort)
    chosen = np.arange(cohort)
    hetero = Rounds(
        fl.fedlp_hetero(task, depths=assigned, heads=heads, **local),
        data,
        clients,
        cohort=lambda *_: chosen,
    )
    width = hetero.run.plan.width or 1

    def of(counts: np.ndarray) -> Callable[[], float]:
        def once() -> float:
            nonlocal chosen
            chosen = _members(counts, cohort)
            return hetero()

        return once

    pure = {f"depth {c}": cohort * np.eye(depths, dtype=int)[c - 1] for c in range(1, depths + 1)}
    mixed = mixtures(depths, cohort)
    contenders = {name: of(counts) for name, counts in (pure | mixed).items()}
    times = alternate({"fedavg": fedavg} | contenders, repeats)
    step_seconds = [statistics.median(times[name]) * devices / cohort / steps for name in pure]
    base = statistics.median(times["fedavg"])
    rows = {}
    for name, counts in mixed.items():
        layout = hetero.run.stage.builder.build(_members(counts, cohort))[0]
        expected = busiest(np.asarray(layout.segment), step_seconds, width) * steps
        even = float(np.dot(counts, step_seconds)) * steps / devices
        seconds = statistics.median(times[name])
        rows[name] = {
            "clients_by_depth": counts.tolist(),
            "measured_seconds": spread(times[name]),
            "sum_of_levels_seconds": expected,
            "ratio_to_sum_of_levels": seconds / expected,
            "ratio_to_sum_of_levels_evenly": seconds / even,
            "imbalance": expected / even,
            "ratio_to_fedavg": seconds / base,
        }
    return {
        "plan": {"devices": devices, "width": width},
        "cohort": cohort,
        "steps": steps,
        "heads": heads,
        "fedavg_measured_seconds": spread(times["fedavg"]),
        "compile_seconds": {"fedavg": fedavg.compile_seconds, "hetero": hetero.compile_seconds},
        "levels": _levels(module, image, devices, list(pure), times, step_seconds, smoke),
        "mixtures": rows,
    }


def mixtures(depths: int, cohort: int) -> dict[str, np.ndarray]:
    """Clients of each depth in the cohorts of FedLP-Hetero: flags first, middle, last, and u."""
    middle = (depths + 1) // 2
    cohorts = {}
    for flag in (1, middle, "u", depths):
        share = np.full(depths, 1 / depths)
        if flag != "u":
            share = np.where(np.arange(1, depths + 1) == flag, 0.6, 0.4 / (depths - 1))
        counts = np.floor(cohort * share + 1e-9).astype(int)
        counts[np.argmax(share)] += cohort - counts.sum()
        cohorts[f"Hetero({flag})"] = counts
    return cohorts


def busiest(segment: np.ndarray, step_seconds: Sequence[float], width: int) -> float:
    """Seconds of one step of all clients on the busiest device; `segment` as in `Cohort`."""
    chunks = -(-np.diff(segment, axis=1) // width) * width
    return float((chunks @ np.asarray(step_seconds)).max())


def _members(counts: np.ndarray, cohort: int) -> np.ndarray:
    """Ids of a cohort with `counts` clients of each depth."""
    return np.concatenate([c * cohort + np.arange(n) for c, n in enumerate(counts)])


def _dataset(image: tuple[int, ...], clients: int) -> fl.Dataset:
    if image == (32, 32, 3) and "TFDS_DATA_DIR" in os.environ:
        data = fl.load("cifar10")
        if len(data.train.labels) % clients == 0:  # as even as generated data
            return data
    examples = clients * _PER_CLIENT
    return fl.load("synthetic", examples=examples, shape=image, num_classes=10, seed=0)


def _levels(
    module: nn.Module,
    image: tuple[int, ...],
    devices: int,
    names: list[str],
    times: dict[str, list[float]],
    step_seconds: list[float],
    smoke: bool,
) -> list[dict[str, Any]]:
    """Each depth's step, and its measured and modelled shares of the deepest's."""
    peak, bandwidth = peaks.flops(devices, smoke=smoke), peaks.bandwidth(devices, smoke)
    costs = [
        step.cost(module.clone(depth=c), optax.adam(1e-3), image, _BATCH)
        for c in range(1, len(names) + 1)
    ]

    def share(of: Callable[[step.StepCost], float], c: int) -> float:
        return of(costs[c]) / of(costs[-1])

    return [
        {
            "depth": c + 1,
            "measured_seconds": spread(times[name]),
            "measured_ms_per_step": 1e3 * step_seconds[c],
            "share_of_deepest": {
                "measured_time": step_seconds[c] / step_seconds[-1],
                "macs": share(lambda cost: cost.macs, c),
                "macs_and_bytes": share(lambda s: s.written / peak + s.bytes / bandwidth, c),
                "lowered_and_bytes": share(lambda s: s.lowered / peak + s.bytes / bandwidth, c),
                "activation_bytes": share(lambda s: s.activation_bytes, c),
                "parameter_bytes": share(lambda s: s.parameter_bytes, c),
            },
        }
        for c, name in enumerate(names)
    ]


def show(result: dict[str, Any]) -> None:
    """Prints both tables."""
    plan = result["plan"]
    print(
        f"{result['cohort']} clients x {result['steps']} steps, devices={plan['devices']}, "
        f"width={plan['width']}, heads={result['heads']}; a round of FedAvg takes "
        f"{result['fedavg_measured_seconds']['median']:.3f} s"
    )
    print("depth   ms a step   share of the deepest:  time   MACs   + bytes   as lowered + bytes")
    for row in result["levels"]:
        share = row["share_of_deepest"]
        print(
            f"{row['depth']:5} {row['measured_ms_per_step']:11.3f} {share['measured_time']:28.2f}"
            f" {share['macs']:6.2f} {share['macs_and_bytes']:9.2f} "
            f"{share['lowered_and_bytes']:20.2f}"
        )
    print("cohort      seconds (min to max)     over: sum of its levels   evenly   FedAvg")
    for name, row in result["mixtures"].items():
        t = row["measured_seconds"]
        print(
            f"{name:10} {t['median']:8.3f} ({t['min']:.3f} to {t['max']:.3f}) "
            f"{row['ratio_to_sum_of_levels']:22.2f} {row['ratio_to_sum_of_levels_evenly']:10.2f}"
            f" {row['ratio_to_fedavg']:8.2f}"
        )


if __name__ == "__main__":
    main()
