"""Structure: what runs must have in common to be one program.

Whatever is an argument of the compiled round is not in it: the seed, keep, rates that are no
constants of an optimizer, and the examples of each client.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import types
from collections.abc import Hashable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.execution.compilation import Same
from fedlp_jax.simulation.evaluation import evaluator
from fedlp_jax.simulation.program import rounds_of
from fedlp_jax.simulation.run import Run
from fedlp_jax.tasks.task import Task

_CONSTANTS = (type(None), bool, int, str, bytes)
_OF_LINEN = {"_id", "_parent_ref", "_state"}  # what flax keeps in each module
# Packages whose functions and classes read nothing that changes while the process runs.
_LIBRARIES = {
    *("builtins", "collections", "fedlp_jax", "flax", "functools", "jax", "numpy", "optax"),
}


def structures(runs: Sequence[Run]) -> list[Hashable]:
    """A key for each run; runs with equal keys have one program.

    Rounds that are the same functions of the same constants are the same, see `content`. Others
    are traced and lowered, and are the same if their texts are.

    Args:
      runs: each with the plan of one run.
    """
    contents: dict[int, Hashable] = {}
    for run in runs:
        if id(run.algorithm) not in contents:
            contents[id(run.algorithm)] = content(_traced(run.algorithm))
    kinds = [(_shapes(run), contents[id(run.algorithm)]) for run in runs]
    first = dict(zip(reversed(kinds), reversed(runs), strict=True))
    of_shapes = collections.Counter(shapes for shapes, _ in first)
    texts = {kind: _text(run) if of_shapes[kind[0]] > 1 else None for kind, run in first.items()}
    return [(kind[0], texts[kind]) for kind in kinds]


def _traced(algorithm: Algorithm) -> tuple[Any, ...]:
    """What rounds and evaluations read of an algorithm."""
    return algorithm.round, algorithm.levels, algorithm.shared_heads, algorithm.personal


def lasting(algorithm: Algorithm) -> Hashable | None:
    """A key of what rounds and evaluations read; algorithms made later may have an equal one.

    A task equals itself alone. Code of the user's has no key, because it may read a variable that
    changes meanwhile. Nor has an array outside the task, because the key would keep it alive.

    Args:
      algorithm: whose parts besides are constants and what libraries define.

    Returns:
      The key; None = the algorithm has other parts.
    """
    task = algorithm.task
    key = _content(_traced(algorithm), {id(task): (Same(task), task)})
    return key if _lasts(key, task) and _of_libraries(content(task)) else None


def _lasts(key: Any, task: Task) -> bool:
    """Whether a part of a content is the task, constants, or of libraries."""
    if isinstance(key, tuple):
        return key[:1] != (np.ndarray,) and all(_lasts(part, task) for part in key)
    if isinstance(key, Same) and not (_is_globals(key.value) or type(key.value) is types.CodeType):
        return key.value is task
    return _of_libraries(key)


def _is_globals(value: Any) -> bool:
    """Whether a value is the variables of a file, which a function may read."""
    return isinstance(value, dict) and "__name__" in value


def _of_libraries(key: Any) -> bool:
    """Whether libraries define all types, functions and objects of a content."""
    if isinstance(key, tuple):
        return all(map(_of_libraries, key))
    if isinstance(key, type):
        return _of_library(key.__module__)
    if not isinstance(key, Same):
        return True
    if _is_globals(key.value):
        return _of_library(str(key.value["__name__"]))
    return _of_library(getattr(key.value, "__module__", None) or type(key.value).__module__)


def _of_library(module: str) -> bool:
    return module.partition(".")[0] in _LIBRARIES


def _shapes(run: Run) -> Hashable:
    """The arguments of a run's rounds and evaluations, without their values."""
    tested = jax.tree.map(jax.typeof, run.stage.tested())
    leaves, tree = jax.tree.flatten((run.round_shapes(run.plan), tested))
    return run.plan, tree, tuple(leaves)


def _text(run: Run) -> Hashable:
    """The lowered rounds and evaluation of a run."""
    rounds = rounds_of(run.algorithm, run.plan).lower(*run.round_shapes(run.plan))
    test = jax.jit(evaluator(run.algorithm, run.plan), keep_unused=True)
    tested = test.lower(run.state.variables, *run.stage.tested())
    texts = rounds.as_text(), tested.as_text()
    # The text does not say which Python function is called.
    return texts, Same(run.algorithm) if any("callback" in text for text in texts) else None


def content(value: Any) -> Hashable:
    """A key of what a value is made of; pure functions with equal keys compute the same.

    A function is its code, and what it closes over: two that one factory returns for equal
    arguments are equal. So are equal numbers, arrays, tuples, and frozen dataclasses such as a
    linen module. Anything else equals itself alone.
    """
    return _content(value, {})


def _content(value: Any, seen: dict[int, tuple[Hashable, Any]]) -> Hashable:
    kind = type(value)
    if kind in _CONSTANTS:
        return kind, value
    if kind in (float, complex):
        return kind, repr(value)  # 0.0 == -0.0, and NaN != NaN
    if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        return kind, value.dtype.str, value.shape, value.tobytes()
    if id(value) in seen:
        return seen[id(value)][0]  # a function may close over itself
    seen[id(value)] = len(seen), value
    parts = _parts(value)
    return Same(value) if parts is None else (kind, *(_content(part, seen) for part in parts))


def _parts(value: Any) -> Sequence[Any] | None:
    """What a value consists of; None = it cannot be known."""
    if isinstance(value, types.FunctionType):
        try:
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
        except ValueError:  # one of them is empty
            return None
        defaults = *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).items()
        return value.__code__, value.__globals__, defaults, *cells
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    if isinstance(value, functools.partial):
        return value.func, value.args, tuple(value.keywords.items())
    if isinstance(value, tuple):
        return value
    if _is_frozen(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return None


def _is_frozen(value: Any) -> bool:
    """Whether a value is a dataclass that cannot change and has nothing but its fields."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return False
    linen = isinstance(value, nn.Module)
    fields = {field.name for field in dataclasses.fields(value)}
    others = getattr(value, "__dict__", {}).keys() - fields - (_OF_LINEN if linen else set())
    parameters: Any = getattr(value, "__dataclass_params__", None)
    return not others and (linen or parameters.frozen)
