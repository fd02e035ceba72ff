"""The measurements of `benchmarks.accelerator`: reads cells from stdin, one per line, and answers.

A cell is a dictionary with the `kind`, a function of this file, and its arguments. An answer has a
`result` or an `error`. Images are generated, so no data set is needed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fedlp_jax as fl
from benchmarks import aggregate, hetero, kernels, parts, peaks, stage, step
from benchmarks.machine import machine
from benchmarks.timing import Rounds, alternate, spread
from benchmarks.workloads import WORKLOADS, Workload, made_up

_SECONDS = 4.0  # of timed rounds, but at least _LEAST of them and at most _MOST
_LEAST, _MOST = 3, 20
_READING, _TOGETHER = 0.5, 50  # seconds of a reading, and the most rounds in it
_BATCH = 10
_ROUNDING = 1e-2  # of the update, that few steps in float32 may differ by


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
    dtype: str | None = None,
    uneven: bool = False,
    flat: bool = False,
    rounds_at_once: int | None = None,
) -> dict[str, Any]:
    """Rounds in which all clients of a population take part.

    A reading covers about half a second of consecutive rounds; each is laid out while the one
    before runs, as in `simulate`. The first four are not timed: a GPU records its graphs in them.

    Args:
      workload: name; sets model, optimizer and batches.
      steps: S, of each client in a round, or their mean if `uneven`.
      cohort: C, and the size of the population; None = the workload's.
      width: W; None = the default.
      dtype: of activations; None = float32.
      uneven: clients differ in size, by Dirichlet(1).
      flat: the optimizer sees all parameters as one vector.
      rounds_at_once: of a dispatch; None = the default.
    """
    chosen = dataclasses.replace(_everybody(workload, steps, cohort), dtype=dtype, flat=flat)
    data = parts.dataset(chosen)
    clients = parts.partition(chosen, data)
    if uneven:
        clients = fl.partition.quantity(
            data.train.labels, clients=chosen.clients, alpha=1.0, seed=0, min_size=1
        )
    plan = fl.Plan(width=width, rounds_at_once=rounds_at_once)
    once = Rounds(parts.algorithm(chosen), data, clients, cohort=chosen.cohort, plan=plan)
    first = once()
    digests = [_digest(once) for _ in range(2)]
    together = max(1, min(_TOGETHER, int(_READING / once())))
    times = _readings(lambda: once(range(1, together + 1)) / together)
    client_steps = int((-(-clients.sizes // chosen.batch_size)).sum())
    program, plan = once.run.program, once.run.plan
    memory = program.round.memory_analysis()
    return _milliseconds(times, client_steps) | {
        "plan": {"devices": plan.devices, "width": plan.width},
        "compile_seconds": once.compile_seconds,
        "first_round_seconds": first,
        "rounds_a_reading": together,
        "written_flop": step.written(parts.module(chosen), chosen.image, chosen.batch_size),
        "step": kernels.described(program.round.as_text(), plan.width),
        "digest": digests[0],
        "digest_again": digests[1],
        "compiled_bytes": {
            "arguments": memory.argument_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
        },
    }


def naive(workload: str, steps: int, cohort: int | None = None) -> dict[str, Any]:
    """The same rounds as `vmap(scan)` with `lax.conv`."""
    from benchmarks.jax_contenders import Naive

    return _contender(Naive, {}, _everybody(workload, steps, cohort))


def torch_graphs(workload: str, steps: int, graphs: int) -> dict[str, Any]:
    """The same rounds in PyTorch, with so many CUDA graphs, each on its own stream."""
    from benchmarks.torch_cuda import TorchCuda

    return _contender(TorchCuda, {"graphs": graphs}, _everybody(workload, steps, None))


def equality(workload: str, steps: int = 3, cohort: int = 4) -> dict[str, float]:
    """A round of few steps here and on a CPU: their difference over the length of the update.

    Raises:
      ArithmeticError: they differ by more than rounding explains.
    """
    cell = {"kind": "update", "workload": workload, "steps": steps, "cohort": cohort}
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/cpu.npy"
        on_cpu = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.cells"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        assert on_cpu.stdin is not None
        on_cpu.stdin.write(json.dumps(cell | {"file": file}) + "\n")
        on_cpu.stdin.close()
        ours = _update(workload, steps, cohort)
        on_cpu.wait()
        theirs = np.load(file)
    return {"difference": apart(ours, theirs)}


def apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The difference of two updates over the length of the second, if rounding explains it."""
    difference = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    if not difference < _ROUNDING:
        raise ArithmeticError(
            f"the update differs from a CPU's by {difference:.2g} of its length, and "
            f"{_ROUNDING:g} is allowed: do not believe the times."
        )
    return difference


def update(workload: str, steps: int, cohort: int, file: str) -> dict[str, float]:
    """Writes what a round changes to a file."""
    change = _update(workload, steps, cohort)
    np.save(file, change)
    return {"length": float(np.linalg.norm(change))}


def sweep(workload: str, runs: int, rounds: int) -> dict[str, Any]:
    """So many seeds of a workload side by side, each with its own cohorts."""
    chosen = made_up(WORKLOADS[workload])
    data = parts.dataset(chosen)
    clients = parts.partition(chosen, data)
    settings: dict[str, Any] = {"seeds": runs, "rounds": rounds, "cohort": chosen.cohort}
    times = []
    for _ in range(1 + _LEAST):
        found = fl.sweep(parts.algorithm(chosen), data, clients, **settings).runs
        times.append(sum(run.readings["run_seconds"] for run in found))
    return _milliseconds(times[1:], runs * rounds * chosen.client_steps)  # the first compiles


