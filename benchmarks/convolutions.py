"""Every lowering of 3 x 3 convolutions by shape, and the table that `auto` chooses from.

    python -m benchmarks.convolutions [--json FILE] [--write] [--smoke]

Times a convolution with both its gradients, in a loop on all devices at once, as clients train:
one client per device on a CPU, and the default number of vmapped clients on an accelerator.
`--write` puts the times of this backend into the package's table.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as Spec

import fedlp_jax as fl
from benchmarks import command
from benchmarks.machine import machine
from fedlp_jax.execution.plan import resolve
from fedlp_jax.nn.conv import conv_general_dilated
from fedlp_jax.types import Array

_LOWERINGS = ("patches", "winograd_4x4")
_CHANNELS = ((3, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128))
_SIZES = (8, 16, 32)
_BATCH = 10
_TABLE = Path(fl.__file__).parent / "nn" / "conv" / "table.json"
_TARGET_SECONDS = 0.15  # of a turn


class Convolution(NamedTuple):
    """A 3 x 3 convolution of stride 1 with zero padding, of one client."""

    size: int  # height and width
    channels: int
    features: int


def main() -> None:
    """Measures all shapes."""
    parser = command.parser(__doc__)
    parser.add_argument("--write", action="store_true", help="update the package's table")
    options = parser.parse_args()
    fl.setup()
    shapes = [Convolution(size, *channels) for size in _SIZES for channels in _CHANNELS]
    width = resolve(None, 10**6).width or 1  # clients vmapped at once: one on a CPU
    rows = []
    for shape in [Convolution(8, 3, 32)] if options.smoke else shapes:
        times = measure(shape, _LOWERINGS, 2 if options.smoke else 5, width)
        pixels = _BATCH * shape.size**2
        row = {"pixels": pixels, "channels": shape.channels, "features": shape.features}
        rows.append(row | {"milliseconds": times})
        print(json.dumps(rows[-1]), flush=True)
    result = {"backends": {jax.default_backend(): rows}} | machine()
    if options.json:
        command.save(options.json, result)
    if options.write:
        result["backends"] = json.loads(_TABLE.read_text())["backends"] | result["backends"]
        _TABLE.write_text(json.dumps(result, indent=1) + "\n")


def measure(
    convolution: Convolution, lowerings: Sequence[str], repeats: int, width: int
) -> dict[str, float]:
    """Median milliseconds of a convolution with both its gradients; the lowerings take turns.

    Args:
      convolution: its shape.
      lowerings: "patches", "winograd_4x4" or both.
      repeats: timed turns of each.
      width: W, clients vmapped; the time is that of all of them.
    """
    programs = {name: _program(name, convolution, width) for name in lowerings}
    loops = {name: _loops(program) for name, program in programs.items()}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            times[name].append(1e3 * _seconds(program, loops[name]) / loops[name])
    return {name: float(f"{statistics.median(t):.4g}") for name, t in times.items()}


def _loops(program: Callable[[int], None]) -> int:
    """Repetitions that fill a turn, at least three."""
    loops, took = 3, _seconds(program, 3)
    while took < _TARGET_SECONDS / 4:  # too short to extrapolate
        loops *= 4
        took = _seconds(program, loops)
    return max(3, int(_TARGET_SECONDS * loops / took))


def _seconds(program: Callable[[int], None], loops: int) -> float:
    start = time.perf_counter()
    program(loops)
    return time.perf_counter() - start


def _program(name: str, convolution: Convolution, width: int) -> Callable[[int], None]:
    """A function that repeats the convolution of W clients on each device."""
    devices = len(jax.devices())
    mesh = jax.make_mesh((devices,), ("d",), axis_types=(AxisType.Auto,))

    def convolve(x: Array, kernel: Array) -> Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=numbers, lowering=name
        )

    def step(_: Array, carry: Any) -> Any:
        x, kernel = carry
        y, transpose = jax.vjp(convolve, x, kernel)
        dx, d_kernel = transpose(jax.nn.relu(y))
        return x - 1e-6 * dx, kernel - 1e-6 * d_kernel

    if width > 1:
        step = jax.vmap(step, (None, 0))

    def stream(x: Array, kernel: Array, loops: Array) -> tuple[Array, Array]:
        x, kernel = jax.lax.fori_loop(0, loops[0], step, (x[0], kernel[0]))
        return x[None], kernel[None]

    specs = (Spec("d"), Spec("d"), Spec())
    program = jax.jit(
        jax.shard_map(stream, mesh=mesh, in_specs=specs, out_specs=Spec("d"), check_vma=False)
    )
    rng = np.random.default_rng(0)
    lead = (devices, width) if width > 1 else (devices,)
    size, channels, features = convolution
    x = rng.normal(size=(*lead, _BATCH, size, size, channels)).astype(np.float32)
    kernel = rng.normal(size=(*lead, 3, 3, channels, features)).astype(np.float32)
    kernel *= np.float32(0.05)

    def run(loops: int) -> None:
        jax.block_until_ready(program(x, kernel, jnp.array([loops])))

    run(1)
    return run


if __name__ == "__main__":
    main()
