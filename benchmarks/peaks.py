"""The best that the hardware does, measured: float operations and memory traffic per second."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from fedlp_jax.types import Array

_SECONDS, _SMOKE_SECONDS = 0.3, 0.01  # of a reading
_READINGS = 3
_SIZES = {"cpu": (512, 1024, 2048)}
_ACCELERATOR_SIZES = (2048, 4096, 8192)
_MEBIBYTES = {"cpu": 256}  # well above any cache
_ACCELERATOR_MEBIBYTES = 2048


def flops(devices: int, precision: str = "float32", smoke: bool = False) -> float:
    """The highest rate of float operations in products of square matrices, one on each device.

    Args:
      devices: number that work at once.
      precision: of the products: "float32" or "tensorfloat32", as in
        `jax_default_matmul_precision`; or "bfloat16", which also stores the matrices so. A CPU
        computes all of them in float32.
      smoke: one small product.

    Returns:
      Operations per second of all these devices; a multiply-accumulate counts two.
    """
    if smoke:
        return _product(devices, 64, precision, _SMOKE_SECONDS)
    sizes = _SIZES.get(jax.default_backend(), _ACCELERATOR_SIZES)
    return max(_product(devices, size, precision, _SECONDS) for size in sizes)


def bandwidth(devices: int, smoke: bool = False) -> float:
    """The highest rate of bytes read and written by adding one to a large vector in place."""
    mebibytes = _MEBIBYTES.get(jax.default_backend(), _ACCELERATOR_MEBIBYTES)
    elements = (1 if smoke else mebibytes) * 2**20 // 4 // devices
    program, put = _on_each(devices, lambda x: x + 1, donate=True)
    x = put(np.zeros(elements, np.float32))
    return 2 * x.nbytes / _least(program, x, _SMOKE_SECONDS if smoke else _SECONDS)


def _product(devices: int, size: int, precision: str, seconds: float) -> float:
    matrix = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    with jax.default_matmul_precision(precision):
        # As many columns as rows, of unit length: repeated products neither grow nor vanish.
        program, put = _on_each(devices, lambda x, y: x @ y)
        x = put(matrix / np.float32(math.sqrt(size)))
        if precision == "bfloat16" and jax.default_backend() != "cpu":
            x = x.astype(jnp.bfloat16)
        return devices * 2 * size**3 / _least(lambda y: program(x, y), x, seconds)


def _on_each(
    devices: int, function: Callable[..., Array], donate: bool = False
) -> tuple[Any, Callable[[np.ndarray], Array]]:
    """The function on each device's own arrays, and a function that gives every device an array."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("d",), axis_types=(AxisType.Auto,))

    def own(*arrays: Array) -> Array:
        return function(*(x[0] for x in arrays))[None]

    program = jax.jit(
        jax.shard_map(own, mesh=mesh, in_specs=Spec("d"), out_specs=Spec("d")),
        donate_argnums=(0,) if donate else (),
    )

    def put(x: np.ndarray) -> Array:
        return jax.device_put(
            np.broadcast_to(x, (devices, *x.shape)), NamedSharding(mesh, Spec("d"))
        )

    return program, put


def _least(step: Callable[[Array], Array], x: Array, seconds: float) -> float:
    """Shortest time of a step that is repeated on its own result, over readings of `seconds`."""
    x = step(x).block_until_ready()  # compiles
    start = time.perf_counter()
    x = step(x).block_until_ready()
    loops = max(1, int(seconds / (time.perf_counter() - start)))
    readings = []
    for _ in range(_READINGS):
        start = time.perf_counter()
        for _ in range(loops):
            x = step(x)
        x.block_until_ready()
        readings.append((time.perf_counter() - start) / loops)
    return min(readings)
