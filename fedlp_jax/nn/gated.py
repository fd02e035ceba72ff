"""Gradients of some of the parameters: what the others would need is not computed.

Which parameters are trained may be data of a compiled program. The traced gradient is cut into
blocks: the equations that only the gradients of certain groups of parameters need run if one of
these groups is trained, under a `lax.cond`. A frozen layer then costs no product with its inputs
and, if no layer before it is trained either, its backward pass ends there. This holds for any
model, because it is read off the program. Lanes that are vmapped share their program, so it saves
nothing there: all blocks run, and what is frozen is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from fedlp_jax.types import Array, PyTree

Gate = Array | bool  # bool[]: whether a parameter is trained


class Block(NamedTuple):
    """Equations of a program that the same outputs need."""

    groups: frozenset[Any] | None  # of those outputs; None = of every run
    equations: list[Any]


def blocks(jaxpr: Jaxpr, groups: Sequence[Any]) -> list[Block]:
    """Cuts a program into blocks, in an order in which they can run.

    Args:
      jaxpr: of the program.
      groups: of each output; None = it is always needed.
    """
    needs: dict[Any, Any] = {}  # a variable -> the groups that need it; None = every run

    def add(variable: Any, more: Any) -> None:
        if not isinstance(variable, Literal):
            before = needs.get(variable, frozenset())
            needs[variable] = None if None in (before, more) else before | more

    for variable, group in zip(jaxpr.outvars, groups, strict=True):
        add(variable, None if group is None else frozenset([group]))
    found: dict[Any, list[Any]] = {}
    for equation in reversed(jaxpr.eqns):
        of_each = [needs[v] for v in equation.outvars if v in needs]
        if of_each:  # else nobody needs it
            every = None if None in of_each else frozenset().union(*of_each)
            found.setdefault(every, []).append(equation)
            for variable in equation.invars:
                add(variable, every)
    # What a block reads is needed by more groups than what it makes, so larger blocks come first.
    order = sorted(found, key=lambda groups: (groups is not None, -len(groups or ())))
    return [Block(groups, found[groups][::-1]) for groups in order]


def value_and_grad(
    loss_of: Callable[[PyTree], Any], params: PyTree, gates: PyTree
) -> tuple[tuple[Any, Any], PyTree]:
    """`jax.value_and_grad(loss_of, has_aux=True)(params)`; what is frozen gets any number.

    Args:
      loss_of: parameters -> (loss, auxiliary values).
      params: a tree.
      gates: a `Gate` for each leaf. Leaves whose gate is the same object are one group.
    """
    both = jax.value_and_grad(loss_of, has_aux=True)
    closed, shapes = jax.make_jaxpr(both, return_shape=True)(params)
    leaves, gate_of = jax.tree.leaves(shapes[1]), jax.tree.leaves(gates)
    always = len(jax.tree.leaves(shapes[0]))
    opened = list({id(gate): gate for gate in gate_of if not isinstance(gate, bool)}.values())
    number = {id(gate): n for n, gate in enumerate(opened)}  # alike in every process
    wanted = [i for i, gate in enumerate(gate_of) if gate is not False]
    jaxpr = closed.jaxpr
    outputs = [*jaxpr.outvars[:always], *(jaxpr.outvars[always + i] for i in wanted)]
    groups = [None] * always + [number.get(id(gate_of[i])) for i in wanted]
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(jaxpr.invars, jax.tree.leaves(params), strict=True))
    pruned = jaxpr.replace(outvars=outputs)
    for block in blocks(pruned, groups):
        _run(block, pruned, values, opened)
    results = [x.val if isinstance(x, Literal) else values[x] for x in outputs]
    value = jax.tree.unflatten(jax.tree.structure(shapes[0]), results[:always])
    gradient = [jnp.zeros(x.shape, x.dtype) for x in leaves]
    for i, result in zip(wanted, results[always:], strict=True):
        gradient[i] = result
    return value, jax.tree.unflatten(jax.tree.structure(shapes[1]), gradient)


def _run(block: Block, jaxpr: Jaxpr, values: dict[Any, Any], opened: list[Array]) -> None:
    """Runs a block, if it is due, and adds what others read of it to `values`."""
    made = {v for equation in block.equations for v in equation.outvars}
    inside = set(map(id, block.equations))
    read = {
        v
        for equation in jaxpr.eqns
        if id(equation) not in inside
        for v in equation.invars
        if not isinstance(v, Literal)
    }
    read |= {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    inputs = list(
        dict.fromkeys(
            v
            for equation in block.equations
            for v in equation.invars
            if not isinstance(v, Literal) and v not in made
        )
    )
    outputs = [v for equation in block.equations for v in equation.outvars if v in read]
    part = jaxpr.replace(constvars=[], invars=inputs, outvars=outputs, eqns=block.equations)
    run = jaxpr_as_fun(ClosedJaxpr(part, []))
    given = [values[v] for v in inputs]
    if block.groups is None:
        results = run(*given)
    else:
        due = jnp.stack([opened[group] for group in sorted(block.groups)]).any()

        def skip(*_: Any) -> list[Array]:
            return [jnp.zeros(v.aval.shape, v.aval.dtype) for v in outputs]

        results = jax.lax.cond(due, run, skip, *given)
    values.update(zip(outputs, results, strict=True))


def chosen(gates: PyTree, new: PyTree, old: PyTree) -> PyTree:
    """The leaves of `new` whose gate is open, and those of `old` elsewhere."""

    def choose(gate: Gate, new: Array, old: Array) -> Array:
        if isinstance(gate, bool):
            return new if gate else old
        return jnp.where(gate, new, old)

    return jax.tree.map(choose, gates, new, old)
