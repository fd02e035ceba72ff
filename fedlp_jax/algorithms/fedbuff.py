"""FedBuff: buffered asynchronous aggregation (Nguyen et al., AISTATS 2022, arXiv:2106.06639)."""

from __future__ import annotations

from typing import Any, Literal

import optax

from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.compose import compose
from fedlp_jax.clients.asynchrony import Discount, asynchrony
from fedlp_jax.clients.devices import Profile
from fedlp_jax.pruning import masks
from fedlp_jax.tasks.task import Task


def fedbuff(
    task: Task,
    *,
    buffer: int,
    client_optimizer: optax.GradientTransformation,
    profile: Profile | None = None,
    max_staleness: int = 16,
    discount: Discount = "polynomial",
    exponent: float = 0.5,
    weighting: Literal["examples", "uniform"] = "uniform",
    keep: masks.Keep = 1.0,
    **settings: Any,
) -> Algorithm:
    """FedBuff: the server steps whenever a buffer of updates is full; nobody waits.

    `x' = x + 1/B sum_{k in buffer} s(tau_k) (x_k - x_{t_k})`, x_{t_k} the version that client k
    received and tau_k its age, `s(tau) = (1 + tau)^-exponent`. `fl.simulate(cohort=M)` keeps M
    clients in flight, and a round is one update of the server. Times are modelled: `simulated_time`
    is that since the update before; an upload takes that of its expected size. `upload` and `clip`
    apply to `x_k - x_{t_k}`, which is what the client sends; the server then discounts it.

    Args:
      task: what is learnt.
      buffer: B, at most M.
      client_optimizer: any optax transform.
      profile: the clients' devices; required.
      max_staleness: the largest tau; older updates are discarded. The devices hold
        `max_staleness + 1` versions of the model.
      discount: "polynomial", or "constant": s = 1.
      exponent: of the polynomial; 1/2 in the paper.
      weighting: a_k; in the paper all updates count alike.
      keep: the probability with which a layer is sent, as in `fedlp_homo`; a schedule is read in
        the round of the arrival, `client_schedule` in that in which the client began.
      **settings: as in `compose` (epochs, batch_size, server_optimizer, ...).
    """
    return compose(
        task,
        client_optimizer=client_optimizer,
        policy=masks.bernoulli(keep),
        weighting=weighting,
        asynchrony=asynchrony(profile, buffer, max_staleness, discount, exponent=exponent),
        **settings,
    )