def masked_mean(model: str, cohort: int) -> dict[str, Any]:
    """The masked mean next to a copy of the same memory."""
    return aggregate.measure(*aggregate.models()[model], cohort, repeats=3)


def mixed_depths(
    cohort: int, steps: int, levels: str = "in_turn", small: bool = False
) -> dict[str, Any]:
    """Rounds of FedLP-Hetero(1), in which all clients take part, against rounds of FedAvg.

    Args:
      cohort: C; 60% of them have depth 1.
      steps: S, of each client.
      levels: of the plan.
      small: a small network in place of the reference CNN.
    """
    module: Any = fl.models.FedLPCNN(num_classes=10, init="pytorch")
    module, image = (hetero.Stairs(), (8, 8, 1)) if small else (module, (32, 32, 3))
    counts = hetero.mixtures(module.depth, cohort)["Hetero(1)"]
    depths = np.repeat(np.arange(1, len(counts) + 1), counts)
    data = fl.load("synthetic", examples=cohort * steps * _BATCH, shape=image, num_classes=10)
    clients = fl.partition.iid(data.train.labels, clients=cohort, seed=0)
    task = fl.classification(module)
    local: dict[str, Any] = {"client_optimizer": optax.adam(1e-3), "batch_size": _BATCH}
    mixed = fl.fedlp_hetero(task, depths=depths, heads="reset_to_init", **local)
    contenders = {
        "fedavg": Rounds(fl.fedavg(task, **local), data, clients, cohort=cohort),
        "hetero": Rounds(mixed, data, clients, cohort=cohort, plan=fl.Plan(levels=levels)),
    }
    for once in contenders.values():
        for _ in range(2):  # a GPU records its graphs
            once()
    times = alternate(contenders, repeats=4)
    seconds = {name: spread(of_one) for name, of_one in times.items()}
    return {
        "plan": dataclasses.asdict(contenders["hetero"].run.plan),
        "measured_seconds": seconds,
        "compile_seconds": {name: once.compile_seconds for name, once in contenders.items()},
        "ratio_to_fedavg": seconds["hetero"]["median"] / seconds["fedavg"]["median"],
    }


def fill(gibibytes: int) -> dict[str, int]:
    """Allocates memory; if there is not enough, only this cell fails."""
    return {"bytes": jnp.zeros(gibibytes * 2**28, jnp.float32).block_until_ready().nbytes}


def _everybody(workload: str, steps: int, cohort: int | None) -> Workload:
    """A workload of generated images whose whole population takes part, S steps each."""
    chosen = WORKLOADS[workload]
    clients = cohort or chosen.cohort
    return dataclasses.replace(
        made_up(chosen), clients=clients, cohort=clients, per_client=steps * chosen.batch_size
    )


def _update(workload: str, steps: int, cohort: int) -> np.ndarray:
    """What a round changes, as one vector; products are in float32."""
    chosen = _everybody(workload, steps, cohort)
    data = parts.dataset(chosen)
    clients = parts.partition(chosen, data)
    with jax.default_matmul_precision("float32"):
        once = Rounds(parts.algorithm(chosen), data, clients, cohort=cohort)
        start = jax.device_get(once.run.state.variables)
        once((1,))
    change = jax.tree.map(np.subtract, jax.device_get(once.run.state.variables), start)
    return np.concatenate([x.ravel() for x in jax.tree.leaves(change)])


def _contender(make: Any, settings: dict[str, Any], chosen: Workload) -> dict[str, Any]:
    """Times whole rounds of another implementation."""
    with tempfile.TemporaryDirectory() as folder:
        stage.write(chosen, Path(folder))
        contender = make(Path(folder), settings)
        numbers = itertools.count(1)
        for _ in range(2):  # PyTorch captures in the first
            contender.round(next(numbers))
        times = _readings(lambda: contender.round(next(numbers)))
    return _milliseconds(times, chosen.client_steps) | {
        "compile_seconds": contender.compile_seconds
    }


def _readings(once: Callable[[], float]) -> list[float]:
    """Seconds of each call, for some seconds."""
    begin, times = time.perf_counter(), list[float]()
    while len(times) < _LEAST or (time.perf_counter() - begin < _SECONDS and len(times) < _MOST):
        times.append(once())
    return times


def _milliseconds(times: list[float], client_steps: int) -> dict[str, Any]:
    return {
        "measured_seconds": spread(times),
        "measured_ms_per_client_step": spread(times, 1e3 / client_steps),
    }


def _digest(once: Rounds) -> str:
    """Of the model after the first round."""
    once((1,))
    leaves = jax.tree.leaves(jax.device_get(once.run.state.variables))
    return hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()[:16]


KINDS: dict[str, Callable[..., Any]] = {
    "environment": environment,
    "peak": peak,
    "bandwidth": bandwidth,
    "rounds": rounds,
    "naive": naive,
    "torch graphs": torch_graphs,
    "equality": equality,
    "update": update,
    "sweep": sweep,
    "masked mean": masked_mean,
    "mixed depths": mixed_depths,
    "fill": fill,
}


if __name__ == "__main__":
    main()
