"""This package, and a first try in JAX."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

import fedlp_jax as fl
from benchmarks import parts, stage, workloads
from fedlp_jax.nn import conv
from fedlp_jax.types import Array


class _Jax:
    """Common to both contenders."""

    def peak_device_mb(self) -> float | None:
        """Of the first device; None on a CPU."""
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        return None if peak is None else peak / 2**20


class Ours(_Jax):
    """`fl.Simulation`, which is what `simulate` runs, without evaluation."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        fl.setup(settings.get("devices"))
        self.plan = fl.Plan(settings.get("devices"), settings.get("width"))
        self.folder = folder
        self.workload = workloads.read(folder)
        self.data = parts.dataset(self.workload)
        self.algorithm = parts.algorithm(self.workload)
        clients = parts.partition(self.workload, self.data)
        self.run = fl.Simulation(
            self.algorithm,
            self.data,
            clients,
            rounds=10**6,
            cohort=self.workload.cohort,
            plan=self.plan,
        )
        self.run.compile()
        self.compile_seconds = sum(
            self.run.readings[f"round_{part}_seconds"] for part in ("trace", "lowering", "compile")
        )

    def check(self) -> dict[str, np.ndarray]:
        """The weights after a few steps of one client, in float64."""
        with jax.enable_x64(True):
            run = fl.simulate(
                self.algorithm,
                self.data,
                stage.check_partition(self.workload, self.data),
                rounds=1,
                cohort=lambda *_: [0],
                plan=fl.Plan(devices=1, width=1),
                variables=_float64(_initial(self.folder)),
            )
            return _flat(run.variables)

    def round(self, number: int) -> float:
        """Seconds of a round."""
        start = time.perf_counter()
        self.run.read(self.run.dispatch(number))
        return time.perf_counter() - start


class Naive(_Jax):
    """`vmap(scan)` over clients and steps with `lax.conv`, a stack of models, then their mean."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.workload = workloads.read(folder)
        # Computed steps of each client; on a CPU, convolutions are too slow for all of them.
        self.steps = min(settings.get("steps", self.workload.steps), self.workload.steps)
        data = parts.dataset(self.workload)
        gain, shift = data.normalize
        inputs, labels = jnp.asarray(data.train.inputs), jnp.asarray(data.train.labels)
        self.rows = np.load(folder / "rows.npy")
        self.order = np.load(folder / "check.npy")
        self.variables = _initial(folder)
        apply = _plain_apply(parts.module(self.workload))
        optimizer = parts.optimizer(self.workload)

        def train(variables: Any, rows: Array) -> Any:
            def step(carry: Any, rows: Array) -> Any:
                (params, stats), state = carry

                def loss(params: Any) -> Any:
                    dtype = jax.tree.leaves(params)[0].dtype
                    x = inputs[rows].astype(dtype) * gain.astype(dtype) + shift.astype(dtype)
                    logits, new = apply({"params": params, **stats}, x)
                    each = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
                    return each.mean(), new

                gradient, stats = jax.grad(loss, has_aux=True)(params)
                updates, state = optimizer.update(gradient, state, params)
                return ((optax.apply_updates(params, updates), stats), state), None

            stats = {k: v for k, v in variables.items() if k != "params"}
            carry = ((variables["params"], stats), optimizer.init(variables["params"]))
            ((params, stats), _), _ = jax.lax.scan(step, carry, rows)
            return {"params": params, **stats}

        def one_round(variables: Any, rows: Array) -> Any:
            trained = jax.vmap(train, (None, 0))(variables, rows)
            return jax.tree.map(lambda x: x.mean(0), trained)

        start = time.perf_counter()
        self.program = jax.jit(one_round)
        self.train = jax.jit(train)
        jax.block_until_ready(self.program(self.variables, self._rows(0)))
        self.compile_seconds = time.perf_counter() - start

    def compiled(self) -> Any:
        """The executable of a round."""
        return self.program.lower(self.variables, self._rows(0)).compile()

    def check(self) -> dict[str, np.ndarray]:
        """The weights after a few steps of one client, in float64."""
        rows = self.order.reshape(-1, self.workload.batch_size)
        with jax.enable_x64(True):
            return _flat(self.train(_float64(self.variables), rows))

    def round(self, number: int) -> float:
        """Seconds of a whole round, extrapolated from the computed steps of each client."""
        rows = self._rows(number)
        start = time.perf_counter()
        self.variables = jax.block_until_ready(self.program(self.variables, rows))
        return (time.perf_counter() - start) * self.workload.steps / self.steps

    def _rows(self, number: int) -> Array:
        rng = np.random.default_rng(number)
        cohort = rng.choice(self.workload.clients, self.workload.cohort, replace=False)
        rows = self.rows[cohort, : self.steps * self.workload.batch_size]
        return jnp.asarray(rows.reshape(len(cohort), self.steps, self.workload.batch_size))


def _initial(folder: Path) -> Any:
    with np.load(folder / "initial.npz") as file:
        return unflatten_dict({tuple(k.split("/")): file[k] for k in file})


def _float64(variables: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), variables)


def _flat(variables: Any) -> dict[str, np.ndarray]:
    return {"/".join(path): np.asarray(x) for path, x in flatten_dict(variables).items()}


def _plain_apply(module: Any) -> Any:
    """Applies a flax module with `lax.conv`, also for the models of this package."""

    def apply(variables: Any, x: Array) -> Any:
        with conv.using("direct"):
            return module.apply(variables, x, train=True, mutable=["batch_stats"])

    return apply
