"""Plan: how a round is laid on the hardware, and whether it fits there.

A plan changes what a round costs, never what it computes beyond the order of a sum.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import psutil
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from fedlp_jax.errors import FedLPError, check_choice, check_number, note, shown, warn
from fedlp_jax.execution import processes
from fedlp_jax.execution.compilation import keep_programs

AXIS, RUNS = "clients", "runs"
DEVICE, HOST = PLACES = ("device", "host")
_IN_TURN, SIDE_BY_SIDE = LEVELS = ("in_turn", "side_by_side")
# On CPU a loop of plain GEMMs beats vmapped clients (measured). An accelerator needs many clients
# at once, because every kernel of a step takes time to launch; the best number is not measured.
_WIDTH = {"cpu": 1}
_ACCELERATOR_WIDTH = 128
_USABLE = 0.9  # share of the free memory: allocators need slack, and so do other programs
# The first is a superset of the second, which leaves XLA free to time the kernels that repeat.
_FIXED_FLAG = "--xla_gpu_deterministic_ops"
_TUNED_FLAG = "--xla_gpu_exclude_nondeterministic_ops"
GPU_KERNELS = {"tuned": _TUNED_FLAG, "fixed": _FIXED_FLAG}
_COLLECTIVE_TIMEOUT_FLAG = "--xla_cpu_collective_call_terminate_timeout_seconds"


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a round is laid on the hardware. None = chosen, by `resolve` and by the free memory.

    Results repeat bit for bit if `devices` and `width` are the same.

    Attributes:
      devices: D, devices on the mesh, of all processes together.
      width: W, clients vmapped at once on a device; memory grows with W models. Where clients hold
        submodels of several levels, W of the most common one, and of the others in proportion.
      data: "device" = every device holds the whole training split; "host" = each device receives
        the examples of its own clients, a round ahead. If it is open, the device is chosen if its
        memory suffices.
      rounds_at_once: the most rounds that one call of the compiled program runs, which pays where
        a round is as short as such a call, a millisecond or less. Evaluations, checkpoints,
        callbacks and half a second of rounds end a call sooner. If it is open, 1. It is always 1
        where clients keep variables of their own, the data lie on the host, or several processes
        run.
      levels: where clients hold submodels of several levels: "in_turn" or None = one level after
        the other; "side_by_side" = every step is a step of all levels, which an accelerator may
        overlap.
    """

    devices: int | None = None
    width: int | None = None
    data: str | None = None
    rounds_at_once: int | None = None
    levels: str | None = None

    @property
    def mesh(self) -> Mesh:
        """The mesh of a resolved plan: its D devices on the axis `clients`."""
        devices = processes.devices(self.devices)
        return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)

    @property
    def known_trip_counts(self) -> bool:
        """Whether the bounds of all loops are constants, as on accelerators.

        A GPU stops the host in every iteration of a loop whose bound only the device knows. On CPU
        such a loop costs nothing, and ends sooner where clients are uneven. Levels side by side
        share a loop, so they need one bound.
        """
        if self.levels == SIDE_BY_SIDE:
            return True
        return processes.devices(self.devices)[0].platform != "cpu"


@dataclasses.dataclass(frozen=True)
class LanesPlan(Plan):
    """The plan of each of several runs side by side, which are dealt out to groups of devices.

    Attributes:
      groups: how many; each has the `devices` of one run.
    """

    groups: int = 1

    @property
    def mesh(self) -> Mesh:
        """Devices by group of runs and, within a group, by clients."""
        axes, shape = (RUNS, AXIS), (self.groups, self.devices or 1)
        devices = processes.devices(self.groups * (self.devices or 1))
        return jax.make_mesh(shape, axes, axis_types=(AxisType.Auto,) * 2, devices=devices)

    def sharded(self, axis: int) -> NamedSharding:
        """Sharding of arrays of which this axis is runs; one before it is slots or devices."""
        return NamedSharding(self.mesh, Spec(*(AXIS,) * axis, RUNS))


