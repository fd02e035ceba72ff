"""Times of the forms of a convolution, measured as clients train: in a loop on every device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as Spec

from fedlp_jax.nn.conv.general import conv_general_dilated
from fedlp_jax.nn.conv.lowering import PATCHES, WINOGRAD, Convolution
from fedlp_jax.nn.conv.winograd import supported
from fedlp_jax.types import Array

# Of the Winograd forms, those that were the quickest somewhere.
FORMS = (
    PATCHES,
    "winograd_1x2",
    "winograd_1x4",
    "winograd_4x1",
    "winograd_2x2",
    "winograd_4x4",
)
_SECONDS = 0.15  # a turn


def forms_of(convolution: Convolution) -> list[str]:
    """The forms that can compute it; only `patches` where there is nothing to choose."""
    lhs, rhs = _arrays(convolution)
    return [
        name
        for name in FORMS
        if name == PATCHES or supported(lhs, rhs, convolution.window, WINOGRAD[name])
    ]


def measure(
    convolution: Convolution,
    forms: Sequence[str],
    repeats: int = 5,
    seconds: float = _SECONDS,
    width: int = 1,
) -> dict[str, float]:
    """Median milliseconds of a convolution with both its gradients, contenders taking turns.

    Args:
      convolution: its shapes and window, of one client.
      forms: "patches" and Winograd forms.
      repeats: turns of each form that count.
      seconds: about as long a turn is.
      width: W, clients vmapped; the time is that of all of them.
    """
    programs = {name: _program(name, convolution, width) for name in forms}
    loops = {name: _loops(program, seconds) for name, program in programs.items()}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            times[name].append(1e3 * _seconds(program, loops[name]) / loops[name])
    # Not rounded to nothing, whatever the device.
    return {name: float(f"{statistics.median(t):.4g}") for name, t in times.items()}


def _loops(program: Callable[[int], None], seconds: float) -> int:
    """Repetitions that take about so long, three at least."""
    loops, took = 3, _seconds(program, 3)
    while took < seconds / 4:  # too short to tell
        loops *= 4
        took = _seconds(program, loops)
    return max(3, int(seconds * loops / took))


def _seconds(program: Callable[[int], None], loops: int) -> float:
    start = time.perf_counter()
    program(loops)
    return time.perf_counter() - start


def _arrays(convolution: Convolution) -> tuple[Any, Any]:
    """Input and kernel, by shape alone."""
    lhs, rhs, _ = convolution
    return jax.ShapeDtypeStruct(lhs, jnp.float32), jax.ShapeDtypeStruct(rhs, jnp.float32)


def _program(name: str, convolution: Convolution, width: int) -> Callable[[int], None]:
    """A function of a number of repetitions, of W clients on each device."""
    lhs, rhs, window = convolution
    devices = len(jax.devices())
    mesh = jax.make_mesh((devices,), ("d",), axis_types=(AxisType.Auto,))

    def convolve(x: Array, kernel: Array) -> Array:
        return conv_general_dilated(
            x,
            kernel,
            window.strides,
            window.pads,
            rhs_dilation=window.dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            lowering=name,
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
    lead = (devices, width) if width > 1 else (devices,)
    x = rng.normal(size=(*lead, *lhs)).astype(np.float32)
    kernel = rng.normal(size=(*lead, *rhs)).astype(np.float32) * np.float32(0.05)

    def run(loops: int) -> None:
        jax.block_until_ready(program(x, kernel, jnp.array([loops])))

    run(1)
    return run
