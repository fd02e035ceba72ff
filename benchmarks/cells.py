"""The measurements of `benchmarks.accelerator`: reads cells from stdin, one per line, and answers.

A cell is a dictionary with the `kind`, a function of this file, and its arguments. An answer has a
`result` or an `error`. Images are generated, so no data set is needed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import fedlp_jax as fl
from benchmarks import aggregate, hetero, parts, peaks, scaling, step
from benchmarks.machine import machine
from benchmarks.timing import rounds_of, spread
from benchmarks.workloads import WORKLOADS

_SECONDS = 4.0  # of timed rounds, but at least _LEAST of them and at most _MOST
_LEAST, _MOST = 3, 20
_READING, _TOGETHER = 0.5, 50  # seconds of a reading, and the most rounds in it


def main() -> None:
    """Answers until stdin ends."""
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    fl.setup()
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")


def answer(cell: dict[str, Any]) -> dict[str, Any]:
    """The result of a cell, or its error as a sentence."""
    arguments = {name: value for name, value in cell.items() if name != "kind"}
    try:
        return {"result": KINDS[cell["kind"]](**arguments)}
    except Exception as error:
        message = (str(error).splitlines() or [""])[0][:300]
        return {"error": f"{type(error).__name__}: {message}"}


def environment() -> dict[str, Any]:
    """Where this runs."""
    memory = jax.devices()[0].memory_stats() or {}  # a CPU has none
    return machine() | {"device_memory_bytes": memory.get("bytes_limit")}


def peak(precision: str, smoke: bool = False) -> dict[str, float]:
    """Operations per second of matrix products on all devices."""
    return {"flop_per_second": peaks.flops(len(jax.devices()), precision, smoke)}


def bandwidth(smoke: bool = False) -> dict[str, float]:
    """Bytes per second of a pass over a large vector on all devices."""
    return {"bytes_per_second": peaks.bandwidth(len(jax.devices()), smoke)}


def rounds(
    workload: str,
    steps: int,
    cohort: int | None = None,
    width: int | None = None,
    precision: str = "default",
    dtype: str | None = None,
) -> dict[str, Any]:
    """Rounds in which all clients of a population take part.

    A reading covers about half a second of consecutive rounds; each is laid out while the one
    before runs, as in `simulate`.

    Args:
      workload: name; sets model, optimizer and batches.
      steps: S, of each client in a round.
      cohort: C, and the size of the population; None = the workload's.
      width: W; None = the default.
      precision: of matrix products.
      dtype: of activations; None = float32.
    """
    clients = cohort or WORKLOADS[workload].cohort
    chosen = dataclasses.replace(
        WORKLOADS[workload],
        data="synthetic",
        clients=clients,
        cohort=clients,
        per_client=steps * WORKLOADS[workload].batch_size,
        dtype=dtype,
    )
    with jax.default_matmul_precision(precision):
        once = rounds_of(chosen, fl.Plan(width=width))
        cost = step.cost(
            parts.module(chosen), parts.optimizer(chosen), chosen.image, chosen.batch_size
        )
    begin = time.perf_counter()
    first = once()
    together = max(1, min(_TOGETHER, int(_READING / once())))
    times: list[float] = []
    while len(times) < _LEAST or (time.perf_counter() - begin < _SECONDS and len(times) < _MOST):
        times.append(once(range(1, together + 1)) / together)
    per_step = spread(times, 1 / chosen.client_steps)
    memory = once.run.program.round.memory_analysis()
    plan = once.run.plan
    return {
        "plan": {"devices": plan.devices, "width": plan.width},
        "compile_seconds": once.compile_seconds,
        "first_round_seconds": first,
        "rounds_a_reading": together,
        "measured_seconds": spread(times),
        "measured_ms_per_client_step": {k: 1e3 * v for k, v in per_step.items()},
        "flop_per_second": {
            "written": cost.written / per_step["median"],
            "lowered": cost.lowered / per_step["median"],
        },
        "compiled_bytes": {
            "arguments": memory.argument_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
        },
    }


def masked_mean(model: str, cohort: int) -> dict[str, Any]:
    """The masked mean next to a copy of the same memory."""
    return aggregate.measure(*aggregate.models()[model], cohort, repeats=3)


def levels(model: str, steps: int) -> dict[str, Any]:
    """FedLP-Hetero against the sum of its levels."""
    if model == "stairs":
        return hetero.measure(hetero.Stairs(), (8, 8, 1), steps, "reset_to_init", 3)
    module = fl.models.FedLPCNN(num_classes=10, init="pytorch")
    # Persistent heads of that many clients would fill a small device.
    return hetero.measure(module, (32, 32, 3), steps, "reset_to_init", 2)


def population(clients: int) -> list[dict[str, Any]]:
    """A round of 100 clients out of 1,000 and out of many."""
    return scaling.population(1_000, clients, repeats=5)


def fill(gibibytes: int) -> dict[str, int]:
    """Allocates memory; if there is not enough, only this cell fails."""
    return {"bytes": jnp.zeros(gibibytes * 2**28, jnp.float32).block_until_ready().nbytes}


KINDS: dict[str, Callable[..., Any]] = {
    "environment": environment,
    "peak": peak,
    "bandwidth": bandwidth,
    "rounds": rounds,
    "masked mean": masked_mean,
    "levels": levels,
    "population": population,
    "fill": fill,
}


if __name__ == "__main__":
    main()