def checked(plan: Plan | None) -> Plan:
    """A plan that this machine can follow, its numbers Python's; its open fields stay open.

    Raises:
      FedLPError: more devices than there are, a number below 1, an unknown word, or
        devices that the processes cannot share equally; or no plan.
    """
    plan = Plan() if plan is None else plan
    if not isinstance(plan, Plan):
        raise FedLPError(
            f"plan={shown(plan)} is of type {type(plan).__name__}; give fl.Plan(devices=1)."
        )
    if plan.data is not None:
        check_choice("plan.data", plan.data, PLACES)
    if plan.levels is not None:
        check_choice("plan.levels", plan.levels, LEVELS)
    for name in ("devices", "width", "rounds_at_once"):
        if (value := getattr(plan, name)) is not None:
            whole: Any = check_number(f"plan.{name}", value, ge=1, integer=True, optional=True)
            plan = dataclasses.replace(plan, **{name: whole})
    have, number = len(processes.devices()), processes.count()
    if plan.devices is not None and plan.devices > have:
        hint = "; on CPU, call fl.setup(cpu_devices=...) first" if _on_cpu() else ""
        raise FedLPError(f"plan.devices={plan.devices} but jax sees {have}{hint}.")
    if plan.devices is not None and plan.devices % number:
        raise FedLPError(
            f"plan.devices={plan.devices} counts the devices of all processes, and {number} "
            f"processes cannot share them equally; make it a multiple of {number}, or leave it "
            "open."
        )
    return plan


