"""Kernels of a client's step and the memory that they pass, counted in the compiled round.

    python -m benchmarks.kernels [--workload W1|W2|W3|W4|all] [--width 10] [--json FILE] [--smoke]

No time is measured. A round of each workload is compiled for this machine in the form that
accelerators get: `width` clients vmapped, constant bounds, convolutions as products of patches.
Beside it stands naive JAX, `vmap(scan)` with `lax.conv`. A kernel is an instruction of the
optimised program that computes or moves data: a fusion, a product, a library call. A step is one
iteration of the loop that passes the most memory. XLA's GPU compiler fuses differently from that of
a CPU, so a CPU's numbers show what a change of the code does, not how many kernels a GPU launches.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fedlp_jax as fl
from benchmarks import command, stage
from benchmarks.jax_contenders import Naive
from benchmarks.timing import rounds_of
from benchmarks.workloads import WORKLOADS, Workload, made_up
from fedlp_jax.nn import conv

_STEPS = 2
# Instructions that launch nothing; the computations of some of them are counted in their place.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_FREE |= {"while", "opt-barrier", "partition-id", "replica-id"}
_READERS = ("dynamic-slice", "gather", "slice")  # they read what they return, not their operand
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.-]+) = (.*?) ([\w-]+)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"(calls|to_apply|body|condition|\w+_computations?)=\{?((?:%[\w.-]+(?:, )?)+)")
_NAME = re.compile(r"%([\w.-]+)")
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")


def main() -> None:
    """Runs it."""
    parser = command.parser(__doc__)
    parser.add_argument("--workload", choices=[*WORKLOADS, "all"], default="all")
    parser.add_argument("--width", type=int, default=10, help="clients vmapped")
    options = parser.parse_args()
    names = [*WORKLOADS] if options.workload == "all" else [options.workload]
    rows = {}
    for name in ["W2"] if options.smoke else names:
        rows[name] = measure(WORKLOADS[name], 2 if options.smoke else options.width)
        for label, row in rows[name].items():
            print(
                f"{name} {label:6} {row['kernels_a_step']:4} kernels a step, "
                f"{row['bytes_a_client_step'] / 1e6:.1f} MB a client-step",
                flush=True,
            )
    command.write(options.json, {"width": options.width, "workloads": rows})


def measure(workload: Workload, width: int) -> dict[str, dict[str, Any]]:
    """The step of a workload with all its clients in one chunk on one device, ours and naive."""
    chosen = dataclasses.replace(
        made_up(workload), clients=width, cohort=width, per_client=_STEPS * workload.batch_size
    )
    # One level alone is beside none, but has the constant bounds of levels side by side.
    plan = fl.Plan(devices=1, width=width, levels="side_by_side")
    with conv.using("patches"):
        ours = rounds_of(chosen, plan).run.program.round.as_text()
    with tempfile.TemporaryDirectory() as folder:
        stage.write(chosen, Path(folder))
        naive = Naive(Path(folder), {}).compiled().as_text()
    return {"ours": described(ours, width), "naive": described(naive, width)}


def described(text: str, width: int) -> dict[str, Any]:
    """The step of a compiled round with `width` clients at once, for a result file."""
    loop = step(text)
    return {
        "kernels_a_step": sum(loop.kernels.values()),
        "kernels_by_kind": dict(loop.kernels.most_common()),
        "bytes_a_client_step": loop.bytes / width,
    }


class Instruction(NamedTuple):
    """A line of an HLO program."""

    name: str
    type: str
    opcode: str
    operands: Sequence[str]
    called: Mapping[str, Sequence[str]]  # attribute -> computations
    root: bool


class Loop(NamedTuple):
    """One iteration of a loop, without the loops in it."""

    kernels: Counter[str]  # by opcode
    bytes: int  # read and written by its kernels


def step(text: str) -> Loop:
    """The iteration that passes the most memory, in the text of an optimised HLO program.

    Raises:
      ValueError: the program has no loop.
    """
    program = _parsed(text)
    bodies = [
        body
        for computation in program.values()
        for instruction in computation
        for body in instruction.called.get("body", ())
    ]
    if not bodies:
        raise ValueError("the program has no loop; read the compiled round of a Simulation.")
    return max((_iteration(program, body) for body in bodies), key=lambda loop: loop.bytes)


def whole(text: str) -> Loop:
    """The whole program, with one iteration of each loop, as XLA's `cost_analysis` counts."""
    program = _parsed(text)
    bodies = [
        name
        for computation in program.values()
        for instruction in computation
        for attribute in ("body", "condition")
        for name in instruction.called.get(attribute, ())
    ]
    entry = next(re.finditer(r"^ENTRY %([\w.-]+)", text, re.M)).group(1)
    parts = [_iteration(program, name) for name in [entry, *bodies]]
    kernels: Counter[str] = sum((part.kernels for part in parts), Counter())
    return Loop(kernels, sum(part.bytes for part in parts))


