"""The best that the hardware does, and the share of it that a client-step reaches.

    python -m benchmarks.roofline [--workload W1|W2|W3|W4|all] [--json FILE] [--smoke]

Measured in one run: the highest rate of float32 operations in matrix products, with one device at
work (on a CPU it may use all cores) and with all of them; the highest rate of bytes in a pass over
a large vector; and rounds of each workload. A client-step is one optimizer step of one client.

Three numbers of a client-step are modelled: its operations as written (a multiply-accumulate is
two; convolutions counted directly, forward and both gradients), its operations as lowered (in the
Winograd forms, with everything that is not a product), and its memory traffic without a cache.
"share written" may exceed what the hardware can do, because Winograd forms multiply less; "share
lowered" may not. The two floors are the step's time at the peak and at the bandwidth; a model that
fits into a cache runs faster than its memory floor.
"""

from __future__ import annotations

from typing import Any

import jax

import fedlp_jax as fl
from benchmarks import command, parts, peaks, step
from benchmarks.timing import alternate, rounds_of, spread
from benchmarks.workloads import WORKLOADS, Workload, smoke


def main() -> None:
    """Runs it."""
    parser = command.parser(__doc__)
    parser.add_argument("--workload", choices=[*WORKLOADS, "all"], default="all")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of each workload")
    options = parser.parse_args()
    fl.setup()
    chosen = WORKLOADS if options.workload == "all" else {options.workload: None}
    workloads = {name: WORKLOADS[name] for name in chosen}
    repeats = options.repeats
    if options.smoke:
        workloads, repeats = {"W2": smoke(WORKLOADS["W2"])}, 1
    ceiling = ceilings(options.smoke)
    for name, value in ceiling.items():
        print(f"{name.replace('_', ' '):35} {value / 1e9:10.1f}")
    rows = share(workloads, ceiling, repeats)
    for name, row in rows.items():
        print(_line(name, row))
    command.write(options.json, {"ceilings": ceiling, "workloads": rows})


def ceilings(small: bool = False) -> dict[str, float]:
    """Measured: operations and bytes per second, of one device and of all."""
    devices = len(jax.devices())
    return {
        "one_device_flop_per_second": peaks.flops(1, smoke=small),
        "all_devices_flop_per_second": peaks.flops(devices, smoke=small),
        "one_device_bytes_per_second": peaks.bandwidth(1, small),
        "all_devices_bytes_per_second": peaks.bandwidth(devices, small),
    }


def share(
    workloads: dict[str, Workload], ceiling: dict[str, float], repeats: int
) -> dict[str, dict[str, Any]]:
    """The rate of each workload, and its share of the highest ceiling of this run."""
    peak, bandwidth = (
        max(ceiling[f"{which}_{unit}_per_second"] for which in ("one_device", "all_devices"))
        for unit in ("flop", "bytes")
    )
    times = alternate({name: rounds_of(w) for name, w in workloads.items()}, repeats)
    rows = {}
    for name, workload in workloads.items():
        per_step = spread(times[name], 1 / workload.client_steps)
        modelled = step.cost(
            parts.module(workload), parts.optimizer(workload), workload.image, workload.batch_size
        )
        seconds = per_step["median"]
        rows[name] = {
            "measured_ms_per_client_step": {k: 1e3 * v for k, v in per_step.items()},
            "modelled_flop": {"written": modelled.written, "lowered": modelled.lowered},
            "modelled_bytes": {
                "activations": modelled.activation_bytes,
                "parameters": modelled.parameter_bytes,
            },
            "flop_per_second_written": modelled.written / seconds,
            "share_of_peak": {
                "written": modelled.written / seconds / peak,
                "lowered": modelled.lowered / seconds / peak,
            },
            "floor_ms": {
                "products": 1e3 * modelled.lowered / peak,
                "memory": 1e3 * modelled.bytes / bandwidth,
            },
        }
    return rows


def _line(name: str, row: dict[str, Any]) -> str:
    times, shares, floors = (
        row[k] for k in ("measured_ms_per_client_step", "share_of_peak", "floor_ms")
    )
    return (
        f"{name}: {times['median']:.3f} ms a client-step ({times['min']:.3f} to "
        f"{times['max']:.3f}); share of peak {shares['written']:.0%} written, "
        f"{shares['lowered']:.0%} lowered; floors {floors['products']:.3f} ms at the peak, "
        f"{floors['memory']:.3f} ms at the bandwidth"
    )


if __name__ == "__main__":
    main()
