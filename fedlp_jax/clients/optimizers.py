"""What an optimizer must do here, checked before anything compiles."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedlp_jax.clients.local_training import optimizer_step
from fedlp_jax.errors import FedLPError, warn, why
from fedlp_jax.types import Array, PyTree

# What some transforms of optax need and do not get here.
_NEEDS = {
    "lookahead": "parameters of its own kind, optax.LookaheadParams",
    "differentially_private_aggregate": "the gradient of every single example (for the privacy of "
    "whole clients, pass privacy=fl.Privacy(...))",
}
_ACCUMULATING = (optax.MultiStepsState, optax.ApplyEvery)
_SCHEDULED = (optax.ScaleByScheduleState, optax.InjectStatefulHyperparamsState)


def check_optimizer(role: str, optimizer: optax.GradientTransformation, params: PyTree) -> None:
    """Traces one step of an optimizer on a tree of these shapes.

    Args:
      role: "client" or "server".
      optimizer: any optax transform.
      params: shapes of the model's parameters.

    Raises:
      FedLPError: it cannot take such a tree, or returns updates or a state of another structure.
    """
    gives_loss = {"value": jnp.zeros(()), "grad": params} if role == "client" else {}

    def step(params: PyTree, gives_loss: dict[str, Any]) -> tuple[PyTree, PyTree, PyTree]:
        with jax.numpy_dtype_promotion("standard"):
            state = optimizer.init(params)
            return state, *optimizer_step(role, optimizer, params, state, params, **gives_loss)

    try:
        state, updates, new_state = jax.eval_shape(step, params, gives_loss)
    except FedLPError:
        raise
    except Exception as error:  # optax raises whatever its transforms run into
        name = _culprit(error) or _name(optimizer)
        gets = "the tree of this model's parameters and of their gradient"
        fails = f"cannot take {gets}"
        if name in _NEEDS:
            fails = f"needs {_NEEDS[name]}, but gets {gets}"
        raise FedLPError(
            f"{role}_optimizer: {name} {fails} ({type(error).__name__}: {why(error)}). Use one "
            "that takes those, such as optax.sgd or optax.adam."
        ) from error
    for what, have, want in (
        ("updates", _shapes(updates), _shapes(params)),
        ("a state", _forms(new_state), _forms(state)),
    ):
        if have != want:
            raise FedLPError(
                f"{role}_optimizer: {_name(optimizer)} returns {what} of another structure or "
                f"shape than it was given: {_difference(want, have)}. Make them the same."
            )


def warn_of_restarts(
    optimizer: optax.GradientTransformation, params: PyTree, steps: np.ndarray
) -> None:
    """Warns of what an optimizer cannot do because it restarts in every round.

    Args:
      optimizer: of the clients; `check_optimizer` accepts it.
      params: shapes of the model's parameters.
      steps: `i64[K]`, local steps of each client in a round.
    """
    with jax.numpy_dtype_promotion("standard"):
        state = jax.eval_shape(optimizer.init, params)
    kinds = _ACCUMULATING + _SCHEDULED
    parts = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds))
    parts = [x for x in parts if getattr(x, "hyperparams_states", True)]  # empty for plain numbers
    new = "each client starts a new client_optimizer in each round"
    if any(jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(state)):
        warn(
            f"{new}, and it draws random numbers from a key in its state, so all clients draw the "
            "same ones in all rounds. Draw them in task.loss, from the key that it gets.",
            stacklevel=2,
        )
    if not any(isinstance(part, kinds) for part in parts):
        return
    most, least = int(steps.max()), int(steps[steps > 0].min(initial=steps.max()))
    if not _moves(optimizer, params, most):
        warn(
            f"{new}, and in the {most} local steps of a round it moves no parameter, so nothing is "
            "ever learnt. Let it collect fewer gradients or start its schedule above 0, or raise "
            "epochs or steps.",
            stacklevel=2,
        )
    elif not _moves(optimizer, params, least):
        warn(
            f"{new}, and clients with few examples take only {least} steps a round, in which it "
            "moves no parameter. Let it collect fewer gradients, or raise epochs or steps.",
            stacklevel=2,
        )
    elif any(isinstance(part, _SCHEDULED) for part in parts):
        warn(
            f"{new}, so its schedule starts again after at most {most} steps. For one that "
            "goes on, pass client_schedule=, a function of the round.",
            stacklevel=2,
        )


def _moves(optimizer: optax.GradientTransformation, params: PyTree, steps: int) -> bool:
    """Whether any of the first steps changes a tree of ones whose gradients are ones."""
    # One entry for each array: only the structure counts.
    ones = jax.tree.map(lambda x: jnp.ones((1,) * x.ndim, x.dtype), params)

    @jax.jit
    def run(steps: int) -> Array:
        def step(_: Any, carry: Any) -> Any:
            state, moved = carry
            loss = {"value": jnp.ones(()), "grad": ones}
            updates, state = optimizer_step("client", optimizer, ones, state, ones, **loss)
            changed = [(update != 0).any() for update in jax.tree.leaves(updates)]
            return state, moved | jnp.stack(changed).any()

        start = (optimizer.init(ones), jnp.zeros((), bool))
        return jax.lax.fori_loop(0, steps, step, start)[1]

    with jax.numpy_dtype_promotion("standard"):
        return bool(run(steps))


def _name(optimizer: Any) -> str:
    """`"optax.lookahead"` -> `"lookahead"`: the function or class that made a transform."""
    return getattr(optimizer.init, "__qualname__", type(optimizer).__name__).split(".")[0]


def _culprit(error: BaseException) -> str | None:
    """The innermost transform in which an error was raised."""
    names = [
        frame.f_code.co_qualname.split(".")[0]
        for frame in _frames(error.__traceback__)
        if frame.f_globals.get("__name__", "").startswith("optax")
        and "<locals>" in frame.f_code.co_qualname
    ]
    return names[-1] if names else None


def _frames(traceback: TracebackType | None) -> Iterator[Any]:
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def _shapes(tree: PyTree) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path): list(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _forms(tree: PyTree) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _difference(want: dict[str, Any], have: dict[str, Any]) -> str:
    """The first path at which two descriptions differ."""
    for path in sorted(want | have):
        if want.get(path) != have.get(path):
            return f"{path} is {want.get(path, 'nothing')} and becomes {have.get(path, 'nothing')}"
    return "the nodes differ"
