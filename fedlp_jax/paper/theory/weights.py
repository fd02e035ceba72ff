"""Effective weights of the clients in an aggregate: bias and variance of the three means."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from fedlp_jax.errors import FedLPError
from fedlp_jax.paper.theory.senders import check_sample, inverse_senders, probabilities, updated

# Step of the trapezoidal rule in log s; docs/theory.md bounds its error far below rounding.
_STEP = 0.125


class EffectiveWeights(NamedTuple):
    """Moments of the weights `w_k` of an aggregate `u = sum w_k d_k`."""

    mean: np.ndarray  # f64[C], E w_k
    second: np.ndarray  # f64[C, C], E[w_k w_j]
    target: np.ndarray  # f64[C], a_k / sum a, the weights of FedAvg

    @property
    def covariance(self) -> np.ndarray:
        """`f64[C, C]`."""
        return self.second - np.outer(self.mean, self.mean)

    def expected(self, updates: np.ndarray) -> np.ndarray:
        """`E u`, `f64[n]`, for the clients' updates `f64[C, n]`."""
        return self.mean @ updates

    def bias(self, updates: np.ndarray) -> np.ndarray:
        """`E u` minus FedAvg's update, `f64[n]`.

        If all clients keep with the same p, the bias of the masked mean is pure shrinkage:
        `-(1 - q)` times FedAvg's update, as the layer does not move in `1 - q` of the rounds.
        """
        return (self.mean - self.target) @ updates

    def variance(self, updates: np.ndarray) -> np.ndarray:
        """Variance of `u` over the masks, coordinate by coordinate, `f64[n]`."""
        return np.einsum("kn,kj,jn->n", updates, self.covariance, updates)


def masked_mean(keep: ArrayLike, weight: ArrayLike | None = None) -> EffectiveWeights:
    """Weights under `aggregate.masked_mean`: `w_k = a_k m_k / A`, `A = sum a_j m_j`, 0 if A = 0.

    From `1/A = int_0^inf exp(-A s) ds` and `1/A^2 = int s exp(-A s) ds`, and as masks are
    independent, with `phi_j(s) = E exp(-a_j m_j s)`, `G = prod phi_j` and
    `r_k = a_k p_k exp(-a_k s) / phi_k`:

        E w_k = int r_k G ds,  E w_k^2 = a_k int s r_k G ds,  E[w_k w_j] = int s r_k r_j G ds

    Args:
      keep: `f64[C]`, the probability that each client sends the layer.
      weight: `f64[C]`, `a_k`; None = equal.
    """
    p, a = probabilities(keep), _weights(weight, keep)
    positive = a[a > 0]
    low, high = -np.log(positive.sum()) - 38, -np.log(positive.min()) + 4
    s = np.exp(np.arange(low, high, _STEP))
    decay = np.outer(s, a)
    with np.errstate(divide="ignore"):  # log 0 = -inf where a probability or weight is 0
        log_phi = np.logaddexp(np.log1p(-p), np.log(p) - decay)
        r = np.exp(np.log(a) + np.log(p) - decay - log_phi)  # [nodes, C], at most a_k
    first = _STEP * s * np.exp(log_phi.sum(axis=1))  # ds = s d(log s)
    second = (r.T * (first * s)) @ r
    np.fill_diagonal(second, a * ((first * s) @ r))
    return EffectiveWeights(first @ r, second, a / a.sum())


def inverse_probability(keep: ArrayLike, weight: ArrayLike | None = None) -> EffectiveWeights:
    """Weights under `aggregate.inverse_probability`: `w_k = a_k m_k / (p_k sum a)`.

    `E w_k = a_k / sum a` for every client with `p_k > 0`: unbiased. Weights are independent, of
    variance `(a_k / sum a)^2 (1 - p_k) / p_k`.

    Args:
      keep: `f64[C]`.
      weight: `f64[C]`, `a_k`; None = equal.
    """
    p = probabilities(keep)
    return _independent(p, 1 / np.where(p > 0, p, 1), _weights(weight, keep))


def cohort_mean(keep: ArrayLike, weight: ArrayLike | None = None) -> EffectiveWeights:
    """Weights under `aggregate.cohort_mean`: `w_k = a_k m_k / sum a`, of mean `p_k a_k / sum a`."""
    p = probabilities(keep)
    return _independent(p, np.ones_like(p), _weights(weight, keep))


def sampled_masked_mean(keep: float, cohort: int, population: int) -> EffectiveWeights:
    """Weights of all K clients under `aggregate.masked_mean` if C of them are drawn at random.

    All clients have the same p and the same weight. Clients outside the cohort count 0, so
    `E w_k = q / K`, `E w_k^2 = q rho / K` and `E[w_k w_j] = q (1 - rho) / (K (K - 1))`.

    Args:
      keep: p.
      cohort: C.
      population: K.
    """
    check_sample(keep, cohort, population)
    p = np.full(cohort, keep)
    q, rho = updated(p), inverse_senders(p)
    second = np.full(
        (population, population), q * (1 - rho) / (population * max(population - 1, 1))
    )
    np.fill_diagonal(second, q * rho / population)
    each = np.full(population, 1 / population)
    return EffectiveWeights(q * each, second, each)


def _independent(p: np.ndarray, factor: np.ndarray, a: np.ndarray) -> EffectiveWeights:
    target = a / a.sum()
    mean = target * factor * p
    second = np.outer(mean, mean)
    np.fill_diagonal(second, (target * factor) ** 2 * p)
    return EffectiveWeights(mean, second, target)


def _weights(weight: ArrayLike | None, keep: ArrayLike) -> np.ndarray:
    shape = np.shape(keep)
    a = np.ones(shape) if weight is None else np.asarray(weight, np.float64)
    if a.shape != shape or not (a >= 0).all() or not 0 < a.sum() < np.inf:
        raise FedLPError(
            f"weight must be {shape[0]} numbers, one per client like keep, none negative and not "
            f"all 0; got shape {list(a.shape)} with the sum {a.sum():g}."
        )
    return a
