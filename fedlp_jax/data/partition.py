"""Labels and a seed -> `Partition`: the schemes by which examples are spread over clients.

Every scheme works on whole arrays, so that a million clients take about a second, and draws from
Philox keyed by the seed and the scheme. A request that cannot be met is refused in a sentence;
nothing is drawn again until it happens to fit. All schemes raise `FedLPError` for such a request.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedlp_jax.data import sizes as sizes_of
from fedlp_jax.data.dataset import client_ids
from fedlp_jax.data.holdings import Partition as Partition
from fedlp_jax.data.holdings import by_owner, by_size, class_labels
from fedlp_jax.errors import FedLPError, shown

# The second word of the Philox key: with one seed, no two schemes share their draws.
_STREAM = {"iid": 1, "dirichlet": 2, "shards": 3, "mixed": 4, "quantity": 5}
_INTEGER = (int, np.integer)
_NUMBER = (int, float, np.integer, np.floating)


def iid(labels: Any, *, clients: int, seed: int = 0) -> Partition:
    """Deals all examples at random; sizes differ by one at most.

    Args:
      labels: integers `[N]`.
      clients: K, at most N.
      seed: of the deal.

    Returns:
      A partition that uses every example once.
    """
    labels = class_labels(labels)
    _check_clients(clients, len(labels))
    rows = _generator("iid", seed).permutation(np.arange(len(labels), dtype=np.int32))
    return by_size(rows, sizes_of.even(len(labels), clients), labels)


def quantity(
    labels: Any, *, clients: int, alpha: float, seed: int = 0, min_size: int = 1
) -> Partition:
    """Clients of unequal sizes, in shares ~ Dirichlet(alpha), with the same mix of classes.

    Args:
      labels: integers `[N]`.
      clients: K.
      alpha: positive; the smaller, the more unequal.
      seed: of sizes and deal.
      min_size: at least 1; clients that the draw leaves smaller take from the largest ones.

    Returns:
      A partition that uses every example once.
    """
    labels = class_labels(labels)
    _check_clients(clients, len(labels))
    _check_alpha(alpha)
    _check_min_size(min_size, clients, len(labels))
    rng = _generator("quantity", seed)
    sizes = sizes_of.raised(sizes_of.drawn(rng, alpha, clients, len(labels)), min_size)
    return by_size(rng.permutation(np.arange(len(labels), dtype=np.int32)), sizes, labels)


def dirichlet(
    labels: Any,
    *,
    clients: int,
    alpha: float,
    seed: int = 0,
    min_size: int | None = None,
    reference: bool = False,
) -> Partition:
    """Spreads every class over the clients in shares ~ Dirichlet(alpha): FedLP's D-niid.

    For each class c with n_c examples, p ~ Dir(alpha 1_K) over the clients, and client k gets
    those from floor(n_c (p_1 + .. + p_{k-1})) up to floor(n_c (p_1 + .. + p_k)).

    Args:
      labels: integers `[N]`.
      clients: K.
      alpha: positive; the smaller, the fewer classes a client holds.
      seed: of the shares, and of the order of a class before it is cut.
      min_size: clients that the draw leaves smaller take random examples from the largest ones.
        None moves nothing, and refuses a client without examples.
      reference: do as the official code does: cut a class in the order of the data set, and use
        only the first 1000 K examples.

    Returns:
      A partition that uses every example once (with `reference`, of the first 1000 K).
    """
    labels = class_labels(labels)
    _check_clients(clients, len(labels))
    _check_alpha(alpha)
    used = labels[: 1000 * clients] if reference else labels
    if min_size is not None:
        _check_min_size(min_size, clients, len(used))
    rng = _generator("dirichlet", seed)
    pieces, owners = [], []
    by_class = np.argsort(used, kind="stable").astype(np.int32)
    for rows in np.split(by_class, np.cumsum(np.bincount(used))[:-1]):
        pieces.append(rows if reference else rng.permutation(rows))
        shares = sizes_of.drawn(rng, alpha, clients, len(rows))
        owners.append(np.repeat(np.arange(clients, dtype=np.int32), shares))
    owner = np.concatenate(owners)
    sizes = np.bincount(owner, minlength=clients)
    if min_size is not None:
        owner = sizes_of.moved(rng, owner, sizes_of.raised(sizes, min_size))
    elif sizes.min() == 0:
        raise FedLPError(
            f"dirichlet with alpha={alpha:g} left {(sizes == 0).sum():,} of {clients:,} clients "
            "without examples. Pass min_size=1, which lets them take some from the largest "
            "clients, or a larger alpha."
        )
    return by_owner(np.concatenate(pieces), owner, clients, labels)


def shards(labels: Any, *, clients: int, shards_per_client: int = 2, seed: int = 0) -> Partition:
    """Sorts by label, cuts into equal shards and deals them: few classes a client.

    McMahan et al. (arXiv:1602.05629) call the result pathological. A shard that spans the border
    of two classes gives its client both.

    Args:
      labels: integers `[N]`.
      clients: K.
      shards_per_client: s; K s shards are cut, of sizes that differ by one at most.
      seed: of the deal.

    Returns:
      A partition that uses every example once.
    """
    labels = class_labels(labels)
    _check_clients(clients, len(labels))
    _check_count("shards_per_client", shards_per_client)
    total = clients * shards_per_client
    if total > len(labels):
        raise FedLPError(
            f"{clients:,} clients x {shards_per_client} shards need {total:,} examples, but there "
            f"are {len(labels):,}; lower either."
        )
    rows, owner = _dealt_shards(_generator("shards", seed), labels, None, clients, total)
    return by_owner(rows, owner, clients, labels)


def mixed(
    labels: Any, *, clients: int, ratio: float = 0.95, seed: int = 0, reference: bool = False
) -> Partition:
    """Two label shards and some iid examples for every client: FedLP's M-niid.

    Args:
      labels: integers `[N]`.
      clients: K.
      ratio: share of the data that is dealt in shards, 2 a client; the rest is dealt at random.
      seed: of which examples go where.
      reference: do as the official code does. The first int(N (1 - ratio)) examples are dealt at
        random; shards of N // K // 2 - (their number a client) // 2 examples are then cut from the
        whole sorted data set, of which each client gets 2 and the surplus is never used. So an
        example may occur twice. (Ties of the sort go by position here; there they are undefined.)
        With 50,000 examples and 100 clients: 25 + 2 x 238 = 501 each.

    Returns:
      A partition that uses every example once, in sizes that differ by three at most; with
      `reference` see there.
    """
    labels = class_labels(labels)
    count = len(labels)
    _check_clients(clients, count)
    if not isinstance(ratio, _NUMBER) or not 0 <= ratio <= 1:
        raise FedLPError(f"ratio is a share of the examples, between 0 and 1; got {shown(ratio)}.")
    rng = _generator("mixed", seed)
    if reference:
        return _official_mixed(rng, labels, clients, float(ratio))
    at_random = round(count * (1 - float(ratio)))
    if 0 < count - at_random < 2 * clients:
        raise FedLPError(
            f"ratio={ratio:g} leaves {count - at_random:,} examples for the {2 * clients:,} shards "
            f"of {clients:,} clients; lower clients, or choose another ratio (0 is iid)."
        )
    shuffled = rng.permutation(np.arange(count, dtype=np.int32))
    iid_rows, rest = shuffled[:at_random], np.sort(shuffled[at_random:])
    iid_owner = np.repeat(np.arange(clients), sizes_of.even(at_random, clients))
    rows, owner = _dealt_shards(rng, labels, rest, clients, 2 * clients)
    return by_owner(
        np.concatenate([iid_rows, rows]), np.concatenate([iid_owner, owner]), clients, labels
    )


def natural(labels: Any, *, clients: Any) -> Partition:
    """Gives every client the examples that are its own, such as those of one writer.

    Args:
      labels: integers `[N]`.
      clients: integers or strings `[N]`, whose each example is. Client k is the k-th id in sorted
        order, as `numpy.unique(clients)` lists them.

    Returns:
      A partition that uses every example once, in the order of the data set.
    """
    labels = class_labels(labels)
    names, owner = np.unique(client_ids(clients, len(labels)), return_inverse=True)
    return by_owner(np.arange(len(labels), dtype=np.int32), owner, len(names), labels)


def _dealt_shards(
    rng: np.random.Generator,
    labels: np.ndarray,
    rows: np.ndarray | None,
    clients: int,
    total: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Sorts `rows` (None = all) by label, cuts them into `total` shards and deals these evenly."""
    if rows is None:
        rows = np.arange(len(labels), dtype=np.int32)
    rows = rows[np.argsort(labels[rows], kind="stable")]
    owner_of_shard = rng.permutation(total) % clients
    return rows, np.repeat(owner_of_shard, sizes_of.even(len(rows), total))


