"""A network as pure functions of a dict of variables, and the warnings on what is assumed of it."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from fedlp_jax.errors import warner
from fedlp_jax.tasks.padding import mixes_rows
from fedlp_jax.types import Array, Variables

STATISTICS = "batch_stats"  # the collection of that name

_TRAIN = ("train", "training", "is_training")  # switches that are True while training
_EVALUATE = ("deterministic", "use_running_average", "inference")  # and False while training
IDLE = (
    "the model has batch statistics or dropout but uses neither in training; switch it by an "
    f"argument of __call__ named {' or '.join(_TRAIN + _EVALUATE)}. (If that is on purpose, ignore "
    "this.)"
)
_MIXING = (
    "the model may combine rows of a batch outside of BatchNorm, and some batches are padded, so "
    "padding rows may enter; choose a batch_size that divides the number of examples of every "
    "client, or compute each row by itself."
)


class Apply(Protocol):
    """A network as a function of its variables."""

    def __call__(
        self, variables: Variables, inputs: Array, key: Array | None, valid: Array | None
    ) -> tuple[Any, Variables]:
        """Runs the network.

        Args:
          variables: as `init` returns them.
          inputs: `f32[B, ...]`, normalised.
          key: trains, with dropout by this key; None = evaluates.
          valid: `bool[B]`, rows that may enter batch statistics; None = all.

        Returns:
          `(outputs, statistics)`: the updated collections other than "params".
        """


class Network(NamedTuple):
    """A model as pure functions."""

    init: Callable[[Array, Array], Variables]  # (key, inputs f32[B, ...]) -> variables
    apply: Apply
    at_depth: Callable[[int], Network] | None = None
    depth: int = 1  # number of submodels, depths 1 to `depth`; the deepest is the whole model
    at_width: Callable[[float], Network] | None = None  # rate -> the network with fewer channels


# As `Apply`, and sentences to say if this is training.
Run = Callable[[Variables, Array, "Array | None", "Array | None"], tuple[Any, Variables, list[str]]]


def with_warnings(run: Run) -> Apply:
    """Says what is assumed of a model: of its training switch, padding and variables."""
    warn = warner()
    mixing: bool | None = None

    def apply(
        variables: Variables, inputs: Array, key: Array | None, valid: Array | None
    ) -> tuple[Any, Variables]:
        nonlocal mixing
        outputs, statistics, sentences = run(variables, inputs, key, valid)
        if key is None:
            return outputs, statistics
        if _unchanged(variables, statistics):
            sentences.append(IDLE)
        if valid is not None:
            if mixing is None:
                rest = (variables, key)
                mixing = mixes_rows(lambda r, x, v: run(r[0], x, r[1], v)[:2], rest, inputs, valid)
            if mixing:
                sentences.append(_MIXING)
        for sentence in dict.fromkeys(sentences):
            warn(sentence)
        return outputs, statistics

    return apply


def _unchanged(variables: Variables, statistics: Variables) -> bool:
    """Whether there are batch statistics, and a step returned the very same arrays."""
    before = jax.tree.leaves({name: variables[name] for name in statistics})
    after = jax.tree.leaves(statistics)
    same = len(before) == len(after) and all(map(operator.is_, before, after))
    return bool(before) and same


def any_promotion() -> contextlib.AbstractContextManager[Any]:
    """Allows flax's own layers to mix dtypes in a process with strict promotion."""
    return jax.numpy_dtype_promotion("standard")


def switches(names: Any) -> Callable[[bool], dict[str, Any]]:
    """`train -> {name: value}` for those of these names that are switches."""
    return lambda train: {
        **{name: train for name in _TRAIN if name in names},
        **{name: not train for name in _EVALUATE if name in names},
    }