def resolve(plan: Plan | None, cohort: int) -> Plan:
    """Fills the open fields of a plan, but for `data`, for a cohort of C clients on this machine.

    Raises:
      FedLPError: as `checked`, or a cohort with fewer clients than there are processes.
    """
    plan = checked(plan)
    have, number = len(processes.devices()), processes.count()
    devices = min(plan.devices or have, cohort) // number * number
    if not devices:
        raise FedLPError(
            f"a cohort of {cohort} has no client for each of {number} processes; start fewer, or "
            "enlarge the cohort."
        )
    width = plan.width or _WIDTH.get(jax.default_backend(), _ACCELERATOR_WIDTH)
    width = min(width, -(-cohort // devices))
    at_once = plan.rounds_at_once or 1
    return dataclasses.replace(plan, devices=devices, width=width, rounds_at_once=at_once)


def setup(cpu_devices: int | None = None, gpu_kernels: str = "tuned") -> None:
    """Makes jax ready: CPU devices, GPUs that repeat, programs kept. Call it before using jax.

    On CPU, one device per core, each with one stream of clients, is faster than one device with all
    cores. Compiled programs are kept on disk for the next start, see `keep_programs`. Importing
    fedlp_jax changes no setting of jax; this function does.

    Args:
      cpu_devices: number of CPU devices; None = one per usable core.
      gpu_kernels: which kernels XLA may take on a GPU. "tuned": those that repeat to the bit, the
        fastest of them by timing. What was chosen is kept with the compiled programs, so the next
        process computes the same bits; without that directory it may choose others. "fixed": no
        timing, the same bits in every process, and slower products: 1.6 times on a small MLP. What
        `XLA_FLAGS` says of either wins.

    Raises:
      FedLPError: jax was used before, so its devices are fixed, or no such kernels.
    """
    check_choice("gpu_kernels", gpu_kernels, tuple(GPU_KERNELS))
    cpu_devices = cpu_devices or _usable_cores()
    before = flags = os.environ.get("XLA_FLAGS", "")
    if _COLLECTIVE_TIMEOUT_FLAG not in flags:
        # XLA aborts the process if a device waits over a minute for another at the end of a round;
        # uneven clients on a slow machine may take longer.
        flags = f"{flags} {_COLLECTIVE_TIMEOUT_FLAG}=86400".strip()
    if not any(flag in flags for flag in GPU_KERNELS.values()):
        flags = f"{flags} {GPU_KERNELS[gpu_kernels]}=true"
    os.environ["XLA_FLAGS"] = flags.strip()
    try:
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    except RuntimeError as error:
        os.environ["XLA_FLAGS"] = before  # which child processes inherit
        raise FedLPError(
            f"cannot set {cpu_devices} CPU devices: jax is already in use. Call fl.setup() first."
        ) from error
    keep_programs()
    processes.gather()  # opens the connections, which processes must do within half a minute


def gpu_kernels() -> str | None:
    """Which kernels a GPU may use, see `setup`; None = any, since `setup` was not called."""
    given = dict(flag.partition("=")[::2] for flag in os.environ.get("XLA_FLAGS", "").split())
    on = [name for name, flag in GPU_KERNELS.items() if given.get(flag) in ("", "true", "1")]
    return on[-1] if on else None


def note_other_kernels() -> None:
    """Adds to the warnings of a run that a GPU may compute other bits the next time."""
    if jax.default_backend() != "gpu":
        return
    chosen = gpu_kernels()
    if chosen is None:
        note(
            [
                "XLA chooses a GPU's kernels by timing them, so another process may compute other "
                f"bits. Call fl.setup() first, and turn off neither {_TUNED_FLAG} nor "
                f"{_FIXED_FLAG} in XLA_FLAGS."
            ]
        )
    elif chosen == "tuned" and not jax.config.values["jax_compilation_cache_dir"]:
        note(
            [
                "compiled programs are not kept, so another process may choose other kernels and "
                "compute other bits. Make the cache directory writable, or call "
                "fl.setup(gpu_kernels='fixed') first."
            ]
        )


def replicated(plan: Plan) -> NamedSharding:
    """Sharding of arrays that every device holds whole."""
    return NamedSharding(plan.mesh, Spec())


def over_clients(plan: Plan) -> NamedSharding:
    """Sharding of arrays whose first axis is slots, `[D * P, ...]`, or devices, `[D, ...]`."""
    return NamedSharding(plan.mesh, Spec(AXIS))


def with_place(plan: Plan, train_bytes: int, test_bytes: int) -> Plan:
    """Fills the place of the data, if it is open: the devices if the training split fits there.

    Args:
      plan: resolved.
      train_bytes: of the training split.
      test_bytes: of the test split, which every device holds.

    Raises:
      FedLPError: data that every device must hold do not fit, with both sizes.
    """
    free = processes.least(free_bytes(plan))
    if free is None or train_bytes + test_bytes <= free:
        return dataclasses.replace(plan, data=plan.data or DEVICE)
    where = f"each of {plan.devices} device(s), where {size(free)} are free"
    if test_bytes > free:
        raise FedLPError(f"the test split takes {size(test_bytes)} on {where}; use fewer examples.")
    if plan.data == DEVICE:
        raise FedLPError(
            f"the data take {size(train_bytes + test_bytes)} on {where}; set plan.data to host, or "
            "leave it open."
        )
    return dataclasses.replace(plan, data=HOST)


def compile_to_fit(
    compile: Callable[[Plan], Any], plan: Plan, width_is_open: bool, staged_bytes: int = 0
) -> tuple[Any, Plan]:
    """Compiles a round; if it needs more memory than is free, for fewer clients at once.

    Args:
      compile: plan -> compiled program. All its arguments but the staged ones are on the devices
        already.
      plan: resolved.
      width_is_open: False = the user chose the width, so a round that does not fit is refused.
      staged_bytes: what each device receives for a round and, while it runs, for the next one.

    Returns:
      The program, and the plan that it is for.

    Raises:
      FedLPError: the round does not fit, with both sizes, and what to do.
    """
    program = compile(plan)
    free, first = processes.least(free_bytes(plan)), needed_bytes(program)
    if free is None or first is None:
        return program, plan
    free = max(free - staged_bytes, 0)
    need, fitting = first, plan
    while need > free and (fitting.width or 1) > 1:
        width = fitting.width or 1
        # At most half as wide; a guess, because some memory does not depend on the width.
        fitting = dataclasses.replace(fitting, width=max(min(width // 2, width * free // need), 1))
        program = compile(fitting)
        need = needed_bytes(program) or 0
    if fitting == plan and need <= free:
        return program, plan
    sizes = f"needs {size(first)} on each of {plan.devices} device(s), where {size(free)} are free"
    if need > free:
        raise FedLPError(
            f"a round {sizes}, and {size(need)} with one client at a time; use a smaller batch or "
            f"model{', or fewer devices' if _on_cpu() else ''}"
            f"{'' if plan.data == HOST else ', or set plan.data to host'}."
        )
    if not width_is_open:
        raise FedLPError(
            f"a round of width {plan.width} {sizes}; width {fitting.width} fits, with "
            f"{size(need)}: set plan.width to it, or leave it open."
        )
    warn(
        f"a round of width {plan.width} {sizes}; it runs at width {fitting.width}, with "
        f"{size(need)}.",
        stacklevel=2,
    )
    return program, fitting


def needed_bytes(program: Any) -> int | None:
    """Bytes of a compiled program on each device, without its arguments; None = not known."""
    memory = program.memory_analysis()
    if memory is None:
        return None
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return int(memory.temp_size_in_bytes + memory.generated_code_size_in_bytes + output)


def free_bytes(plan: Plan) -> int | None:
    """Free bytes on each device of this process, less some slack; None = not known."""
    devices = plan.mesh.local_devices
    if _on_cpu():  # whose devices share the memory of the host
        return int(_USABLE * psutil.virtual_memory().available / len(devices))
    known = [stats for device in devices if (stats := device.memory_stats())]
    free = [s["bytes_limit"] - s["bytes_in_use"] for s in known if "bytes_limit" in s]
    return int(_USABLE * min(free)) if free else None


def size(count: int) -> str:
    """Bytes, for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"
