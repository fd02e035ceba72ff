"""Whether a round fits the memory of its devices, asked of the compiled program itself."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fedlp_jax.errors import FedLPError
from fedlp_jax.execution import processes as hosts
from fedlp_jax.execution.client_state import rows_at_once
from fedlp_jax.execution.map_clients import DEVICE, HOST, Plan
from fedlp_jax.execution.packing import room, room_bytes, size_bytes
from fedlp_jax.execution.scheduling import slots_per_device
from fedlp_jax.pruning.submodels import Submodel

_USABLE = 0.9  # of what is free: allocators need slack, and other programs breathe
_CGROUP = Path("/sys/fs/cgroup")


def with_place(plan: Plan, train_bytes: int, test_bytes: int) -> Plan:
    """Says where the training split lies, if the plan does not: on the devices if it fits there.

    Args:
      plan: resolved.
      train_bytes: of the training split.
      test_bytes: of the test split, which lies on every device.

    Raises:
      FedLPError: what must lie on every device does not fit, with both sizes.
    """
    free = _least_free(plan)
    if free is None or train_bytes + test_bytes <= free:
        return dataclasses.replace(plan, data=plan.data or DEVICE)
    here = f"each of {plan.devices} device(s), where {_size(free)} are free"
    if test_bytes > free:
        raise FedLPError(f"the test split takes {_size(test_bytes)} on {here}; use fewer examples.")
    if plan.data == DEVICE:
        raise FedLPError(
            f"the data take {_size(train_bytes + test_bytes)} on {here}; set plan.data to host, or "
            "leave it open."
        )
    return dataclasses.replace(plan, data=HOST)


def check_private(
    levels: Sequence[Submodel], assigned: np.ndarray, cohort: int, plan: Plan, beside: int
) -> int:
    """Refuses private variables that do not fit the devices, each of which keeps everyone's.

    Args:
      levels: G levels.
      assigned: `i32[K]`, level of each client.
      cohort: C.
      plan: resolved.
      beside: bytes of what else is going to lie on each device: the data and the model.

    Returns:
      Modelled bytes on each device: the store, the rows of its slots, which a round changes, and
      those that are handed round afterwards at once, a device's own block and that of each.

    Raises:
      FedLPError: with both sizes.
    """
    shapes = [level.private_shapes for level in levels]
    row = room_bytes(room(shapes))
    per_client = [size_bytes(heads) for heads in shapes]
    store = int(np.dot(per_client, np.bincount(assigned, minlength=len(levels))))
    devices = plan.devices or 1
    slots = slots_per_device(cohort, devices)
    handed = (devices + 1) * rows_at_once(slots, row)
    need = store + (slots + handed) * row
    free = _least_free(plan)
    if free is not None and need + beside > free:
        raise FedLPError(
            f"heads='persist' keeps {_size(store)} for {len(assigned)} clients, and takes "
            f"{_size(need)} on each of {devices} device(s), where {_size(free)} are free and data "
            f"and model take {_size(beside)}; use heads='shared' or 'reset_to_init', or fewer "
            "clients."
        )
    return need


def compile_to_fit(
    compile: Callable[[Plan], Any], plan: Plan, width_is_open: bool, beside: int = 0
) -> tuple[Any, Plan]:
    """Compiles a round, with fewer clients side by side if it needs more memory than is free.

    Args:
      compile: plan -> compiled program. Its arguments are on the devices already, but for
        those of `beside`.
      plan: resolved.
      width_is_open: whether the width may be lowered; if it was asked for, what does not fit is
        refused, with a width that does.
      beside: bytes of what each device is given for a round and, while that runs, for the next one.

    Returns:
      The program, and the plan it is for.

    Raises:
      FedLPError: with both sizes, and what to do.
    """
    program = compile(plan)
    free, asked = _least_free(plan), needed_bytes(program)
    free = None if free is None else max(free - beside, 0)
    if free is None or asked is None or asked <= free:
        return program, plan
    need, fitting = asked, plan
    while need > free and (fitting.width or 1) > 1:
        width = fitting.width or 1
        # At least half as wide; memory that does not depend on the width makes this a guess.
        width = max(min(width // 2, width * free // need), 1)
        fitting = dataclasses.replace(fitting, width=width)
        program = compile(fitting)
        need = needed_bytes(program) or 0
    sizes = (
        f"needs {_size(asked)} on each of {plan.devices} device(s), where {_size(free)} are free"
    )
    if need > free:
        raise FedLPError(
            f"a round {sizes}, and {_size(need)} with one client at a time; use a smaller batch or "
            f"model{', or fewer devices' if jax.default_backend() == 'cpu' else ''}"
            f"{'' if plan.data == HOST else ', or set plan.data to host'}."
        )
    if not width_is_open:
        raise FedLPError(
            f"a round of width {plan.width} {sizes}; width {fitting.width} fits, with "
            f"{_size(need)}: set plan.width to it, or leave it open."
        )
    warnings.warn(
        f"a round of width {plan.width} {sizes}; it is computed at width {fitting.width}, with "
        f"{_size(need)}.",
        stacklevel=2,
    )
    return program, fitting


def needed_bytes(program: Any) -> int | None:
    """What a compiled program takes on each device beside its arguments; None = it does not say."""
    found = program.memory_analysis()
    if found is None:
        return None
    held = found.output_size_in_bytes - found.alias_size_in_bytes
    return int(found.temp_size_in_bytes + found.generated_code_size_in_bytes + held)


def free_bytes(plan: Plan) -> int | None:
    """What is free on each device of a plan, less some slack; None = nobody says."""
    devices = plan.mesh.local_devices
    if jax.default_backend() == "cpu":
        host = _free_host_bytes()  # which its devices share
        return None if host is None else int(_USABLE * host / len(devices))
    known = [stats for device in devices if (stats := device.memory_stats())]
    free = [s["bytes_limit"] - s["bytes_in_use"] for s in known if "bytes_limit" in s]
    return int(_USABLE * min(free)) if free else None


def _least_free(plan: Plan) -> int | None:
    """The least of all processes', which have to choose the same."""
    return hosts.least(free_bytes(plan))


def _free_host_bytes() -> int | None:
    """What Linux calls available, within the limit of a container; None on other systems."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError):
        return None
    available = 1024 * int(line.split()[1])
    try:
        limit = int((_CGROUP / "memory.max").read_text())  # or the word "max"
        statistics = dict(
            line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines()
        )
        used = int((_CGROUP / "memory.current").read_text()) - int(statistics["inactive_file"])
    except (OSError, ValueError, KeyError):
        return available
    return max(min(available, limit - used), 0)


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
