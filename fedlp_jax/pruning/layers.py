"""LayerTable: which leaf of the variables belongs to which layer, and how large each layer is.

FedLP keeps or prunes a layer as one. `by_module` names a leaf's layer by the first component of its
path, with the index if that is a list of modules (`layers/0` of an `nnx.Sequential`), joined across
collections: a layer's weight, bias, normalisation and batch statistics stay together. `by_tensor`
makes every tensor a layer, as the authors' code does.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.extend.core import Literal
from jax.tree_util import tree_flatten_with_path

from fedlp_jax.errors import FedLPError, shown
from fedlp_jax.prng import root_key
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import Array, Batch, PyTree, Variables, wide

LayerRule = str | Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class LayerTable:
    """The layers of a tree of variables."""

    names: tuple[str, ...]  # L names, in natural order
    index: PyTree  # int per leaf: its layer
    params: np.ndarray  # i64[L], learnable parameters
    statistics: np.ndarray  # i64[L], other exchanged numbers (batch statistics)
    matrices: frozenset[int] = frozenset()  # layers with a parameter of two dimensions or more
    order: tuple[int, ...] = ()  # of use, see `order_of_use`; () = not known

    def __len__(self) -> int:
        return len(self.names)

    def expand(self, values: Any) -> PyTree:
        """`f32[L]` -> a tree of scalars, one per leaf; a tree, of single entries, stays."""
        if not hasattr(values, "shape"):
            return values
        return jax.tree.map(lambda layer: values[layer], self.index)

    def only(self, collection: str) -> LayerTable:
        """The same layers, indexing the leaves of one collection only."""
        return dataclasses.replace(self, index={collection: self.index[collection]})

    @property
    def covered(self) -> np.ndarray:
        """`f32[L]`, 1 where this tree has at least one leaf of the layer."""
        return (self.params + self.statistics > 0).astype(np.float32)


def layer_table(
    variables: Variables, rule: LayerRule = "by_module", names: Sequence[str] | None = None
) -> LayerTable:
    """Builds the layer table of a tree of arrays or shapes.

    Args:
      variables: `{"params": tree, ...}`; only shapes are read, so it works while tracing.
      rule: "by_module", "by_tensor", or a mapping from regular expression to layer name. The
        expression is searched in the leaf's path ("conv1/norm/scale"). The first match wins; a
        leaf without a match keeps its module's name.
      names: layer names of the larger model that this one is part of; None = those of this model.

    Raises:
      FedLPError: an unknown rule, an invalid expression, or a leaf with a layer not in `names`.
    """
    name_of = _rule_function(rule)
    leaves, treedef = tree_flatten_with_path(variables)
    if names is None and isinstance(rule, Mapping):
        _check_patterns(rule, ["/".join(path_names(path)[1:]) for path, _ in leaves])
    layer_of_leaf = [name_of(path_names(path)[1:]) for path, _ in leaves]
    if names is None:
        names = sorted(set(layer_of_leaf), key=_natural)
    position = {name: i for i, name in enumerate(names)}
    unknown = sorted(set(layer_of_leaf) - set(position))
    if unknown:
        raise FedLPError(
            f"layers {unknown} are not among the {len(names)} layers of the whole model."
        )
    sizes = {True: np.zeros(len(names), np.int64), False: np.zeros(len(names), np.int64)}
    for name, (path, leaf) in zip(layer_of_leaf, leaves, strict=True):
        sizes[path_names(path)[0] == "params"][position[name]] += int(np.prod(leaf.shape))
    index = jax.tree.unflatten(treedef, [position[name] for name in layer_of_leaf])
    matrices = frozenset(
        position[name]
        for name, (path, leaf) in zip(layer_of_leaf, leaves, strict=True)
        if path_names(path)[0] == "params" and len(leaf.shape) > 1
    )
    return LayerTable(tuple(names), index, sizes[True], sizes[False], matrices)


def order_of_use(task: Task, layers: LayerTable, example: Batch) -> tuple[int, ...]:
    """The layers in the order in which a forward pass of the whole model first uses them.

    Natural order has a ResNet's `fc` first and its `stem` last. Layers that enter one operation
    together, such as a compiled block, keep natural order among themselves; those that are not
    used come last.
    """
    shapes = flatten_dict(jax.eval_shape(task.init, root_key(0), example))

    def outputs(*leaves: Array) -> Array:  # new in every call: jax caches traces by function
        return task.outputs(unflatten_dict(dict(zip(shapes, leaves, strict=True))), example)

    jaxpr = jax.make_jaxpr(outputs)(*shapes.values()).jaxpr
    layer_of_path = flatten_dict(layers.index)
    layer_of = {
        variable: layer_of_path[path]
        for path, variable in zip(shapes, jaxpr.invars, strict=True)
        if path in layer_of_path
    }
    used: dict[int, None] = {}
    for equation in jaxpr.eqns:
        read = [x for x in equation.invars if not isinstance(x, Literal)]
        used |= dict.fromkeys(sorted(layer_of[x] for x in read if x in layer_of))
    return tuple(used | dict.fromkeys(range(len(layers))))


def squared_norms(params: PyTree, layers: LayerTable) -> Array:
    """`f[L]`, the sum of squares of the parameters of each layer."""
    return sums(jax.tree.map(lambda x: jnp.square(x.astype(wide(x.dtype))), params), layers)


def sums(tree: PyTree, layers: LayerTable) -> Array:
    """`f[L]`, the sum of all entries of each layer.

    Args:
      tree: like the parameters, with arrays of any shape.
      layers: the layer table.
    """
    index = jax.tree.leaves(layers.index["params"])
    totals = [x.sum() for x in jax.tree.leaves(tree)]
    none = jnp.zeros_like(totals[0])
    return jnp.stack(
        [
            sum((s for s, of in zip(totals, index, strict=True) if of == layer), none)
            for layer in range(len(layers))
        ]
    )


def path_names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """Components of a leaf's path as strings: ("params", "conv1", "kernel")."""
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)


