"""How many examples each client gets: even, drawn, and raised to a smallest size."""

from __future__ import annotations

import numpy as np


def even(examples: int, parts: int) -> np.ndarray:
    """Sizes `i64[parts]` that sum to `examples` and differ by one at most."""
    return np.diff(np.arange(parts + 1) * examples // parts)


def drawn(rng: np.random.Generator, alpha: float, clients: int, examples: int) -> np.ndarray:
    """Sizes `i64[K]` in shares ~ Dirichlet(alpha 1_K), cut at floor(cumulated share x examples)."""
    shares = rng.dirichlet(np.full(clients, alpha))
    cuts = (np.cumsum(shares)[:-1] * examples).astype(np.int64)
    cuts = np.minimum(cuts, examples)  # the rounded sum of the shares may exceed 1
    return np.diff(cuts, prepend=0, append=examples)


def raised(sizes: np.ndarray, min_size: int) -> np.ndarray:
    """Sizes of the same sum, none below `min_size`: the largest are cut down to one level.

    The level is the highest that frees enough; clients at or below it, and at or above `min_size`,
    keep their size. Ties are broken by client number, so nothing is drawn.

    Args:
      sizes: `i64[K]` with `sum >= K * min_size`.
      min_size: at least 0.

    Returns:
      `i64[K]`.
    """
    lacking = np.maximum(min_size - sizes, 0).sum()
    low, high = min_size, int(sizes.max())
    while low < high:  # bisection: at most 31 steps
        level = (low + high + 1) // 2
        if np.maximum(sizes - level, 0).sum() >= lacking:
            low = level
        else:
            high = level - 1
    target = np.clip(sizes, min_size, low)
    # The level frees more than is lacking by less than one example a cut client.
    spare = sizes.sum() - target.sum()
    target[np.flatnonzero(sizes > low)[:spare]] += 1
    return target


def moved(rng: np.random.Generator, owner: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Owners after random examples have moved from clients above their target to those below.

    Args:
      rng: picks the examples that move and where each goes.
      owner: integers `[N]`, the client of each example.
      target: `i64[K]`, sizes to reach, of sum N.

    Returns:
      `owner`, with exactly as many entries changed as must be.
    """
    sizes = np.bincount(owner, minlength=len(target))
    lacking = np.maximum(target - sizes, 0)
    if not lacking.any():
        return owner
    shuffled = rng.permutation(len(owner))
    grouped = shuffled[np.argsort(owner[shuffled], kind="stable")]  # clients' examples, each mixed
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    leaving = grouped[rank >= np.repeat(target, sizes)]
    owner = owner.copy()
    owner[rng.permutation(leaving)] = np.repeat(np.arange(len(target)), lacking)
    return owner
