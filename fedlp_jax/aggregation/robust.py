"""Robust rules: how the server combines updates of which a share may be anything at all.

A mean follows a single client as far as that wants. The rules here bound what a minority can do, by
order statistics or distances, so they need the updates themselves: a stack of C models, where a
mean needs one sum. `stacked_bytes` says how much that is.

A rule works on one layer at a time: the clients that sent a layer are others for each layer, and
they alone are its voters. A layer is one vector, of its parameters and batch statistics; every rule
gives a point between those of its voters, so that a variance stays positive. A layer nobody sent
keeps its value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax.errors import FedLPError, is_number, whole_number
from fedlp_jax.execution.map_clients import Plan, over_columns
from fedlp_jax.execution.scheduling import slots_per_device
from fedlp_jax.pruning.layers import LayerTable
from fedlp_jax.types import Array, PyTree, Variables, wide

_SMOOTHING = 1e-6  # of distances to the geometric median, as in RFA
_SLACK = 1e-4  # of a share times a count, which float32 may round to above a whole number


class Robust(NamedTuple):
    """A rule for one layer. Its numbers are its state, an argument of the compiled round."""

    init: Callable[[Variables], PyTree]  # variables -> state
    # (rows f[C, n], weight f32[C], state) -> f[n]; weight 0 = not sent, and the row is zero
    reduce: Callable[[Array, Array, PyTree], Array]


def median() -> Robust:
    """Coordinate-wise median of the clients that sent a layer (Yin et al., arXiv:1803.01498).

    Of an even number, the mean of the middle two. Clients count alike, whatever their examples.
    """

    def reduce(rows: Array, weight: Array, state: PyTree) -> Array:
        del state
        ordered, count = _ordered(rows, weight)
        return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2

    return Robust(lambda variables: (), reduce)


def trimmed_mean(trim: float = 0.25) -> Robust:
    """Coordinate-wise mean without the largest and the smallest (Yin et al., arXiv:1803.01498).

    Of n values, `ceil(trim n)` are cut at either end, but at least one or two stay: at .5 it is the
    median. Rounded up, since few may have sent a layer. Clients count alike.

    Args:
      trim: share cut at either end, in [0, .5]; at least the share of bad clients.

    Raises:
      FedLPError: a share outside [0, .5].
    """
    _check_share("trim", trim)

    def reduce(rows: Array, weight: Array, trim: Array) -> Array:
        ordered, count = _ordered(rows, weight)
        cut = jnp.minimum(_share_of(count, trim), (count - 1) // 2)
        rank = jnp.arange(rows.shape[0], dtype=jnp.int32)
        inside = (rank >= cut) & (rank < count - cut)
        total = jnp.where(inside[:, None], ordered, jnp.zeros_like(ordered)).sum(axis=0)
        return total / (count - 2 * cut).astype(rows.dtype)

    return Robust(lambda variables: jnp.asarray(trim, jnp.float32), reduce)


def krum(byzantine: float = 0.25) -> Robust:
    """The update that is nearest to its n - f - 2 nearest others (Blanchard et al., 2017).

    `score_k = sum of |u_k - u_j|^2 over the n - f - 2 nearest j`, smallest wins ("Machine Learning
    with Adversaries", NeurIPS 2017). The theorem asks for n >= 2 f + 3, so f is
    `ceil(byzantine n)`, but never more than `(n - 3) / 2`. Clients count alike.

    Args:
      byzantine: assumed share of bad clients, in [0, .5].

    Raises:
      FedLPError: a share outside [0, .5].
    """
    return _krum(byzantine, lambda count, bad: jnp.ones_like(count))


def multi_krum(byzantine: float = 0.25) -> Robust:
    """Mean of the n - f updates with the best score of `krum`, which see."""
    return _krum(byzantine, lambda count, bad: count - bad)


def geometric_median(iterations: int = 8) -> Robust:
    """The point of least weighted distance to all updates: RFA (Pillutla et al., arXiv:1912.13445).

    `z = argmin sum a_k |z - u_k|` by the smoothed Weiszfeld algorithm:
    `z <- sum b_k u_k / sum b_k, b_k = a_k / max(1e-6, |z - u_k|)`, from z = 0, no update at all:
    then an update weighs the less in the first step the longer it is. Weighted, as in that paper:
    with `weighting="examples"` a client that claims many examples has many votes.

    Args:
      iterations: steps of the algorithm.

    Raises:
      FedLPError: not a whole number of at least 1.
    """
    iterations = whole_number("iterations", iterations, 1)

    def reduce(rows: Array, weight: Array, iterations: Array) -> Array:
        weight = weight.astype(rows.dtype)

        def step(_: Array, point: Array) -> Array:
            share = weight / jnp.maximum(_norms(rows - point[None]), _SMOOTHING)
            return (share[:, None] * rows).sum(axis=0) / share.sum()

        return jax.lax.fori_loop(0, iterations, step, jnp.zeros_like(rows[0]))

    return Robust(lambda variables: jnp.asarray(iterations, jnp.int32), reduce)


def combine(
    rule: Robust,
    stacked: Variables,
    weight: Array,
    client: Array,
    state: PyTree,
    layers: LayerTable,
    plan: Plan,
) -> Variables:
    """Applies a rule to every layer.

    Args:
      rule: the rule.
      stacked: updates, a tree of `[D * P, ...]`.
      weight: `f32[D * P, L]`, a_k where client k counts and sent layer l, else 0. What lies in the
        stack where it is 0 is not looked at, and may be NaN.
      client: `i32[D * P]`, ids, -1 in empty slots: a rule sees clients in their order, so that a
        draw between two, as is usual with Krum of three, does not depend on the plan.
      state: the rule's.
      layers: of the server's variables.
      plan: resolved; each device works on columns of all clients, not on clients.

    Returns:
      The update, a tree like the server's variables, zero in a layer nobody sent.
    """
    leaves, treedef = jax.tree.flatten(stacked)
    of_leaf = jax.tree.leaves(layers.index)
    update = list(leaves)
    order = jnp.argsort(client)
    weight = weight[order]
    for layer in range(len(layers)):
        mine = [i for i, at in enumerate(of_leaf) if at == layer]
        sizes = [int(np.prod(leaves[i].shape[1:])) for i in mine]
        rows = [leaves[i].reshape(len(leaves[i]), -1) for i in mine]
        rows = [part.astype(wide(part.dtype)) for part in rows]
        columns = over_columns(jnp.concatenate(rows, axis=1), plan)
        sent = weight[:, layer] > 0
        columns = jnp.where(sent[:, None], columns[order], jnp.zeros_like(columns))
        value = rule.reduce(columns, weight[:, layer], state)
        value = jnp.where(sent.any(), value, jnp.zeros_like(value))[: sum(sizes)]
        for i, part in zip(mine, jnp.split(value, np.cumsum(sizes)[:-1]), strict=True):
            update[i] = part.reshape(leaves[i].shape[1:])
    return jax.tree.unflatten(treedef, update)


def stacked_bytes(variables: Variables, layers: LayerTable, cohort: int, plan: Plan) -> int:
    """Modelled memory of the stacked path, in bytes over all devices.

    The stack has a model for every slot (D > 1 devices have up to two slots for a client), and the
    layer that is worked on lies there three more times, in float32 or wider: as columns, sorted or
    compared, and in the workspace of that.

    Args:
      variables: the server's, or their shapes.
      layers: their table.
      cohort: C, with over-selection.
      plan: resolved.
    """
    devices = plan.devices or 1
    slots = devices * slots_per_device(cohort, devices)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(variables)]
    stored, worked = (max(d.itemsize for d in found) for found in (dtypes, map(wide, dtypes)))
    sizes = layers.params + layers.statistics
    return int(slots * (stored * sizes.sum() + 3 * worked * sizes.max()))


RULES: dict[str, Callable[..., Robust]] = {
    "median": median,
    "trimmed_mean": trimmed_mean,
    "krum": krum,
    "multi_krum": multi_krum,
    "geometric_median": geometric_median,
}


def _krum(byzantine: float, chosen: Callable[[Array, Array], Array]) -> Robust:
    _check_share("byzantine", byzantine)

    def reduce(rows: Array, weight: Array, byzantine: Array) -> Array:
        sent = weight > 0
        count = sent.sum(dtype=jnp.int32)
        rank = jnp.arange(rows.shape[0], dtype=jnp.int32)
        # Differences, not a product of all with all: that would lose all digits of near updates.
        distance = jax.lax.map(lambda row: ((rows - row[None]) ** 2).sum(axis=1), rows)  # [C, C]
        other = sent[:, None] & sent[None, :] & (rank[:, None] != rank[None, :])
        nearest = jnp.sort(jnp.where(other, distance, jnp.inf), axis=1)
        bad = jnp.minimum(_share_of(count, byzantine), jnp.maximum((count - 3) // 2, 0))
        others = jnp.maximum(count - 1, 0)
        compared = jnp.clip(count - bad - 2, jnp.minimum(others, 1), others)
        score = jnp.where((rank < compared)[None], nearest, jnp.zeros_like(nearest)).sum(axis=1)
        # Scores of huge updates are infinite; who sent nothing comes after them all the same.
        place = jnp.argsort(jnp.lexsort((score, ~sent))).astype(jnp.int32)
        best = sent & (place < jnp.maximum(chosen(count, bad), 1))
        total = jnp.where(best[:, None], rows, jnp.zeros_like(rows)).sum(axis=0)
        return total / best.sum().astype(rows.dtype)

    return Robust(lambda variables: jnp.asarray(byzantine, jnp.float32), reduce)


def _norms(rows: Array) -> Array:
    """L2 norm of each row; a huge one is not squared, which would be infinite."""
    largest = jnp.abs(rows).max(axis=1)
    scale = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    return largest * jnp.sqrt(((rows / scale[:, None]) ** 2).sum(axis=1))


def _ordered(rows: Array, weight: Array) -> tuple[Array, Array]:
    """Every column sorted, what was not sent last; and how many were sent, `i32[]`."""
    sent = weight > 0
    ordered = jnp.sort(jnp.where(sent[:, None], rows, jnp.full_like(rows, jnp.inf)), axis=0)
    return ordered, sent.sum(dtype=jnp.int32)


def _share_of(count: Array, share: Array) -> Array:
    """`ceil(share n)`."""
    return jnp.ceil(share * count.astype(jnp.float32) - jnp.float32(_SLACK)).astype(jnp.int32)


def _check_share(name: str, share: float) -> None:
    if not (is_number(share) and 0 <= share <= 0.5):
        raise FedLPError(
            f"{name}={share!r} must be a share in [0, 0.5]: no rule withstands a majority."
        )
