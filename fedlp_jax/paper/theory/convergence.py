"""Convergence of FedLP-Homo: a bound for smooth losses, the exact error for quadratic ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from fedlp_jax.errors import FedLPError
from fedlp_jax.paper.theory.senders import sampling_variance, updated
from fedlp_jax.paper.theory.weights import EffectiveWeights


def gradient_bound(
    *,
    keep: ArrayLike,
    cohort: int,
    population: int,
    gap: float,
    smoothness: float,
    learning_rate: float,
    local_steps: int,
    rounds: int,
    dissimilarity: float = 0.0,
    noise: float = 0.0,
) -> float:
    """Bounds the mean squared gradient of FedLP-Homo: the theorem of docs/theory.md.

    With `q_l`, `kappa_l` of layer l, `Q = max q_l`, `R = max q_l kappa_l`, after T rounds,

        1/T sum_t sum_l q_l E|grad_l f(x_t)|^2 <= 4 gap / (eta S T) + 4 beta eta Q sigma^2 / K
            + 6 beta eta R (S zeta^2 + sigma^2)
            + eta^2 beta^2 (S - 1) Q (40/3 S zeta^2 + 10 sigma^2)

    Statement and proof are this project's own; nothing comes from the FedLP paper.

    Args:
      keep: p, or one per layer `f64[L]`, in (0, 1].
      cohort: C.
      population: K.
      gap: f at the start minus its lower bound.
      smoothness: beta; every client's gradient is beta-Lipschitz.
      learning_rate: eta of the clients' SGD.
      local_steps: S.
      rounds: T.
      dissimilarity: zeta^2, a bound on the mean over clients of |grad f_k - grad f|^2.
      noise: sigma^2, a bound on the variance of a stochastic gradient.

    Raises:
      FedLPError: the learning rate exceeds `sqrt(min q / max q) / (4 beta S)`.
    """
    rates = np.unique(np.atleast_1d(np.asarray(keep, np.float64)))
    kappa = np.array([sampling_variance(p, cohort, population) for p in rates.tolist()])
    q = np.array([updated(np.full(cohort, p)) for p in rates])
    largest = np.sqrt(q.min() / q.max()) / (4 * smoothness * local_steps)
    if not 0 < learning_rate <= largest * (1 + 1e-12):
        raise FedLPError(
            f"learning_rate={learning_rate:g} must be positive and at most {largest:g} for the "
            "bound to hold; lower it or the number of local steps."
        )
    eta_beta = learning_rate * smoothness
    return float(
        4 * gap / (learning_rate * local_steps * rounds)
        + 4 * eta_beta * q.max() * noise / population
        + 6 * eta_beta * (q * kappa).max() * (local_steps * dissimilarity + noise)
        + eta_beta**2
        * (local_steps - 1)
        * q.max()
        * (40 / 3 * local_steps * dissimilarity + 10 * noise)
    )


def quadratic_error(
    weights: EffectiveWeights,
    optima: ArrayLike,
    start: ArrayLike,
    contraction: ArrayLike,
    rounds: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the exact error of a layer on a quadratic problem, round by round.

    Client k's loss is `1/2 sum_i h_i (x_i - b_{k,i})^2`; S full gradient steps of size eta take x
    to `b_k + c (x - b_k)`, `c_i = (1 - eta h_i)^S`. With `e = x - x*`, x* the weighted mean of the
    optima `b_k`, the round is `e' = e - (1 - c) sum w_k (e - (b_k - x*))`. Its two moments are
    linear in those of e.

    Args:
      weights: of the layer, for the K clients in `optima`.
      optima: `f64[K, n]`, `b_k`.
      start: `f64[n]`, x before the first round.
      contraction: c, `f64[n]` or a number.
      rounds: T.

    Returns:
      `E e` and `E e^2`, each `f64[T + 1, n]`.
    """
    optima = np.asarray(optima, np.float64)
    centre = weights.target @ optima
    apart, gain = optima - centre, 1 - np.asarray(contraction, np.float64)
    total = weights.mean.sum()
    # Moments of W = sum w_k and v = sum w_k (b_k - x*).
    drift = weights.mean @ apart
    w_w, w_v = weights.second.sum(), weights.second.sum(axis=0) @ apart
    v_v = np.einsum("kn,kj,jn->n", apart, weights.second, apart)
    first = [np.asarray(start, np.float64) - centre]
    second = [first[0] ** 2]
    for _ in range(rounds):
        m, square = first[-1], second[-1]
        first.append((1 - gain * total) * m + gain * drift)
        second.append(
            (1 - 2 * gain * total + gain**2 * w_w) * square
            + 2 * gain * (drift - gain * w_v) * m
            + gain**2 * v_v
        )
    return np.stack(first), np.stack(second)
