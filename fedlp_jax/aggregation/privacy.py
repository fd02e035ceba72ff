"""Central differential privacy at the level of clients: clip, sum, add noise, account.

The mechanism of one round, given the cohort of C clients and the layer masks m. Neither depends on
anybody's data:

    v_k = (m_{k,l} d_{k,l})_l                 client k's update, zero where it sent nothing
    c_k = min(1, S / |v_k|)                   so that |c_k v_k| <= S over all layers together
    r_l = s_l (sum_k c_k v_{k,l} + z S n) / C       n standard normal; what the server learns

The divisor C is the number of clients asked for, a constant. The mean over senders (masked_mean)
divides each layer by who sent it and counted, and weights by examples depend on how much data a
client has. Both would have to be protected as well, so they are refused. `s_l` is 1 for
cohort_mean. For inverse_probability a client's layer enters the sum as `v_{k,l} / p_{k,l}`, and
`s_l = max_k 1 / p_{k,l}` over the cohort: in the coordinates `r_l / s_l`, which anybody can
compute, each client adds at most `p_min / p_{k,l} <= 1` times its clipped update. Hence noise of
standard deviation `z S s_l / C` in layer l.

Sensitivity. Replacing one client of K by another changes the sum, in these coordinates, by at most
`|c_k v_k| + |c'_k v'_k| <= 2 S` in L2 norm, whatever the masks. So the noise multiplier in units of
the sensitivity is z / 2. A client that fails adds zero and changes no divisor. Where a round takes
the first clients to arrive, the replaced client can push out one other, or let one in: still two
vectors of norm S. Noise is drawn for every layer that a chosen client was to send, whether it
arrived or not. A layer outside all masks is not released and keeps its value.

Accounting. The cohort is drawn uniformly without replacement and always has the same size: that is
`SampledWithoutReplacementDpEvent` of dp-accounting with its Renyi accountant (Wang, Balle and
Kasiviswanathan, arXiv:1808.00087) under replace-one neighbours. dp-accounting 0.6 takes the noise
multiplier there in units of the sensitivity, so it is given z / 2
(https://github.com/google/differential-privacy/issues/378). A user's cohort function has unknown
odds, so then every round counts as if everybody took part.

Not covered: training metrics (train_loss and the like) and modelled times, which a simulation
exists to show; the fact that a run stops because no update is finite; and the seed, which reveals
the noise to anyone who knows it. The keep rate and the depth of a client are taken to be public.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedlp_jax.errors import FedLPError, check_number
from fedlp_jax.prng import SERVER, Purpose, client_key
from fedlp_jax.pruning.layers import LayerTable
from fedlp_jax.types import Array, PyTree, Variables


@dataclasses.dataclass(frozen=True)
class Privacy:
    """Client-level differential privacy of a run; see the module.

    Attributes:
      clip: S, the largest L2 norm of a client's update.
      noise_multiplier: z, standard deviation of the noise in the sum, in units of S.
      delta: of (epsilon, delta); below 1 / K.
    """

    clip: float
    noise_multiplier: float
    delta: float = 1e-5


class Clipped(NamedTuple):
    """State of a reducer that receives clipped updates."""

    inner: PyTree
    clip: Array  # f32[], S
    noise: Array  # f32[], z; 0 = clipped without noise


def clipped_state(inner: PyTree, clip: float, noise: float) -> Clipped:
    """The state of a reducer that receives updates clipped to a norm."""
    return Clipped(inner, jnp.asarray(clip, jnp.float32), jnp.asarray(noise, jnp.float32))


def check_privacy(privacy: Privacy) -> None:
    """Checks the three numbers.

    Raises:
      FedLPError: with the name and the value.
    """
    check_clip("privacy.clip", privacy.clip)
    hint = "without noise nothing is private: use clip alone"
    check_number("privacy.noise_multiplier", privacy.noise_multiplier, gt=0, hint=hint)
    check_number("privacy.delta", privacy.delta, gt=0, lt=1)


def check_clip(name: str, clip: float) -> None:
    """Checks a bound on the norm of an update.

    Raises:
      FedLPError: not a number above 0.
    """
    check_number(name, clip, gt=0, hint="it is the largest norm of an update")


def check_private(variables: Variables) -> None:
    """Refuses a model with batch statistics, which clipping parameters would not cover.

    Raises:
      FedLPError: with their number.
    """
    statistics = {name: tree for name, tree in variables.items() if name != "params"}
    count = len(jax.tree.leaves(statistics))
    if count:
        raise FedLPError(
            f"privacy covers parameters, but this model also sends {count} tensors of batch "
            "statistics, which would leak; use a model without batch normalisation."
        )


def clipped(update: Variables, mask: Array, bound: Array, layers: LayerTable) -> Variables:
    """Clips the norm of ONE client's update.

    `u min(1, S / |u|)`, the norm taken over the parameters of the layers sent
    (McMahan et al., arXiv:1710.06963; against backdoors: Sun et al., arXiv:1911.07963). Batch
    statistics are scaled by the same factor.

    Args:
      update: tree, of any submodel.
      mask: `f32[L]`; what is not sent is not read, and may be NaN.
      bound: `f32[]`, S.
      layers: the table of `update`.
    """
    sent = layers.expand(mask > 0)

    def squares(u: Array, s: Array) -> Array:
        return (jnp.where(s, u, jnp.zeros_like(u)) ** 2).sum()

    parts = jax.tree.leaves(jax.tree.map(squares, update["params"], sent["params"]))
    norm = jnp.sqrt(sum(parts[1:], parts[0]))
    bound = bound.astype(norm.dtype)
    factor = jnp.where(norm > bound, bound / jnp.where(norm > 0, norm, bound), 1.0)
    return jax.tree.map(lambda u: u * factor.astype(u.dtype), update)


def noised(
    update: Variables, key: Array, round: Array, deviation: Array, layers: LayerTable
) -> Variables:
    """Adds Gaussian noise to the parameters of an aggregate.

    Args:
      update: the aggregate.
      key: the run's root key.
      round: `i32[]`.
      deviation: `f32[L]`, standard deviation in each layer.
      layers: the layer table.
    """
    key = client_key(key, round, SERVER, Purpose.NOISE)
    leaves, treedef = jax.tree.flatten(update["params"])
    scale = jax.tree.leaves(layers.expand(deviation)["params"])
    noisy = [
        leaf
        + s.astype(leaf.dtype)
        * jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)
        for i, (leaf, s) in enumerate(zip(leaves, scale, strict=True))
    ]
    return {**update, "params": jax.tree.unflatten(treedef, noisy)}


def accountant(
    privacy: Privacy | None, clients: int, chosen: int, sampled: bool = True
) -> Callable[[int], float] | None:
    """Builds `epsilon(rounds)` at the delta of `privacy`; None without privacy.

    Args:
      privacy: the mechanism.
      clients: K.
      chosen: clients chosen a round, with over-selection.
      sampled: they are drawn uniformly without replacement; False = in an unknown way.

    Raises:
      FedLPError: dp-accounting is not installed, or delta is not below 1 / K.
    """
    if privacy is None:
        return None
    if privacy.delta * clients >= 1:
        raise FedLPError(
            f"privacy.delta={privacy.delta:g} is not below 1 / K = {1 / clients:g}, which would "
            "allow publishing one client's update; lower it."
        )
    try:
        import dp_accounting as dp
    except ImportError as error:
        raise FedLPError(
            "privacy needs dp-accounting: pip install 'fedlp-jax[privacy]', or pip install "
            "dp-accounting."
        ) from error
    event: dp.DpEvent = dp.GaussianDpEvent(privacy.noise_multiplier / 2)
    if sampled:
        event = dp.SampledWithoutReplacementDpEvent(clients, chosen, event)

    one = dp.rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    one.compose(event)  # about a second; Renyi divergences of rounds add up

    def epsilon(rounds: int) -> float:
        if rounds == 0:
            return 0.0
        return float(dp.rdp.compute_epsilon(one.orders, rounds * one.rdp, privacy.delta)[0])

    return epsilon
