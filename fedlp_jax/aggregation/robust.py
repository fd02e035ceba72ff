"""Robust rules: aggregation that a minority of arbitrary updates cannot control.

A single client can move a mean arbitrarily far. The rules here bound what a minority can do, by
order statistics or distances, so they need the updates themselves: a stack of C models where a
mean needs one sum. `stacked_bytes` predicts the memory.

A rule works on one layer at a time, because each layer has its own senders, and only they vote. A
layer is one vector of its parameters and batch statistics. Every rule returns a point within the
range of its voters, so a variance stays positive. A layer nobody sent keeps its value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax.aggregation.reducer import Aggregate, Received, Reducer, UploadInfo
from fedlp_jax.errors import check_number
from fedlp_jax.execution.map_clients import over_columns
from fedlp_jax.execution.plan import Plan
from fedlp_jax.execution.scheduling import slots_per_device
from fedlp_jax.pruning.layers import LayerTable
from fedlp_jax.pruning.submodels import Submodel
from fedlp_jax.types import Array, PyTree, Variables, wide

_SMOOTHING = 1e-6  # of distances to the geometric median, as in RFA
_SLACK = 1e-4  # of a share times a count, which float32 may round to above a whole number

# (rows f[C, n], votes f32[C], number) -> f[n]; votes 0 = not sent, and the row is zero
Rule = Callable[[Array, Array, PyTree], Array]


def by_layer(rule: Rule, number: Any = ()) -> Reducer:
    """A reducer that applies a rule to every layer.

    Args:
      rule: `(rows f[C, n], votes f32[C], number) -> f[n]`, for one layer. Client k has a_k votes if
        it counts and sent the layer, else 0 and a row of zeros.
      number: setting of the rule, an argument of the compiled round.
    """

    def prepare(
        update: Variables, upload: UploadInfo, counted: Array, layers: LayerTable
    ) -> Variables:
        del upload, counted, layers
        return update

    def embed(
        update: Variables, level: Submodel, variables: Variables, layers: LayerTable
    ) -> Variables:
        del layers
        return level.embed(update, variables)

    def reduce(received: Received, state: PyTree, layers: LayerTable, plan: Plan) -> Aggregate:
        stacked, uploads, counted, client = received
        weight = jnp.where(counted, uploads.weight, jnp.zeros_like(uploads.weight))
        votes = weight[:, None] * uploads.mask
        update = apply_rule(rule, stacked, votes, client, state, layers, plan)
        return Aggregate(update, votes.sum(axis=0) > 0, weight.sum())

    def init(variables: Variables) -> PyTree:
        del variables
        return jax.tree.map(jnp.asarray, number)

    return Reducer(init, prepare, embed, reduce, stacked=True)


def median() -> Reducer:
    """Coordinate-wise median of the clients that sent a layer (Yin et al., arXiv:1803.01498).

    The mean of the middle two if their number is even. All clients count equally.
    """

    def rule(rows: Array, votes: Array, number: PyTree) -> Array:
        del number
        ordered, count = _ordered(rows, votes)
        return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2

    return by_layer(rule)


def trimmed_mean(trim: float = 0.25) -> Reducer:
    """Coordinate-wise mean without the largest and smallest values (arXiv:1803.01498).

    Of n values, `ceil(trim n)` are cut at each end, but one or two always stay: .5 gives the
    median. The count is rounded up because few clients may have sent a layer. All clients count
    equally.

    Args:
      trim: share cut at each end, in [0, .5]; at least the share of bad clients.

    Raises:
      FedLPError: a share outside [0, .5].
    """
    _check_minority("trim", trim)

    def rule(rows: Array, votes: Array, trim: Array) -> Array:
        ordered, count = _ordered(rows, votes)
        cut = jnp.minimum(_share_of(count, trim), (count - 1) // 2)
        rank = jnp.arange(rows.shape[0], dtype=jnp.int32)
        inside = (rank >= cut) & (rank < count - cut)
        total = jnp.where(inside[:, None], ordered, jnp.zeros_like(ordered)).sum(axis=0)
        return total / (count - 2 * cut).astype(rows.dtype)

    return by_layer(rule, np.float32(trim))


def krum(byzantine: float = 0.25) -> Reducer:
    """The update nearest to its n - f - 2 nearest others (Blanchard et al., NeurIPS 2017).

    `score_k = sum of |u_k - u_j|^2 over the n - f - 2 nearest j`; the smallest score wins ("Machine
    Learning with Adversaries"). The theorem needs n >= 2 f + 3, so f is `ceil(byzantine n)` but at
    most `(n - 3) / 2`. All clients count equally.

    Args:
      byzantine: assumed share of bad clients, in [0, .5].

    Raises:
      FedLPError: a share outside [0, .5].
    """
    return _krum(byzantine, lambda count, bad: jnp.ones_like(count))


def multi_krum(byzantine: float = 0.25) -> Reducer:
    """Mean of the n - f updates with the best scores; arguments and scores as in `krum`."""
    return _krum(byzantine, lambda count, bad: count - bad)


def geometric_median(iterations: int = 8) -> Reducer:
    """The point with the least weighted distance to all updates: RFA (arXiv:1912.13445).

    `z = argmin sum a_k |z - u_k|` by the smoothed Weiszfeld algorithm (Pillutla et al.):
    `z <- sum b_k u_k / sum b_k, b_k = a_k / max(1e-6, |z - u_k|)`, starting at z = 0, so the first
    step gives long updates little weight. Weighted as in that paper: with `weighting="examples"` a
    client that claims many examples has many votes.

    Args:
      iterations: steps of the algorithm.

    Raises:
      FedLPError: not a whole number of at least 1.
    """
    iterations = check_number("iterations", iterations, ge=1, integer=True)

    def rule(rows: Array, votes: Array, iterations: Array) -> Array:
        votes = votes.astype(rows.dtype)

        def step(_: Array, point: Array) -> Array:
            share = votes / jnp.maximum(_norms(rows - point[None]), _SMOOTHING)
            return (share[:, None] * rows).sum(axis=0) / share.sum()

        return jax.lax.fori_loop(0, iterations, step, jnp.zeros_like(rows[0]))

    return by_layer(rule, np.int32(iterations))


def apply_rule(
    rule: Rule,
    stacked: Variables,
    votes: Array,
    client: Array,
    number: PyTree,
    layers: LayerTable,
    plan: Plan,
) -> Variables:
    """Applies a rule to every layer.

    Args:
      rule: the rule for one layer.
      stacked: updates, a tree of `[D * P, ...]`.
      votes: `f32[D * P, L]`, a_k where client k counts and sent layer l, else 0. The stack is not
        read where it is 0, and may be NaN there.
      client: `i32[D * P]`, ids, -1 in empty slots. A rule sees clients sorted by id, so that a tie,
        which is usual with Krum of three, does not depend on the plan.
      number: setting of the rule.
      layers: of the server's variables.
      plan: resolved; each device works on some columns of all clients.

    Returns:
      The update, a tree like the server's variables, zero in a layer nobody sent.
    """
    leaves, treedef = jax.tree.flatten(stacked)
    layer_of_leaf = jax.tree.leaves(layers.index)
    update = list(leaves)
    order = jnp.argsort(client)
    votes = votes[order]
    for layer in range(len(layers)):
        members = [i for i, index in enumerate(layer_of_leaf) if index == layer]
        sizes = [int(np.prod(leaves[i].shape[1:])) for i in members]
        rows = [leaves[i].reshape(len(leaves[i]), -1) for i in members]
        rows = [part.astype(wide(part.dtype)) for part in rows]
        columns = over_columns(jnp.concatenate(rows, axis=1), plan)
        sent = votes[:, layer] > 0
        columns = jnp.where(sent[:, None], columns[order], jnp.zeros_like(columns))
        value = rule(columns, votes[:, layer], number)
        value = jnp.where(sent.any(), value, jnp.zeros_like(value))[: sum(sizes)]
        for i, part in zip(members, jnp.split(value, np.cumsum(sizes)[:-1]), strict=True):
            update[i] = part.reshape(leaves[i].shape[1:])
    return jax.tree.unflatten(treedef, update)


def stacked_bytes(variables: Variables, layers: LayerTable, cohort: int, plan: Plan) -> int:
    """Modelled memory of a stacked reducer, in bytes over all devices.

    The stack holds a model per slot (with D > 1 devices there are up to two slots per client). The
    layer at work lies there three more times in float32 or wider: as columns, sorted or compared,
    and as workspace.

    Args:
      variables: the server's, or their shapes.
      layers: their table.
      cohort: C, with over-selection.
      plan: resolved.
    """
    devices = plan.devices or 1
    slots = devices * slots_per_device(cohort, devices)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(variables)]
    stored = max(dtype.itemsize for dtype in dtypes)
    working = max(wide(dtype).itemsize for dtype in dtypes)
    sizes = layers.params + layers.statistics
    return int(slots * (stored * sizes.sum() + 3 * working * sizes.max()))


RULES: dict[str, Callable[..., Reducer]] = {
    "median": median,
    "trimmed_mean": trimmed_mean,
    "krum": krum,
    "multi_krum": multi_krum,
    "geometric_median": geometric_median,
}


def _krum(byzantine: float, chosen: Callable[[Array, Array], Array]) -> Reducer:
    _check_minority("byzantine", byzantine)

    def rule(rows: Array, votes: Array, byzantine: Array) -> Array:
        sent = votes > 0
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
        # Scores of huge updates are infinite; clients that sent nothing still sort after them.
        place = jnp.argsort(jnp.lexsort((score, ~sent))).astype(jnp.int32)
        best = sent & (place < jnp.maximum(chosen(count, bad), 1))
        total = jnp.where(best[:, None], rows, jnp.zeros_like(rows)).sum(axis=0)
        return total / best.sum().astype(rows.dtype)

    return by_layer(rule, np.float32(byzantine))


def _norms(rows: Array) -> Array:
    """L2 norm of each row, scaled first so that the square of a huge one stays finite."""
    largest = jnp.abs(rows).max(axis=1)
    scale = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    return largest * jnp.sqrt(((rows / scale[:, None]) ** 2).sum(axis=1))


def _ordered(rows: Array, votes: Array) -> tuple[Array, Array]:
    """Every column sorted, rows not sent last; and the number sent, `i32[]`."""
    sent = votes > 0
    ordered = jnp.sort(jnp.where(sent[:, None], rows, jnp.full_like(rows, jnp.inf)), axis=0)
    return ordered, sent.sum(dtype=jnp.int32)


def _share_of(count: Array, share: Array) -> Array:
    """`ceil(share n)`."""
    return jnp.ceil(share * count.astype(jnp.float32) - jnp.float32(_SLACK)).astype(jnp.int32)


def _check_minority(name: str, share: float) -> None:
    check_number(name, share, ge=0, le=0.5, hint="no rule withstands a majority")
