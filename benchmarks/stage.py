"""The files that all contenders read: images, partition, initial weights, an order for the check.

A contender reads arrays, so it needs nothing of the package.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

import fedlp_jax as fl
from benchmarks import parts, workloads
from benchmarks.workloads import Workload
from fedlp_jax.data.batching import shuffled_rows
from fedlp_jax.prng import Purpose, client_key

CHECK_STEPS = 5  # rounding in float32 grows about tenfold a step


def write(workload: Workload, folder: Path) -> None:
    """Writes everything that a contender needs."""
    data = parts.dataset(workload)
    clients = parts.partition(workload, data)
    run = fl.simulate(parts.algorithm(workload), data, clients, rounds=0, cohort=1)
    initial = {"/".join(path): np.asarray(x) for path, x in flatten_dict(run.variables).items()}
    few = check_partition(workload, data)
    key = client_key(jax.random.key(0), 1, 0, Purpose.SHUFFLE)
    order = shuffled_rows(
        jax.random.fold_in(key, 0), few.rows(0), few.sizes[0], workload.batch_size
    )
    np.save(folder / "inputs.npy", data.train.inputs)
    np.save(folder / "labels.npy", data.train.labels)
    np.save(folder / "normalize.npy", np.stack([np.broadcast_to(n, (3,)) for n in data.normalize]))
    np.save(folder / "rows.npy", np.stack([clients.rows(k) for k in range(clients.clients)]))
    np.save(folder / "check.npy", np.asarray(order))
    np.savez(folder / "initial.npz", **initial)
    workloads.write(folder, workload)


def check_partition(workload: Workload, data: fl.Dataset) -> fl.Partition:
    """Clients of at most five batches; the first of them trains alone in the check."""
    size = min(CHECK_STEPS * workload.batch_size, workload.per_client)
    return fl.partition.iid(data.train.labels, clients=len(data.train.labels) // size, seed=0)
