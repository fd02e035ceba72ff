"""What an optax transform does to a gradient, where an algorithm is defined for SGD alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedlp_jax.errors import FedLPError
from fedlp_jax.types import PyTree

_NUMBERS = np.array([3.0, -2.0, 0.5], np.float32)  # of the parameters and gradients of a trial
_STEPS = 4
_TOLERANCE = 1e-5
# (factor on the gradients, steps before): a clip shows at one, a schedule at another.
_TRIALS = [(1.0, 0), (1e-3, 0), (1e3, 0), *((1.0, n) for n in (7, 60, 500, 4_000, 100_000))]


class SGD(NamedTuple):
    """`v = momentum v + g; x = x - rate v`."""

    rate: float
    momentum: float


def as_sgd(optimizer: optax.GradientTransformation, algorithm: str, momentum: bool) -> SGD:
    """The numbers of an SGD optimizer, found by a few trial steps.

    Args:
      optimizer: of a client.
      algorithm: named in the message.
      momentum: heavy-ball momentum is understood too.

    Raises:
      FedLPError: it is another optimizer, or it has settings besides these.
    """
    found = _tried(optimizer, jnp.asarray(_NUMBERS), _TRIALS)[0]
    if found is None or not found.rate or (found.momentum and not momentum):
        kinds = "optax.sgd(rate)" + " or optax.sgd(rate, momentum)" * momentum
        raise FedLPError(
            f"{algorithm} is defined for plain SGD{' with or without momentum' * momentum}, and "
            f"client_optimizer does something else; give {kinds}, without schedule, clipping, "
            f"weight decay or {'Nesterov ' * momentum}momentum, for parameters of any name (an "
            "optimizer that freezes by name has to name what it freezes, in a function of the "
            "parameters), or take another algorithm, such as fl.fedprox or fl.fedadam, which allow "
            "any client optimizer."
        )
    return found


def check_same_sgd(
    optimizer: optax.GradientTransformation, params: PyTree, shared: PyTree, sgd: SGD
) -> None:
    """Refuses an optimizer that treats parameters differently, by their names or ranks.

    Args:
      optimizer: of a client.
      params: of the model.
      shared: those of them that clients share; a head of their own may have a rate of its own.
      sgd: what `as_sgd` found. A parameter that the optimizer never moves is right too.

    Raises:
      FedLPError: some parameter has another rate or momentum.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    small = jax.tree.map(lambda x: jnp.asarray(_NUMBERS).reshape(*[1] * (x.ndim - 1), 3), params)
    sent = {path for path, _ in jax.tree_util.tree_leaves_with_path(shared)}
    trials = [_TRIALS[0], (1e3, 100_000)]
    for path, found in zip(paths, _tried(optimizer, small, trials), strict=True):
        if path not in sent:
            continue
        if found is None or (found.rate and not np.allclose(found, sgd, _TOLERANCE)):
            raise FedLPError(
                f"this algorithm needs one rate for all parameters, {sgd.rate:g} with momentum "
                f"{sgd.momentum:g}, but client_optimizer treats {jax.tree_util.keystr(path)} "
                "otherwise; give optax.sgd(rate), or take an algorithm such as fl.fedprox, which "
                "allows any client optimizer."
            )


def _tried(
    optimizer: optax.GradientTransformation, params: PyTree, trials: Sequence[tuple[float, int]]
) -> list[SGD | None]:
    """For each leaf the numbers of which all trials would be steps; of rate 0 if it stays.

    All are None if the object is no optimizer, or one of other parameters.
    """
    try:
        with jax.numpy_dtype_promotion("standard"):
            found = [_trial(optimizer, params, *one) for one in trials]
    except (AttributeError, LookupError, TypeError, ValueError):
        return [None] * len(jax.tree.leaves(params))
    return [_agreed(of_leaf) for of_leaf in zip(*found, strict=True)]


def _agreed(found: Sequence[SGD | None]) -> SGD | None:
    """What all trials found; None = they found different numbers, or one found none."""
    first, *others = found
    if first is None or not all(x and np.allclose(x, first, _TOLERANCE) for x in others):
        return None
    return first


def _trial(
    optimizer: optax.GradientTransformation, params: PyTree, factor: float, count: int
) -> list[SGD | None]:
    """For each leaf, the numbers of which steps with other gradients would be these."""
    steady = jax.tree.map(lambda x: x * factor, params)
    impulse = jax.tree.map(lambda x: x[..., ::-1], steady)
    zero = jax.tree.map(jnp.zeros_like, params)
    answers = [
        _answers(optimizer, params, gradients, count)
        for gradients in ([impulse, *[zero] * (_STEPS - 1)], [steady] * _STEPS)
    ]
    return [_fitted(*(x / factor for x in pair)) for pair in zip(*answers, strict=True)]


def _fitted(first: np.ndarray, steady: np.ndarray) -> SGD | None:
    """The numbers of SGD, from updates `[steps, n]` after one gradient and under a steady one."""
    if not (first.any() or steady.any()):
        return SGD(0.0, 0.0)
    rate = float(-steady[0][0] / _NUMBERS[0])
    if not 0 < rate < math.inf:
        return None
    momentum = float(first[1][0] / (-rate * _NUMBERS[-1]))
    share = momentum ** np.arange(_STEPS)[:, None]  # of a gradient, s steps later
    alike = np.allclose(first, -rate * share * _NUMBERS[::-1], _TOLERANCE, _TOLERANCE * rate)
    steadily = np.allclose(steady, -rate * share.cumsum(axis=0) * _NUMBERS, _TOLERANCE)
    return SGD(rate, momentum) if alike and steadily else None


def _answers(
    optimizer: optax.GradientTransformation, params: PyTree, gradients: list[PyTree], count: int
) -> list[np.ndarray]:
    """The updates of each leaf in successive steps, `[steps, n]`; parameters stay as they are."""

    def counted(path: Any, x: Any) -> Any:
        # A hyperparameter may be a whole number; the others count steps.
        held = any(getattr(key, "name", "") in ("hyperparams", "mini_step") for key in path)
        return x if held or not jnp.issubdtype(jnp.result_type(x), jnp.integer) else x + count

    state, updates = jax.tree_util.tree_map_with_path(counted, optimizer.init(params)), []
    for gradient in gradients:
        update, state = optimizer.update(gradient, state, params)
        updates.append([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(update)])
    return [np.stack(of_leaf) for of_leaf in zip(*updates, strict=True)]
