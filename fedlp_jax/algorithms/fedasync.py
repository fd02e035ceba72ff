"""FedAsync: asynchronous federated optimization (Xie et al., 2019, arXiv:1903.03934)."""

from __future__ import annotations

from typing import Any

import optax

from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.compose import compose
from fedlp_jax.clients.asynchrony import Discount, asynchrony
from fedlp_jax.clients.devices import Profile
from fedlp_jax.errors import check_number
from fedlp_jax.pruning import masks
from fedlp_jax.tasks.task import Task


def fedasync(
    task: Task,
    *,
    client_optimizer: optax.GradientTransformation,
    profile: Profile | None = None,
    alpha: float = 0.6,
    max_staleness: int = 16,
    discount: Discount = "polynomial",
    exponent: float = 0.5,
    slope: float = 10.0,
    grace: float = 4.0,
    keep: masks.Keep = 1.0,
    **settings: Any,
) -> Algorithm:
    """FedAsync: the server mixes in each client's model as it arrives.

    `x' = (1 - alpha s(tau)) x + alpha s(tau) x_k`, tau the age of the version that client k
    received. `fl.simulate(cohort=M)` keeps M clients in flight, and a round is one arrival. Times
    are modelled as in `fedbuff`. The paper's proximal term is `fedprox`'s, and is left out. With
    `upload` or `clip`, x_k is the version that the client received plus its change as the server
    decodes and clips it.

    Args:
      task: what is learnt.
      client_optimizer: any optax transform.
      profile: the clients' devices; required.
      alpha: the mixing rate, in (0, 1].
      max_staleness: the largest tau; older models are discarded. The devices hold
        `max_staleness + 1` versions of the model.
      discount: s: "constant": 1; "polynomial": `(1 + tau)^-exponent`; "hinge": 1 up to `grace`,
        then `1 / (slope (tau - grace) + 1)`.
      exponent: of the polynomial.
      slope: of the hinge.
      grace: of the hinge.
      keep: the probability with which a layer is sent, as in `fedbuff`.
      **settings: as in `compose` (epochs, batch_size, ...).
    """
    alpha = check_number("alpha", alpha, gt=0, le=1)
    return compose(
        task,
        client_optimizer=client_optimizer,
        policy=masks.bernoulli(keep),
        asynchrony=asynchrony(
            profile,
            1,
            max_staleness,
            discount,
            rate=alpha,
            exponent=exponent,
            slope=slope,
            grace=grace,
            mixes=True,
        ),
        **settings,
    )
