"""The number of clients that send a layer, and the expected traffic of a round."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from fedlp_jax.accounting.ledger import modelled_traffic
from fedlp_jax.errors import FedLPError, check_array
from fedlp_jax.pruning.layers import LayerTable
from fedlp_jax.pruning.masks import Keep, keep_matrix


class Uploads(NamedTuple):
    """The senders of each layer in a round of FedLP-Homo."""

    distribution: np.ndarray  # f64[L, C + 1], P(N = n)
    updated: np.ndarray  # f64[L], q = P(N > 0)
    expected: np.ndarray  # f64[L], E N
    inverse: np.ndarray  # f64[L], rho = E[1/N | N > 0]; NaN for a layer that is never sent


def uploads(keep: Keep, cohort: int, layers: LayerTable) -> Uploads:
    """Computes the distribution of the number of senders of each layer.

    Args:
      keep: as in `masks.bernoulli`, but for the C clients of a cohort instead of the population: a
        number, a mapping from layer name, or an array that fits `[C, L]`.
      cohort: C.
      layers: the layer table.

    Raises:
      FedLPError: a probability outside [0, 1], or a shape that fits nothing.
    """
    matrix = _matrix(keep, cohort, layers)
    # Layers with equal rates are computed once.
    columns, which = np.unique(matrix, axis=1, return_inverse=True)
    distribution = np.stack([senders(p) for p in columns.T])[which.ravel()]
    return Uploads(
        distribution,
        updated=np.array([updated(p) for p in columns.T])[which.ravel()],
        expected=matrix.sum(axis=0),
        inverse=np.array([inverse_senders(p) for p in columns.T])[which.ravel()],
    )


def communication(keep: Keep, cohort: int, layers: LayerTable) -> dict[str, float]:
    """Expected traffic of a round of FedLP-Homo: the row of the ledger.

    Every client downloads all layers, sends layer l with probability `p_{k,l}`, and sends one bit
    per layer for its mask: `E upload_params = sum_l size_l sum_k p_{k,l}`.

    Args:
      keep: see `uploads`.
      cohort: C.
      layers: the layer table.

    Returns:
      `upload_params`, `download_params`, `upload_bytes`, `download_bytes`, summed over the cohort.
    """
    sent = _matrix(keep, cohort, layers).sum(axis=0)
    received = np.full(len(layers), cohort)
    row = modelled_traffic(layers, sent, received, clients=cohort)
    return {name: float(value) for name, value in row.items()}


def senders(keep: ArrayLike) -> np.ndarray:
    """Distribution of the number N of clients that send a layer: `P(N = n)`, `f64[C + 1]`.

    Args:
      keep: `f64[C]`, the probability that each client sends it.
    """
    p = probabilities(keep)
    return stats.poisson_binom(p).pmf(np.arange(len(p) + 1))


def updated(keep: ArrayLike) -> float:
    """`q = P(N > 0) = 1 - prod (1 - p_k)`, to full precision even for small p."""
    with np.errstate(divide="ignore"):  # a certain sender gives log 0 = -inf
        return float(-np.expm1(np.log1p(-probabilities(keep)).sum()))


def inverse_senders(keep: ArrayLike) -> float:
    """`rho = E[1/N | N > 0]`: variance of a mean over the senders, in units of one client's.

    Between `q / sum p_k` (Jensen) and 1; NaN if no client ever sends.
    """
    pmf = senders(keep)[1:]
    n = np.arange(1, len(pmf) + 1)
    return float((pmf / n).sum() / pmf.sum()) if pmf.any() else float("nan")


def sampling_variance(keep: float, cohort: int, population: int) -> float:
    """`kappa = (K rho - 1) / (K - 1)`: variance of the mean over the senders, given N > 0.

    In units of the variance among all K clients. The cohort is a uniform sample and all clients
    keep with the same p, so given N = n > 0 every n of the K clients are equally likely to send.
    Between `(K - C) / (C (K - 1))`, that of FedAvg, and 1, that of a single sender.

    Args:
      keep: p in (0, 1].
      cohort: C.
      population: K.
    """
    check_sample(keep, cohort, population)
    if population == 1:
        return 0.0
    rho = inverse_senders(np.full(cohort, keep))
    return (population * rho - 1) / (population - 1)


def probabilities(keep: ArrayLike) -> np.ndarray:
    """Checks keep probabilities and converts them to `f64[C]`.

    Raises:
      FedLPError: another shape, no client, or a number outside [0, 1].
    """
    p = check_array("keep", keep, ge=0, le=1)
    if p.ndim != 1 or p.size == 0:
        raise FedLPError(
            f"keep has shape {list(p.shape)}; give one probability per client of the cohort, as "
            "in numpy.full(10, 0.5)."
        )
    return p


def check_sample(keep: float, cohort: int, population: int) -> None:
    """Checks that a cohort can be drawn and that a layer is ever sent.

    Raises:
      FedLPError: neither 1 <= C <= K, nor 0 < p <= 1.
    """
    if not 1 <= cohort <= population:
        raise FedLPError(
            f"a cohort of {cohort} cannot be drawn from {population} clients; choose 1 to "
            f"{population}."
        )
    if not 0 < keep <= 1:
        raise FedLPError(f"keep={keep:g} is outside (0, 1], so the layer is never sent.")


def _matrix(keep: Keep, cohort: int, layers: LayerTable) -> np.ndarray:
    matrix = keep_matrix(keep, layers, cohort, np.float64)
    return np.broadcast_to(matrix, (cohort, len(layers)))
