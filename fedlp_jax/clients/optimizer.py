"""What an optax optimizer is told, by clients and by the server."""

from __future__ import annotations

from typing import Any

import optax

from fedlp_jax.errors import FedLPError
from fedlp_jax.types import PyTree


def updates_of(
    optimizer: optax.GradientTransformation,
    gradient: PyTree,
    state: PyTree,
    params: PyTree,
    whose: str,
    **more: Any,
) -> tuple[PyTree, PyTree]:
    """What an optimizer makes of a gradient; call it under standard promotion, as optax needs.

    Args:
      optimizer: any optax transform.
      gradient: tree like `params`.
      state: the optimizer's.
      params: a tree of any floats.
      whose: optimizer it is, "client" or "server", for the error.
      **more: what it is told if it asks, by optax's names, such as the loss as `value`.

    Returns:
      The updates, which are to be added to `params`, and the new state.

    Raises:
      FedLPError: it asks for more, as line searches do.
    """
    told = optax.with_extra_args_support(optimizer)
    try:
        return told.update(gradient, state, params, **more)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        known = ", ".join(["gradient", "parameters", *more])
        raise FedLPError(
            f"the {whose}'s optimizer asks for more than it can be told ({known}): {error}. Take "
            "one such as optax.sgd or optax.adam."
        ) from error
