"""Every lowering of 3 x 3 convolutions by shape, and the table that `auto` chooses from.

    python -m benchmarks.convolutions [--json FILE] [--write] [--smoke]

A convolution with both its gradients, repeated in a loop on every device at once, as clients train.
`--write` puts the times of this backend into the package's own table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as Spec

import fedlp_jax as fl
from benchmarks.machine import machine
from fedlp_jax.conv import conv_general_dilated
from fedlp_jax.types import Array

_LOWERINGS = (
    "patches",
    "winograd_1x2",
    "winograd_1x4",
    "winograd_4x1",
    "winograd_2x2",
    "winograd_4x4",
)
_CHANNELS = ((3, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128))
_SIZES = (8, 16, 32)
_BATCH = 10
_TABLE = Path(fl.__file__).parent / "conv" / "table.json"
_TARGET_SECONDS = 0.15


def main() -> None:
    """Measures all shapes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--write", action="store_true", help="into the package's table")
    parser.add_argument("--smoke", action="store_true", help="one small shape")
    options = parser.parse_args()
    fl.setup()
    shapes = [(size, *channels) for size in _SIZES for channels in _CHANNELS]
    rows = []
    for size, channels, features in [(8, 3, 32)] if options.smoke else shapes:
        times = measure(size, channels, features, repeats=2 if options.smoke else 5)
        row = {"pixels": _BATCH * size * size, "channels": channels, "features": features}
        rows.append(row | {"milliseconds": times})
        print(json.dumps(rows[-1]), flush=True)
    result = {"backends": {jax.default_backend(): rows}} | machine()
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    if options.write:
        if _TABLE.exists():
            result["backends"] = json.loads(_TABLE.read_text())["backends"] | result["backends"]
        _TABLE.write_text(json.dumps(result, indent=1) + "\n")


def measure(size: int, channels: int, features: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of a convolution with its gradients, contenders taking turns."""
    programs = {name: _program(name, size, channels, features) for name in _LOWERINGS}
    flops = 3 * 2 * _BATCH * size * size * 9 * channels * features
    loops = max(3, int(_TARGET_SECONDS * 5e10 / flops))
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(repeats + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            program(loops)
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start) / loops)
    return {name: round(statistics.median(t), 4) for name, t in times.items()}


def _program(name: str, size: int, channels: int, features: int) -> Callable[[int], None]:
    """A function of a number of repetitions, one stream on each device."""
    mesh = jax.make_mesh((len(jax.devices()),), ("d",), axis_types=(AxisType.Auto,))

    def step(_: Array, carry: Any) -> Any:
        x, kernel = carry
        convolve = lambda x, k: conv_general_dilated(  # noqa: E731
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), lowering=name
        )
        y, transpose = jax.vjp(convolve, x, kernel)
        dx, d_kernel = transpose(jax.nn.relu(y))
        return x - 1e-6 * dx, kernel - 1e-6 * d_kernel

    def stream(x: Array, kernel: Array, loops: Array) -> tuple[Array, Array]:
        x, kernel = jax.lax.fori_loop(0, loops[0], step, (x[0], kernel[0]))
        return x[None], kernel[None]

    program = jax.jit(
        jax.shard_map(
            stream,
            mesh=mesh,
            in_specs=(Spec("d"), Spec("d"), Spec()),
            out_specs=Spec("d"),
            check_vma=False,
        )
    )
    rng = np.random.default_rng(0)
    devices = len(jax.devices())
    x = rng.normal(size=(devices, _BATCH, size, size, channels)).astype(np.float32)
    kernel = rng.normal(size=(devices, 3, 3, channels, features)).astype(np.float32) * 0.05

    def run(loops: int) -> None:
        jax.block_until_ready(program(x, kernel, jnp.array([loops])))

    run(1)
    return run


if __name__ == "__main__":
    main()
