"""Mask policies that learn from each round: which layers moved, who agrees, who has a model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax.errors import FedLPError, check_number
from fedlp_jax.prng import SERVER, Purpose, client_key, uniforms
from fedlp_jax.pruning.layers import LayerTable, squared_norms, sums
from fedlp_jax.pruning.policy import Feedback, MaskPolicy, Masks, always
from fedlp_jax.types import Array, Cohort, PyTree


def receive(rate: float, policy: MaskPolicy) -> MaskPolicy:
    """Clients receive each layer with some probability, and train on with their own of the others.

    `w_{k,l} = x_l` with probability `rate`, else what client k had of layer l at the end of the
    last round in which it took part, even if it did not send that. A client's first round has no
    such model, so that it receives every layer; modelled traffic leaves that out. On the devices
    lies a model per client of the population.

    Args:
      rate: the probability, from 0; another one compiles nothing.
      policy: of the layers to send; one that leaves the download whole. What a client sends of a
        layer is its model, whatever it began with: the aggregate is the mean of `w_{k,l} - x_l`.

    Raises:
      FedLPError: a rate outside [0, 1], or a policy that leaves layers out of the download.
    """
    rate = check_number("the rate of received layers", rate, ge=0, le=1)
    if policy.keeps_models or policy.received is not always:
        raise FedLPError(
            f"masks.receive({rate}, ...) draws what clients receive, but its policy leaves layers "
            "out of the download too, so that a client may never have received one; give a policy "
            "of uploads alone, such as masks.bernoulli."
        )
    uploads, learn_uploads = policy.sample, policy.learn

    def init(layers: LayerTable, clients: int) -> PyTree:
        first = jnp.ones(clients, bool)
        return jnp.asarray(rate, jnp.float32), first, policy.init(layers, clients)

    def sample(
        key: Array, state: PyTree, cohort: Cohort, round: Array, coverage: Array
    ) -> tuple[Masks, PyTree]:
        probability, first, inner = state
        masks, inner = uploads(key, inner, cohort, round, coverage)
        drawn = uniforms(key, round, cohort.client, Purpose.DOWNLOAD, coverage.shape[1])
        received = (drawn < probability) | first[jnp.maximum(cohort.client, 0)][:, None]
        download = jnp.where(received, masks.download, 0.0)
        return masks._replace(download=download), (probability, first, inner)

    def learn(state: PyTree, feedback: Feedback) -> PyTree:
        probability, first, inner = state
        first = _mark(first, feedback, False)
        inner = inner if learn_uploads is None else learn_uploads(inner, feedback)
        return probability, first, inner

    def received(layers: LayerTable, clients: int) -> np.ndarray:
        del layers, clients
        return np.full((1, 1), rate, np.float32)  # but for first rounds

    return policy._replace(
        init=init, sample=sample, received=received, learn=learn, keeps_models=True
    )


def recycling(recycled: int) -> MaskPolicy:
    """Layers whose updates are small rest, the same for all clients: FedLUAR (arXiv:2503.11146).

    `s_l = |d_l| / |x_l|`, d_l the mean update of the round in which layer l was last sent and x_l
    its parameters before that. In every round, `recycled` layers are drawn without replacement,
    each with a probability proportional to `1 / s_l`, and nobody sends them: those with the
    smallest `e_l s_l`, e_l exponential (Efraimidis and Spirakis, 2006).

    A layer is always sent if it has not moved yet, as in the first round, or if no parameter of it
    has two dimensions: biases and norms, where layers are tensors. Within a larger layer they rest
    with it.

    Args:
      recycled: layers that nobody sends in a round, from 0; another number compiles nothing.

    Raises:
      FedLPError: a number below 0; from `init`, one that leaves no such layer to send.
    """
    recycled = check_number("recycled", recycled, ge=0, integer=True)

    def init(layers: LayerTable, clients: int) -> PyTree:
        expected(layers, clients)
        return jnp.asarray(recycled, jnp.int32), jnp.zeros(len(layers), jnp.float32)

    def sample(
        key: Array, state: PyTree, cohort: Cohort, round: Array, coverage: Array
    ) -> tuple[Masks, PyTree]:
        del cohort
        count, score = state
        draw = client_key(key, round, SERVER, Purpose.MASK)
        exponential = -jnp.log1p(-jax.random.uniform(draw, score.shape, jnp.float32))
        able = (score > 0) & jnp.isfinite(score)
        order = jnp.argsort(jnp.where(able, exponential * score, jnp.inf))
        rests = able & (jnp.argsort(order).astype(jnp.int32) < count)
        sent = jnp.where(rests[None], 0.0, coverage)
        return Masks(coverage, sent, jnp.ones_like(sent)), state

    def learn(state: PyTree, feedback: Feedback) -> PyTree:
        count, score = state
        layers = feedback.layers
        moved = jnp.sqrt(squared_norms(feedback.update, layers))
        size = jnp.sqrt(squared_norms(feedback.params, layers))
        new = jnp.where(
            _able(layers) & (feedback.senders > 0), (moved / size).astype(score.dtype), score
        )
        return count, new

    def expected(layers: LayerTable, clients: int) -> np.ndarray:
        """As if all scores were equal; which layers rest more often is known after the training."""
        del clients
        able = len(layers.matrices)
        if recycled >= max(able, 1):
            raise FedLPError(
                f"recycled={recycled} leaves nothing to send of the {able} layers with weights of "
                f"two dimensions or more; give at most {max(able - 1, 0)}."
            )
        rates = np.ones((1, len(layers)), np.float32)
        rates[:, list(layers.matrices)] -= recycled / max(able, 1)
        return rates

    return MaskPolicy(init, sample, expected, learn=learn)


def lazy(interval: int) -> MaskPolicy:
    """Layers in which clients agree are sent once in some rounds: FedLAMA (arXiv:2110.10302).

    A block is `interval` rounds of one cohort. Its last round sends every layer; the others leave
    out the lazy ones, of which each client trains on with its own. After a block,

        d_l = sum_k a_k |w_{k,l} - w_l|^2 / (sum_k a_k  t_l  n_l)

    is the discrepancy of layer l, w_l the mean of the cohort, n_l its parameters and t_l the rounds
    since it was last sent. Then layers become lazy in ascending order of d_l, until the lazy ones'
    share of the sum of n_l d_l exceeds the other layers' share of the parameters. In the first
    block, no layer is lazy, and never one without a parameter of two dimensions; such layers are in
    neither share. A discrepancy within float rounding counts as 0, and if all are 0, as they are
    where one client sends, the lazy layers stay.

    A client that was not in the round before receives every layer. On the devices lies a model per
    client of the population. Which layers become lazy is known after the training, so modelled
    traffic (`fedlp info`, `fedlp plan`) is that of FedAvg: an upper bound.

    Args:
      interval: phi, rounds of a block, from 1. The aggregator has to report squared norms, as
        `fl.fedlama` makes it.

    Raises:
      FedLPError: an interval below 1; (before anything compiles) an aggregator that does not.
    """
    interval = check_number("interval", interval, ge=1, integer=True)

    def init(layers: LayerTable, clients: int) -> PyTree:
        return (
            jnp.asarray(interval, jnp.int32),
            jnp.zeros(len(layers), bool),
            jnp.zeros(clients, jnp.int32),  # the last round of each client
        )

    def sample(
        key: Array, state: PyTree, cohort: Cohort, round: Array, coverage: Array
    ) -> tuple[Masks, PyTree]:
        del key
        rounds, rests, last = state
        begins = round % rounds == 1 % rounds  # a block: in every round, if the interval is 1
        stays = ~begins & (last[jnp.maximum(cohort.client, 0)] == round - 1)
        upload = jnp.where((rests & (round % rounds != 0))[None], 0.0, coverage)
        download = jnp.where(stays[:, None] & rests[None], 0.0, coverage)
        return Masks(download, upload, jnp.ones_like(upload)), state

    def learn(state: PyTree, feedback: Feedback) -> PyTree:
        if "squares" not in feedback.extras.trees:
            raise FedLPError(
                "masks.lazy compares the updates of clients, which a mean alone does not show; use "
                "fl.fedlama, or aggregator=with_squares(masked_mean())."
            )
        rounds, rests, last = state
        spread = _spread(feedback)
        spread = spread / jnp.where(rests, rounds, 1).astype(spread.dtype)  # n_l d_l
        due = (feedback.round % rounds == 0) & (spread.sum() > 0)
        lazy = jnp.where(due, _lazy(spread, feedback.layers), rests)
        return rounds, lazy, _mark(last, feedback, feedback.round)

    return MaskPolicy(init, sample, learn=learn, keeps_models=True, cohort_rounds=interval)


def _mark(values: Array, feedback: Feedback, value: Any) -> Array:
    """`values`, `[K]`, with another one for the clients that count."""
    counted = feedback.counted & (feedback.client >= 0)
    place = jnp.where(counted, feedback.client, len(values))  # beyond the end: dropped
    return values.at[place].set(value, mode="drop")


def _spread(feedback: Feedback) -> Array:
    """`f[L]`, `mean_k |w_{k,l} - w_l|^2`; 0 for layers that cannot be lazy."""
    layers = feedback.layers
    squares = sums(feedback.extras.trees["squares"], layers)
    spread = squares - squared_norms(feedback.update, layers)
    # The difference of two sums of n_l numbers; their rounding grows with about sqrt(n_l).
    noise = 4 * np.sqrt(layers.params) * jnp.finfo(spread.dtype).eps
    differ = (feedback.senders > 1) & (spread > noise.astype(spread.dtype) * squares)
    return jnp.where(_able(layers) & differ, spread, 0)


def _able(layers: LayerTable) -> np.ndarray:
    """`bool[L]`, the layers with a parameter of two dimensions or more."""
    return np.isin(np.arange(len(layers)), list(layers.matrices))


def _lazy(spread: Array, layers: LayerTable) -> Array:
    """`bool[L]`, the layers that become lazy where `n_l d_l` is `f[L]`."""
    able = _able(layers)
    params = np.where(able, layers.params, 0)
    size = jnp.asarray(params / max(params.sum(), 1), spread.dtype)
    order = jnp.argsort(jnp.where(able, spread / jnp.where(able, size, 1.0), jnp.inf))
    differing = jnp.cumsum(spread[order]) / spread.sum()
    enough = differing > 1 - jnp.cumsum(size[order])
    chosen = ~jnp.roll(enough, 1).at[0].set(False)  # up to the layer with which it is enough
    return jnp.zeros(len(layers), bool).at[order].set(chosen) & able