def _official_mixed(
    rng: np.random.Generator, labels: np.ndarray, clients: int, ratio: float
) -> Partition:
    """`mixed(reference=True)`, quirks and all; see there."""
    count = len(labels)
    at_random = int(count * (1 - ratio))
    each = at_random // clients
    shard = count // clients // 2 - each // 2
    if shard < 1:
        raise FedLPError(
            f"ratio={ratio:g} with {count:,} examples for {clients:,} clients leaves shards of "
            f"{shard} examples in the official scheme; lower clients, raise ratio, or pass "
            "reference=False."
        )
    total = count // shard
    first = np.argsort(labels[: total * shard], kind="stable").astype(np.int32)
    dealt = rng.permutation(total)[: 2 * clients]
    iid_rows = rng.permutation(np.arange(at_random, dtype=np.int32))[: each * clients]
    rows = np.concatenate([iid_rows, first.reshape(total, shard)[dealt].ravel()])
    owner = np.concatenate(
        [np.repeat(np.arange(clients), each), np.repeat(np.arange(2 * clients) // 2, shard)]
    )
    return by_owner(rows, owner, clients, labels)


def _generator(scheme: str, seed: Any) -> np.random.Generator:
    if not isinstance(seed, _INTEGER) or isinstance(seed, bool) or not 0 <= seed < 2**64:
        raise FedLPError(f"seed must be an integer in 0 .. 2**64 - 1, got {shown(seed)}.")
    return np.random.Generator(
        np.random.Philox(key=np.asarray([seed, _STREAM[scheme]], dtype=np.uint64))
    )


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, _INTEGER) or isinstance(value, bool) or value < 1:
        raise FedLPError(f"{name} must be a positive integer, got {shown(value)}.")
    if value >= 2**31:
        raise FedLPError(f"{name} is {shown(value)}, but fewer than 2**31 can be counted.")


def _check_clients(clients: Any, examples: int) -> None:
    _check_count("clients", clients)
    if clients > examples:
        raise FedLPError(
            f"{clients:,} clients cannot share {examples:,} examples: each needs at least one; "
            f"lower clients to {examples:,} or fewer."
        )


def _check_alpha(alpha: Any) -> None:
    if not isinstance(alpha, _NUMBER) or isinstance(alpha, bool) or not 0 < alpha < 1e300:
        raise FedLPError(
            f"alpha must be a positive finite number, got {shown(alpha)}; about 0.1 is very "
            "uneven, and beyond 100 a partition is close to iid."
        )


def _check_min_size(min_size: Any, clients: int, examples: int) -> None:
    _check_count("min_size", min_size)
    if min_size * clients > examples:
        raise FedLPError(
            f"min_size={min_size} for {clients:,} clients needs {min_size * clients:,} examples, "
            f"but there are {examples:,}; lower min_size to {examples // clients} or clients to "
            f"{examples // min_size:,}."
        )
