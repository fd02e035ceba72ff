"""Multiply-accumulates (MACs) of a model, counted in its traced program; never a clock."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from jax.extend.core import jaxprs_in_params

from fedlp_jax.nn import conv, gated
from fedlp_jax.prng import root_key
from fedlp_jax.pruning.layers import LayerTable, path_names
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import Array, Batch, Variables

_NORM_OPERATIONS = 4  # per element of a batch normalisation, the convention of the FedLP table


def forward_macs(task: Task, variables: Variables, example: Batch) -> dict[str, int]:
    """Counts the MACs of one example's forward pass, by module.

    Dots and convolutions are counted in the traced program, so any model works. A batch
    normalisation counts 4 operations per element; activations, pooling and biases count nothing.
    The FedLP table follows the same convention.

    Args:
      task: of the model or submodel.
      variables: its variables, or their shapes.
      example: a batch.

    Returns:
      `{"conv1/conv": macs, ...}`; operations outside any module are under "". What several exits
      share counts once.
    """
    if task.exits:
        each = [forward_macs(exit, variables, example) for exit in task.exits]
        return functools.reduce(operator.or_, each)
    shapes = jax.eval_shape(lambda v: v, variables)
    # Count the convolutions as written, whatever lowering a run takes. The lambda is new in every
    # call because jax caches traces by function. A recording around this call does not see
    # these convolutions.
    with conv.using("direct"):
        jaxpr = jax.make_jaxpr(lambda v: task.outputs(v, example))(shapes)
    norms = {"/".join(map(str, path[1:-1])) for path in flatten_dict(shapes) if path[0] != "params"}
    macs: dict[str, int] = {}
    norm_elements: dict[str, int] = {}
    for equation, scope, times in _equations(jaxpr.eqns):
        module = _module(scope)
        count = times * _macs(equation)
        if count:
            macs[module] = macs.get(module, 0) + count
        elif module in norms:
            size = max(math.prod(out.aval.shape) for out in equation.outvars)
            norm_elements[module] = max(norm_elements.get(module, 0), size)
    for module, size in norm_elements.items():
        macs[module] = macs.get(module, 0) + _NORM_OPERATIONS * size
    rows = max(example.labels.shape[0], 1)
    return {module: count // rows for module, count in macs.items()}


def backward_macs(task: Task, variables: Variables, example: Batch) -> int:
    """Counts the MACs of one example's backward pass: its dots and convolutions, nothing else.

    The first layer needs no gradient for its inputs, so this is less than twice the forward pass.

    Args:
      task: of the model or submodel.
      variables: its variables, or their shapes.
      example: a batch.
    """
    forward, both = _traced(task, jax.eval_shape(lambda v: v, variables), example)
    return (_total(both.eqns) - _total(forward.eqns)) // max(example.labels.shape[0], 1)


def backward_blocks(
    task: Task, variables: Variables, example: Batch, layers: LayerTable
) -> list[tuple[frozenset[int], int]]:
    """Cuts the MACs of one example's backward pass by the layers that need them.

    A block runs if one of its layers is trained; one without layers always runs, such as the
    gradient of a private head. See `fedlp_jax.nn.gated`.

    Args:
      task: of the model or submodel.
      variables: its variables, or their shapes.
      example: a batch.
      layers: of what is shared with the server.

    Returns:
      `(layers, MACs)` of each block. The MACs add up to `backward_macs`.
    """
    shapes = jax.eval_shape(lambda v: v, variables)
    layer_of = flatten_dict(layers.index["params"])
    forward, both = _traced(task, shapes, example)
    leaves = jax.tree_util.tree_leaves_with_path(shapes["params"])
    groups = [None, *(layer_of.get(path_names(path)) for path, _ in leaves)]
    rows, found = max(example.labels.shape[0], 1), []
    for block in gated.blocks(both, groups):
        macs = _total(block.equations)
        if block.groups is None:
            macs -= _total(forward.eqns)
        found.append((block.groups or frozenset(), macs // rows))
    return found


def macs_of_models(tasks: Sequence[Task], key: Array, example: Batch) -> list[int]:
    """The forward MACs of one example in the whole model of each task."""
    return [
        sum(forward_macs(task, jax.eval_shape(task.init, key, example), example).values())
        for task in tasks
    ]


def relative_work(tasks: Sequence[Task], key: Array, example: Batch) -> list[float]:
    """Modelled work of a local step of each submodel level, to schedule clients by.

    Returns:
      The forward MACs of one example at each level; `[1.0]` for a single level, since only
      proportions matter.
    """
    return [1.0] if len(tasks) == 1 else [*map(float, macs_of_models(tasks, key, example))]


def _traced(task: Task, shapes: Variables, example: Batch) -> tuple[Any, Any]:
    """The programs of a forward pass, and of a forward and a backward pass."""

    def gradient(variables: Variables) -> Any:
        def loss(params: Variables) -> Any:
            return task.loss({**variables, "params": params}, example, root_key(0))[0]

        return jax.value_and_grad(loss)(variables["params"])

    with conv.using("direct"):  # count products as written
        forward = jax.make_jaxpr(lambda v: task.outputs(v, example))(shapes)
        return forward.jaxpr, jax.make_jaxpr(gradient)(shapes).jaxpr


def _total(equations: Sequence[Any]) -> int:
    """The MACs of equations and of what they call."""
    return sum(times * _macs(equation) for equation, _, times in _equations(equations))


def _equations(
    equations: Sequence[Any], scope: str = "", times: int = 1
) -> Iterator[tuple[Any, str, int]]:
    """Yields every equation, also of the programs that they call, its scope, and how often it runs.

    The body of a `while` counts once, because its trip count is unknown. Every branch of a `cond`
    counts.
    """
    for equation in equations:
        inner_scope = "/".join(filter(None, (scope, str(equation.source_info.name_stack))))
        bodies = list(jaxprs_in_params(equation.params))
        if not bodies:
            yield equation, inner_scope, times
        trips = equation.params["length"] if equation.primitive.name == "scan" else 1
        for body in bodies:
            yield from _equations(body.eqns, inner_scope, times * trips)


def _module(scope: str) -> str:
    """The module's path in a name stack, without the class name with which flax opens it."""
    return "/".join(scope.split("/")[1:])


def _macs(equation: Any) -> int:
    name = equation.primitive.name
    if name not in ("dot_general", "conv_general_dilated"):
        return 0
    out = math.prod(equation.outvars[0].aval.shape)
    if name == "dot_general":
        (contract, _), _ = equation.params["dimension_numbers"]
        return out * math.prod(equation.invars[0].aval.shape[d] for d in contract)
    kernel = equation.invars[1].aval.shape
    features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    # A dilated input (transposed convolution) consists mostly of inserted zeros.
    inserted = math.prod(equation.params["lhs_dilation"])
    return out * math.prod(kernel) // features // inserted
