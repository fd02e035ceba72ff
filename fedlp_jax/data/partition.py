"""Which client holds which training examples: `Partition`, and the schemes that make one.

Every scheme works on whole arrays, so a million clients take about a second. It draws from a Philox
generator keyed by the seed and the scheme, and never redraws until a request happens to fit. All
schemes raise `FedLPError` for bad labels or settings, and for what the examples cannot give.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from fedlp_jax.data.dataset import class_labels, client_ids, integers, read_only
from fedlp_jax.data.files import open_plain, read_plain, replacing
from fedlp_jax.errors import FedLPError, check_client, check_number, shown, why

# The second word of the Philox key: no two schemes share their draws under one seed.
_STREAM = {"iid": 1, "dirichlet": 2, "shards": 3, "mixed": 4, "quantity": 5, "alike": 6}
_FILE_BYTES = 2**30  # limit for a file with a split


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Partition:
    """The training examples of K clients, as compressed sparse rows.

    Client k holds the rows `order[offset[k] : offset[k + 1]]` of the training split, at least one.
    Some rows may belong to nobody. `fl.simulate` trains only on the labels that the partition was
    made from. Targets without classes, such as real numbers, count as one class.

    Raises:
      FedLPError: the arrays contradict each other.
    """

    order: np.ndarray  # i32[N'], rows of the training split, client after client
    offset: np.ndarray  # i64[K + 1], from 0 to N'
    labels: np.ndarray  # i32[N], class labels of the whole training split
    num_classes: int
    repeats: bool = False  # whether a row may occur more than once; each copy is trained on

    def __post_init__(self) -> None:
        labels = class_labels("labels", self.labels)
        order, offset = integers("order", self.order), integers("offset", self.offset)
        if len(offset) < 2 or offset[0] != 0 or offset[-1] != len(order):
            raise FedLPError(
                f"offset must go from 0 to the {len(order):,} rows of order over at least one "
                f"client; got {len(offset)} entries, {offset[:1].tolist()} to "
                f"{offset[-1:].tolist()}."
            )
        sizes = np.diff(offset.astype(np.int64))  # signed, so that a falling offset is negative
        if sizes.min() < 1:
            raise FedLPError(
                f"Client {sizes.argmin()} holds {sizes.min()} examples ({(sizes < 1).sum():,} of "
                f"{len(sizes):,} clients hold none); offset must rise at every client."
            )
        if order.min() < 0 or order.max() >= len(labels):
            raise FedLPError(
                f"order holds rows {order.min()} to {order.max()}, outside the {len(labels):,} "
                "labelled examples."
            )
        if labels.max() >= check_number("num_classes", self.num_classes, ge=1, integer=True):
            raise FedLPError(
                f"label {labels.max()} is out of range for num_classes={self.num_classes}."
            )
        counts = np.bincount(order)
        if counts.max() > 1 and not self.repeats:
            raise FedLPError(
                f"order holds {(counts > 1).sum():,} rows more than once (row {counts.argmax()} "
                f"{counts.max()} times), which would count twice; remove them, or pass "
                "repeats=True."
            )
        order, offset = read_only(order, np.int32), read_only(offset, np.int64)
        for name, value in (("order", order), ("offset", offset), ("labels", labels)):
            object.__setattr__(self, name, value)

    @property
    def clients(self) -> int:
        """K, the number of clients."""
        return len(self.offset) - 1

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """Examples per client, `i64[K]`."""
        return read_only(np.diff(self.offset), np.int64)

    def rows(self, client: int) -> np.ndarray:
        """Rows of the training split that a client holds, `i32[n_k]`.

        Raises:
          FedLPError: the client does not exist.
        """
        check_client(client, self.clients)
        return self.order[self.offset[client] : self.offset[client + 1]]

    @functools.cached_property
    def histogram(self) -> np.ndarray:
        """Examples per client and class, `i64[K, num_classes]`."""
        counts = np.bincount(self._cells(), minlength=self.clients * self.num_classes)
        return read_only(counts, np.int64).reshape(self.clients, self.num_classes)

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of the partition and its labels; the same on every platform."""
        digest = hashlib.sha256(f"partition {self.clients} {self.num_classes} ".encode())
        for array, kind in ((self.offset, "<i8"), (self.order, "<i4"), (self.labels, "<i4")):
            digest.update(np.ascontiguousarray(array, kind).data)
        return digest.hexdigest()

    def describe(self) -> str:
        """One line: clients, examples, and the sizes and classes of a client."""
        sizes = self.sizes
        owner = np.unique(self._cells()) // self.num_classes
        classes = np.bincount(owner, minlength=self.clients)
        return (
            f"{self.clients:,} clients with {len(self.order):,} examples of {self.num_classes} "
            f"classes; per client {sizes.min():,} to {sizes.max():,} examples (median "
            f"{np.median(sizes):g}) of {classes.min()} to {classes.max()} classes (median "
            f"{np.median(classes):g})"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the rows of each client as JSON, for `from_file`.

        Raises:
          FedLPError: the file cannot be written.
        """
        rows = [self.rows(client).tolist() for client in range(self.clients)]
        file = Path(os.path.expanduser(path))
        if file.suffix != ".json":
            raise FedLPError(f"a partition is saved as JSON; name a .json file, not {file.name}.")
        try:
            with replacing(file) as opened:
                opened.write(json.dumps(rows, separators=(",", ":")).encode())
        except OSError as error:
            raise FedLPError(f"{path} cannot be written: {why(error)}.") from error

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Plots the partition, see `fedlp_jax.reporting.plots.partition`."""
        from fedlp_jax.reporting import plots

        return plots.partition(self, path)

    def _cells(self) -> np.ndarray:
        """`client * num_classes + label` of every example, `i64[N']`."""
        client = np.repeat(np.arange(self.clients), self.sizes)
        return client * self.num_classes + self.labels[self.order]

    def __repr__(self) -> str:
        return f"Partition({self.describe()})"


def iid(labels: Any, *, clients: int, seed: int = 0) -> Partition:
    """Deals all examples at random, in sizes that differ by at most one.

    Args:
      labels: integers `[N]`, or targets `[N, ...]` of any kind.
      clients: K, at most N.
      seed: of the deal.

    Returns:
      A partition that uses every example once.
    """
    labels, clients = _checked(_labels_of(labels), clients)
    rows = _generator("iid", seed).permutation(np.arange(len(labels), dtype=np.int32))
    return _by_size(rows, _even_sizes(len(labels), clients), labels)


def quantity(
    labels: Any, *, clients: int, alpha: float, seed: int = 0, min_size: int = 1
) -> Partition:
    """Skews the sizes and not the classes: client sizes in shares ~ Dirichlet(alpha).

    Args:
      labels: integers `[N]`, or targets `[N, ...]` of any kind.
      clients: K.
      alpha: positive; the smaller, the more unequal the sizes.
      seed: of sizes and deal.
      min_size: at least 1; smaller clients take examples from the largest ones.

    Returns:
      A partition that uses every example once.
    """
    labels, clients = _checked(_labels_of(labels), clients, alpha)
    min_size = _min_size(min_size, clients, len(labels))
    rng = _generator("quantity", seed)
    sizes = _raise_sizes(_dirichlet_sizes(rng, alpha, clients, len(labels)), min_size)
    return _by_size(rng.permutation(np.arange(len(labels), dtype=np.int32)), sizes, labels)


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
      alpha: positive; the smaller, the fewer classes per client.
      seed: of the shares, and of the order of a class before it is cut.
      min_size: smaller clients take random examples from the largest ones. None moves nothing and
        refuses a draw that leaves a client empty.
      reference: follow `get_dirichlet_noniid` of the official code: cut each class in the order of
        the data set, and use only the first 1000 K examples.

    Returns:
      A partition that uses every example once (with `reference`, the first 1000 K).
    """
    labels, clients = _checked(labels, clients, alpha)
    eligible = labels[: 1000 * clients] if reference else labels
    if min_size is not None:
        min_size = _min_size(min_size, clients, len(eligible))
    rng = _generator("dirichlet", seed)
    pieces, owners = [], []
    by_class = np.argsort(eligible, kind="stable").astype(np.int32)
    for rows in np.split(by_class, np.cumsum(np.bincount(eligible))[:-1]):
        pieces.append(rows if reference else rng.permutation(rows))
        sizes = _dirichlet_sizes(rng, alpha, clients, len(rows))
        owners.append(np.repeat(np.arange(clients, dtype=np.int32), sizes))
    owner = np.concatenate(owners)
    sizes = np.bincount(owner, minlength=clients)
    if min_size is not None:
        owner = _reassign(rng, owner, _raise_sizes(sizes, min_size))
    elif sizes.min() == 0:
        raise FedLPError(
            f"dirichlet with alpha={alpha:g} left {(sizes == 0).sum():,} of {clients:,} clients "
            "without examples. Pass min_size=1, which moves examples to them from the largest "
            "clients, or a larger alpha."
        )
    return by_owner(np.concatenate(pieces), owner, clients, labels)


def shards(labels: Any, *, clients: int, shards_per_client: int = 2, seed: int = 0) -> Partition:
    """Sorts by label, cuts into equal shards and deals them, so that a client has few classes.

    McMahan et al. (arXiv:1602.05629) call this partition pathological. A shard that spans the
    border of two classes gives its client both.

    Args:
      labels: integers `[N]`.
      clients: K.
      shards_per_client: s; the K s shards differ in size by at most one.
      seed: of the deal.

    Returns:
      A partition that uses every example once.
    """
    labels, clients = _checked(labels, clients)
    total = clients * check_number("shards_per_client", shards_per_client, ge=1, integer=True)
    if total > len(labels):
        raise FedLPError(
            f"{clients:,} clients x {shown(shards_per_client)} shards need more than the "
            f"{len(labels):,} examples; lower either."
        )
    rows = np.arange(len(labels), dtype=np.int32)
    rows, owner = _deal_shards(_generator("shards", seed), labels, rows, clients, total)
    return by_owner(rows, owner, clients, labels)


def mixed(
    labels: Any, *, clients: int, ratio: float = 0.95, seed: int = 0, reference: bool = False
) -> Partition:
    """Gives every client two label shards and some iid examples: FedLP's M-niid.

    Args:
      labels: integers `[N]`.
      clients: K.
      ratio: share of the data that is dealt in shards, 2 per client; the rest is dealt at random.
      seed: of which examples go where.
      reference: follow `get_mixed_noniid` of the official code. It deals the first
        int(N (1 - ratio)) examples at random. It then cuts the whole sorted data set into shards of
        N // K // 2 - (random examples per client) // 2 examples, deals 2 to each client and leaves
        the surplus unused. So an example may occur twice. (Ties of the sort go by position here;
        there they are undefined.) With 50,000 examples and 100 clients: 25 + 2 x 238 = 501 each.

    Returns:
      A partition that uses every example once, in sizes that differ by at most three; with
      `reference`, see there.
    """
    labels, clients = _checked(labels, clients)
    count = len(labels)
    ratio = check_number("ratio", ratio, ge=0, le=1, hint="it is a share of the examples")
    rng = _generator("mixed", seed)
    if reference:
        return _mixed_reference(rng, labels, clients, float(ratio))
    at_random = round(count * (1 - float(ratio)))
    if 0 < count - at_random < 2 * clients:
        raise FedLPError(
            f"ratio={ratio:g} leaves {count - at_random:,} examples for the {2 * clients:,} shards "
            f"of {clients:,} clients; lower clients, or choose another ratio (0 is iid)."
        )
    shuffled = rng.permutation(np.arange(count, dtype=np.int32))
    iid_rows, rest = shuffled[:at_random], np.sort(shuffled[at_random:])
    iid_owner = np.repeat(np.arange(clients), _even_sizes(at_random, clients))
    rows, owner = _deal_shards(rng, labels, rest, clients, 2 * clients)
    return by_owner(
        np.concatenate([iid_rows, rows]), np.concatenate([iid_owner, owner]), clients, labels
    )


def natural(labels: Any, *, clients: Any) -> Partition:
    """Gives every client its own examples, such as those of one writer.

    Args:
      labels: integers `[N]`, or targets `[N, ...]` of any kind.
      clients: integers or strings `[N]`, the client id of each example. Client k is the k-th id in
        sorted order, as in `numpy.unique(clients)`.

    Returns:
      A partition that uses every example once, in the order of the data set.
    """
    labels = _labels_of(labels)
    ids, owner = np.unique(client_ids(clients, len(labels)), return_inverse=True)
    return by_owner(np.arange(len(labels), dtype=np.int32), owner, len(ids), labels)


def from_file(labels: Any, *, path: str | os.PathLike[str]) -> Partition:
    """Reads a split that was made elsewhere, or saved with `Partition.save`.

    Args:
      labels: integers `[N]`, or targets `[N, ...]` of any kind.
      path: a `.json` file, either a list with the rows of each client, `[[0, 5, ...], [1, ...]]`,
        or an object, `{"alice": [0, 5, ...], ...}`, whose order is that of the clients; or a `.npy`
        file with the client of each example, see `natural`.

    Returns:
      A partition with the rows in the order of the file. Rows count from 0 in the training split;
      some may be left out, and none may occur twice.
    """
    labels = _labels_of(labels)
    file = Path(os.path.expanduser(path))
    try:
        if file.suffix == ".npy":
            with open_plain(file) as opened:
                return natural(labels, clients=np.load(opened, allow_pickle=False))
        content = json.loads(read_plain(file, _FILE_BYTES))
    except FileNotFoundError:
        raise FedLPError(f"there is no file {path}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FedLPError(
            f"{path} cannot be read as a split ({why(error)}); write JSON such as "
            "[[0, 5], [1, 2]], the rows of each client, or a .npy of client ids."
        ) from None
    clients = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(clients, list) or not all(isinstance(rows, list) for rows in clients):
        raise FedLPError(
            f"{path} holds {shown(content)}; expected a list of rows for each client, such as "
            "[[0, 5], [1, 2]]."
        )
    if not clients:
        raise FedLPError(f"{path} holds no client; give one list of rows for each.")
    order = integers("rows", list(itertools.chain.from_iterable(clients)))
    sizes = np.array([len(rows) for rows in clients], np.int64)
    return _by_size(order, sizes, labels)


def made_for(clients: Partition, targets: Any) -> bool:
    """Whether a partition was made from these labels."""
    return np.array_equal(clients.labels, _labels_of(targets))


def dealt_alike(clients: Partition, targets: Any) -> tuple[np.ndarray, np.ndarray]:
    """Deals other examples to the clients of a partition, so that each meets its own classes again.

    The examples of a class go to the clients in proportion to how many of that class they hold,
    rounded so that each example has one owner; those of a class that nobody holds have none. Which
    they are depends on nothing else.

    Args:
      clients: the partition of a training split.
      targets: of the other split; without classes, they count as one class.

    Returns:
      `order i32[N'], offset i64[K + 1]`, as in `Partition`, but a client may hold none.
    """
    labels = _labels_of(targets)
    shuffled = _generator("alike", 0).permutation(len(labels))
    owner = np.full(len(labels), -1)
    for label in range(clients.num_classes):
        rows, held = shuffled[labels[shuffled] == label], np.cumsum(clients.histogram[:, label])
        if held[-1]:
            edges = len(rows) * held // held[-1]  # whole numbers: the same on every platform
            owner[rows] = np.repeat(np.arange(clients.clients), np.diff(edges, prepend=0))
    order = np.argsort(owner, kind="stable")[(owner < 0).sum() :]
    sizes = np.bincount(owner[owner >= 0], minlength=clients.clients)
    return order.astype(np.int32), np.concatenate([[0], np.cumsum(sizes)])


def _mixed_reference(
    rng: np.random.Generator, labels: np.ndarray, clients: int, ratio: float
) -> Partition:
    """`mixed(reference=True)`, with the quirks listed there."""
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
    by_label = np.argsort(labels[: total * shard], kind="stable").astype(np.int32)
    hand = rng.permutation(total)[: 2 * clients]
    iid_rows = rng.permutation(np.arange(at_random, dtype=np.int32))[: each * clients]
    rows = np.concatenate([iid_rows, by_label.reshape(total, shard)[hand].ravel()])
    owner = np.concatenate(
        [np.repeat(np.arange(clients), each), np.repeat(np.arange(2 * clients) // 2, shard)]
    )
    return by_owner(rows, owner, clients, labels, repeats=True)


def _deal_shards(
    rng: np.random.Generator, labels: np.ndarray, rows: np.ndarray, clients: int, total: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sorts `rows` by label, cuts them into `total` shards, deals these evenly: rows and owners."""
    rows = rows[np.argsort(labels[rows], kind="stable")]
    owner_of_shard = rng.permutation(total) % clients
    return rows, np.repeat(owner_of_shard, _even_sizes(len(rows), total))


def by_owner(
    rows: np.ndarray, owner: np.ndarray, clients: int, labels: np.ndarray, repeats: bool = False
) -> Partition:
    """The partition in which row `rows[i]` belongs to client `owner[i]`.

    Args:
      rows: `i32[N']`; a client keeps its rows in this order.
      owner: integers `[N']` in `0 .. clients - 1`.
      clients: K.
      labels: `i32[N]`, of the whole training split.
      repeats: whether a row may occur more than once.

    Returns:
      The partition, of one class more than the largest label.
    """
    sizes = np.bincount(owner, minlength=clients)
    return _by_size(rows[np.argsort(owner, kind="stable")], sizes, labels, repeats)


def _by_size(
    rows: np.ndarray, sizes: np.ndarray, labels: np.ndarray, repeats: bool = False
) -> Partition:
    """The partition that cuts `rows` into pieces of `sizes`, `i64[K]`."""
    offset = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    return Partition(rows, offset, labels, int(labels.max()) + 1, repeats)


def _even_sizes(examples: int, parts: int) -> np.ndarray:
    """Sizes `i64[parts]` that sum to `examples` and differ by at most one."""
    return np.diff(np.arange(parts + 1) * examples // parts)


def _dirichlet_sizes(
    rng: np.random.Generator, alpha: float, clients: int, examples: int
) -> np.ndarray:
    """Sizes `i64[K]` in shares ~ Dirichlet(alpha 1_K), cut at floor(cumulated share x N)."""
    shares = rng.dirichlet(np.full(clients, alpha))
    cuts = (np.cumsum(shares)[:-1] * examples).astype(np.int64)
    cuts = np.minimum(cuts, examples)  # the rounded sum of the shares may exceed 1
    return np.diff(cuts, prepend=0, append=examples)


def _raise_sizes(sizes: np.ndarray, min_size: int) -> np.ndarray:
    """Raises sizes below `min_size` to it and cuts the largest down to one level; keeps the sum.

    The level is the highest that frees enough. Clients between `min_size` and the level keep their
    size. Ties go by client number, so nothing is drawn.

    Args:
      sizes: `i64[K]` with `sum >= K * min_size`.
      min_size: at least 0.

    Returns:
      `i64[K]`.
    """
    shortage = np.maximum(min_size - sizes, 0).sum()
    low, high = min_size, int(sizes.max())
    while low < high:  # bisection: at most 31 steps
        level = (low + high + 1) // 2
        if np.maximum(sizes - level, 0).sum() >= shortage:
            low = level
        else:
            high = level - 1
    target = np.clip(sizes, min_size, low)
    # The level frees less than one example per cut client beyond the shortage.
    spare = sizes.sum() - target.sum()
    target[np.flatnonzero(sizes > low)[:spare]] += 1
    return target


def _reassign(rng: np.random.Generator, owner: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Moves random examples from clients above their target size to those below.

    Args:
      rng: picks the examples that move and where each goes.
      owner: integers `[N]`, the client of each example.
      target: `i64[K]`, sizes to reach, of sum N.

    Returns:
      `owner` with the fewest possible changes.
    """
    sizes = np.bincount(owner, minlength=len(target))
    shortage = np.maximum(target - sizes, 0)
    if not shortage.any():
        return owner
    shuffled = rng.permutation(len(owner))
    grouped = shuffled[np.argsort(owner[shuffled], kind="stable")]  # by client, in random order
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    surplus = grouped[rank >= np.repeat(target, sizes)]
    owner = owner.copy()
    owner[rng.permutation(surplus)] = np.repeat(np.arange(len(target)), shortage)
    return owner


def _generator(scheme: str, seed: Any) -> np.random.Generator:
    if check_number("seed", seed, ge=0, integer=True) >= 2**64:
        raise FedLPError(f"seed={shown(seed)} must be below 2**64.")
    return np.random.Generator(
        np.random.Philox(key=np.asarray([seed, _STREAM[scheme]], dtype=np.uint64))
    )


def _labels_of(targets: Any) -> np.ndarray:
    """Class labels `i32[N]`, checked; targets without classes, such as floats, count as one."""
    array = np.asarray(targets)
    if (array.ndim > 1 and array.shape[1:] != (1,)) or array.dtype.kind == "f":
        targets = np.zeros(len(array), np.int32)
    return class_labels("labels", targets)


def _checked(labels: Any, clients: Any, alpha: Any = 1.0) -> tuple[np.ndarray, int]:
    """Labels `i32[N]` and K, after the checks that the schemes share."""
    labels = class_labels("labels", labels)
    clients = check_number("clients", clients, ge=1, integer=True)
    if clients > len(labels):
        raise FedLPError(
            f"{shown(clients)} clients cannot share {len(labels):,} examples, since each needs at "
            f"least one; lower clients to {len(labels):,} or fewer."
        )
    hint = "about 0.1 is very uneven, and beyond 100 a partition is close to iid"
    check_number("alpha", alpha, gt=0, lt=1e300, hint=hint)
    return labels, clients


def _min_size(min_size: Any, clients: int, examples: int) -> int:
    min_size = check_number("min_size", min_size, ge=1, integer=True)
    if min_size * clients > examples:
        raise FedLPError(
            f"min_size={shown(min_size)} for {clients:,} clients needs more than the "
            f"{examples:,} examples; lower min_size to {examples // clients} or clients to "
            f"{examples // min_size:,}."
        )
    return min_size
