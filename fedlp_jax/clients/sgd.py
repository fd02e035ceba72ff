"""What an optax transform does to a gradient, where an algorithm is defined for SGD alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import numpy as np
import optax

from fedlp_jax.errors import FedLPError

_NUMBERS = np.array([3.0, -2.0, 0.5], np.float32)  # of the parameters and gradients of a trial
_STEPS = 4
_TOLERANCE = 1e-5


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
    found = _trial(optimizer)
    if found is None or (found.momentum and not momentum):
        kinds = "optax.sgd(rate)" + " or optax.sgd(rate, momentum)" * momentum
        raise FedLPError(
            f"{algorithm} is defined for plain SGD{' with or without momentum' * momentum}, and "
            f"client_optimizer does something else; give {kinds}, without schedule, weight decay "
            f"or {'Nesterov' if momentum else ''} momentum, or take another algorithm, such as "
            "fl.fedprox or fl.fedadam, which allow any client optimizer."
        )
    return found


def _trial(optimizer: optax.GradientTransformation) -> SGD | None:
    """The numbers of which `_STEPS` steps of SGD with other gradients would be these."""
    params = jax.numpy.asarray(_NUMBERS)
    impulse = [params[::-1], *[params * 0] * (_STEPS - 1)]
    with jax.numpy_dtype_promotion("standard"):
        try:
            first = _answers(optimizer, params, impulse)
            steady = _answers(optimizer, params, [params] * _STEPS)
        except TypeError:  # it wants more than gradients and parameters
            return None
    rate = float(-steady[0][0] / _NUMBERS[0])
    if not 0 < rate < math.inf:
        return None
    momentum = float(first[1][0] / (-rate * _NUMBERS[-1]))
    share = momentum ** np.arange(_STEPS)[:, None]  # of a gradient, s steps later
    alike = np.allclose(first, -rate * share * _NUMBERS[::-1], _TOLERANCE, _TOLERANCE * rate)
    steadily = np.allclose(steady, -rate * share.cumsum(axis=0) * _NUMBERS, _TOLERANCE)
    return SGD(rate, momentum) if alike and steadily else None


def _answers(
    optimizer: optax.GradientTransformation, params: jax.Array, gradients: list[jax.Array]
) -> np.ndarray:
    """The updates of successive steps, `[steps, n]`; the parameters stay where they are."""
    state, updates = optimizer.init(params), []
    for gradient in gradients:
        update, state = optimizer.update(gradient, state, params)
        updates.append(np.asarray(update, np.float64))
    return np.stack(updates)
