"""FedOpt: FedAvg with momentum or an adaptive optimizer on the server.

FedAvgM (Hsu et al., arXiv:1909.06335) and the adaptive three of Reddi et al. (ICLR 2021,
arXiv:2003.00295, Algorithm 2). With d the aggregate of the updates x_k - x:

    fedavgm      v = beta v + d                                   x' = x + eta v
    fedadagrad   v = v + d^2                                      x' = x + eta m / (sqrt(v) + tau)
    fedadam      v = b2 v + (1 - b2) d^2                          "
    fedyogi      v = v - (1 - b2) d^2 sign(v - d^2)               "
                 m = b1 m + (1 - b1) d

As in the paper, no bias is corrected (optax's adam and yogi do), and v starts at tau^2. A layer
that nobody sent keeps its m and v. All numbers are arguments of the compiled round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.compose import compose
from fedlp_jax.errors import check_number
from fedlp_jax.pruning import masks
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import Array, PyTree, cast_like


class FedOptState(NamedTuple):
    """State of the server optimizer."""

    m: PyTree  # running mean of the update
    v: PyTree  # running mean, or sum, of its square; () without one
    numbers: dict[str, Array]  # f32[] each


def fedavgm(
    task: Task,
    *,
    client_optimizer: optax.GradientTransformation,
    server_learning_rate: float = 1.0,
    beta: float = 0.9,
    keep: masks.Keep = 1.0,
    **settings: Any,
) -> Algorithm:
    """FedAvgM: momentum on the server; beta = 0 at rate 1 is FedAvg.

    Args:
      task: what is learnt.
      client_optimizer: any optax transform.
      server_learning_rate: eta.
      beta: of the momentum, in [0, 1).
      keep: the probability with which a layer is sent, as in `fedlp_homo`.
      **settings: as in `compose` (epochs, batch_size, submodels, aggregator, ...).

    Raises:
      FedLPError: a number out of range.
    """
    numbers = {
        "eta": check_number("server_learning_rate", server_learning_rate, gt=0),
        "beta": check_number("beta", beta, ge=0, lt=1),
    }

    def init(params: PyTree) -> FedOptState:
        return FedOptState(jax.tree.map(jnp.zeros_like, params), (), _arrays(numbers))

    def update(gradient: PyTree, state: FedOptState, params: Any = None) -> Any:
        del params
        n = state.numbers
        m = jax.tree.map(lambda m, g: n["beta"] * m - g, state.m, gradient)  # g = -d
        m = cast_like(m, state.m)
        return jax.tree.map(lambda m: n["eta"] * m, m), state._replace(m=m)

    server = optax.GradientTransformation(init, update)
    return _composed(task, client_optimizer, keep, server, settings)


def fedadagrad(
    task: Task,
    *,
    client_optimizer: optax.GradientTransformation,
    server_learning_rate: float = 0.1,
    b1: float = 0.0,
    tau: float = 0.01,
    keep: masks.Keep = 1.0,
    **settings: Any,
) -> Algorithm:
    """FedAdagrad: Adagrad on the server. Defaults are those of the paper's CIFAR-10 rows.

    Args:
      task: what is learnt.
      client_optimizer: any optax transform.
      server_learning_rate: eta.
      b1: of the running mean of updates, in [0, 1).
      tau: what keeps the divisor from 0.
      keep: the probability with which a layer is sent, as in `fedlp_homo`.
      **settings: as in `compose` (epochs, batch_size, submodels, aggregator, ...).

    Raises:
      FedLPError: a number out of range.
    """
    server = _adaptive(lambda v, d2, b2: v + d2, server_learning_rate, b1, 0.0, tau)
    return _composed(task, client_optimizer, keep, server, settings)


def fedadam(
    task: Task,
    *,
    client_optimizer: optax.GradientTransformation,
    server_learning_rate: float = 0.01,
    b1: float = 0.9,
    b2: float = 0.99,
    tau: float = 1e-3,
    keep: masks.Keep = 1.0,
    **settings: Any,
) -> Algorithm:
    """FedAdam: Adam without bias correction on the server; `b2` in [0, 1], else as `fedadagrad`."""
    server = _adaptive(lambda v, d2, b2: b2 * v + (1 - b2) * d2, server_learning_rate, b1, b2, tau)
    return _composed(task, client_optimizer, keep, server, settings)


def fedyogi(
    task: Task,
    *,
    client_optimizer: optax.GradientTransformation,
    server_learning_rate: float = 0.01,
    b1: float = 0.9,
    b2: float = 0.99,
    tau: float = 1e-3,
    keep: masks.Keep = 1.0,
    **settings: Any,
) -> Algorithm:
    """FedYogi: Yogi without bias correction on the server; arguments as in `fedadam`."""
    server = _adaptive(
        lambda v, d2, b2: v - (1 - b2) * d2 * jnp.sign(v - d2), server_learning_rate, b1, b2, tau
    )
    return _composed(task, client_optimizer, keep, server, settings)


def _composed(
    task: Task,
    client_optimizer: optax.GradientTransformation,
    keep: masks.Keep,
    server_optimizer: optax.GradientTransformation,
    settings: dict[str, Any],
) -> Algorithm:
    return compose(
        task,
        client_optimizer=client_optimizer,
        policy=masks.bernoulli(keep),
        server_optimizer=server_optimizer,
        **settings,
    )


def _adaptive(
    second: Callable[[Array, Array, Array], Array], eta: float, b1: float, b2: float, tau: float
) -> optax.GradientTransformation:
    """The optimizer whose v becomes `second(v, d^2, b2)`."""
    numbers = {
        "eta": check_number("server_learning_rate", eta, gt=0),
        "b1": check_number("b1", b1, ge=0, lt=1),
        "b2": check_number("b2", b2, ge=0, le=1),
        "tau": check_number("tau", tau, gt=0),
    }

    def init(params: PyTree) -> FedOptState:
        v = jax.tree.map(lambda x: jnp.full_like(x, tau**2), params)
        return FedOptState(jax.tree.map(jnp.zeros_like, params), v, _arrays(numbers))

    def update(gradient: PyTree, state: FedOptState, params: Any = None) -> Any:
        del params
        n = state.numbers
        m = jax.tree.map(lambda m, g: n["b1"] * m - (1 - n["b1"]) * g, state.m, gradient)
        v = jax.tree.map(lambda v, g: second(v, g * g, n["b2"]), state.v, gradient)
        step = jax.tree.map(lambda m, v: n["eta"] * m / (jnp.sqrt(v) + n["tau"]), m, v)
        return step, FedOptState(cast_like(m, state.m), cast_like(v, state.v), n)

    return optax.GradientTransformation(init, update)


def _arrays(numbers: dict[str, float]) -> dict[str, Array]:
    return {name: jnp.float32(value) for name, value in numbers.items()}