def path_pattern(pattern: str) -> re.Pattern[str]:
    """A regular expression to be searched in the paths of variables.

    Raises:
      FedLPError: it is none.
    """
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise FedLPError(
            f"{shown(pattern)} is not a regular expression ({error}); give one that is found in "
            "the paths of variables, such as 'fc2'."
        ) from error


def _rule_function(rule: LayerRule) -> Any:
    if rule == "by_module":
        return _module
    if rule == "by_tensor":
        return lambda parts: "/".join(parts)
    if not isinstance(rule, Mapping):
        raise FedLPError(
            f"unknown layer rule {rule!r}; use 'by_module', 'by_tensor' or a mapping from "
            "regular expression to layer name."
        )
    try:
        patterns = [(re.compile(pattern), name) for pattern, name in rule.items()]
    except re.error as error:
        raise FedLPError(f"a layer rule is not a regular expression: {error}.") from error

    def name_of(parts: tuple[str, ...]) -> str:
        path = "/".join(parts)
        return next((name for pattern, name in patterns if pattern.search(path)), _module(parts))

    return name_of


def _module(parts: tuple[str, ...]) -> str:
    numbers = itertools.takewhile(str.isdigit, parts[1:-1])
    return "/".join((parts[0], *numbers))


def _check_patterns(rule: Mapping[str, str], paths: list[str]) -> None:
    for pattern in rule:
        if not any(re.search(pattern, path) for path in paths):
            raise FedLPError(
                f"the layer rule {pattern!r} matches none of the {len(paths)} tensors, for example "
                f"{', '.join(paths[:3])}."
            )


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts conv2 before conv10."""
    return [(0, int(p)) if p.isdigit() else (1, p) for p in re.split(r"(\d+)", name) if p]