def _parsed(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each computation."""
    program: dict[str, list[Instruction]] = {}
    lines: list[Instruction] = []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            lines = program[header[2]] = []
        elif found := _INSTRUCTION.match(line):
            root, name, type, opcode, rest = found.groups()
            operands, _, attributes = rest.partition(")")
            called = {key: _NAME.findall(names) for key, names in _CALLED.findall(attributes)}
            lines.append(
                Instruction(name, type, opcode, _NAME.findall(operands), called, bool(root))
            )
    return program


def _iteration(program: Mapping[str, Sequence[Instruction]], computation: str) -> Loop:
    """What a computation runs itself and in those it calls; of branches, the heaviest."""
    kernels, passed = Counter[str](), 0
    sizes = {x.name: _bytes(x.type) for x in program[computation]}
    for instruction in program[computation]:
        opcode, called = instruction.opcode, instruction.called
        if opcode == "call":
            part = _iteration(program, called["to_apply"][0])
        elif opcode == "conditional":
            branches = [name for key, names in called.items() for name in names]
            part = max((_iteration(program, x) for x in branches), key=lambda loop: loop.bytes)
        elif opcode in _FREE or opcode.endswith("-done"):
            continue
        else:
            part = Loop(Counter([opcode]), _passed(program, instruction, sizes))
        kernels, passed = kernels + part.kernels, passed + part.bytes
    return Loop(kernels, passed)


def _passed(
    program: Mapping[str, Sequence[Instruction]],
    instruction: Instruction,
    sizes: Mapping[str, int],
) -> int:
    """Bytes that a kernel reads and writes; of an array that it slices or updates, the part."""
    if instruction.opcode == "fusion":
        inside = program[instruction.called["calls"][0]]
        return _read(inside) + _written(inside)
    operands = [sizes[name] for name in instruction.operands]
    if instruction.opcode == "custom-call":  # a library also returns its scratch memory
        return _bytes(re.sub(r"\bs8\[\d+\]", "", instruction.type)) + sum(operands)
    if instruction.opcode in _READERS:
        return 2 * sizes[instruction.name] + sum(operands[1:])
    if instruction.opcode == "dynamic-update-slice":
        return 2 * operands[1] + sum(operands[2:])
    return sizes[instruction.name] + sum(operands)


def _read(inside: Sequence[Instruction]) -> int:
    """Bytes that a fusion reads of its parameters."""
    total = 0
    for parameter in inside:
        if parameter.opcode != "parameter":
            continue
        users = [x for x in inside if parameter.name in x.operands]
        sliced = all(x.opcode in _READERS and x.operands[0] == parameter.name for x in users)
        updated = all(
            x.opcode == "dynamic-update-slice" and x.operands[0] == parameter.name for x in users
        )
        if sliced:
            total += sum(_bytes(x.type) for x in users)
        elif not updated:
            total += _bytes(parameter.type)
    return total


def _written(inside: Sequence[Instruction]) -> int:
    """Bytes that a fusion writes."""
    by_name = {x.name: x for x in inside}
    root = next(x for x in inside if x.root)
    results = [by_name[x] for x in root.operands] if root.opcode == "tuple" else [root]
    return sum(
        _bytes(by_name[x.operands[1]].type if x.opcode == "dynamic-update-slice" else x.type)
        for x in results
    )


def _bytes(type: str) -> int:
    """Bytes of an array, or of a tuple of them."""
    total = 0
    for letters, bits, shape in _ARRAY.findall(type):
        size = 1 if letters == "pred" else int(bits or 0) // 8
        for extent in filter(None, shape.split(",")):
            size *= int(extent)
        total += size
    return total


if __name__ == "__main__":
    main()
