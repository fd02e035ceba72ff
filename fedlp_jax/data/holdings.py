"""`Partition`: which examples each client holds, as compressed rows."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from typing import Any

import numpy as np

from fedlp_jax.data.dataset import as_array
from fedlp_jax.errors import FedLPError, shown


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Partition:
    """The examples of K clients, of any sizes, in compressed rows.

    Client k holds the rows `order[offset[k] : offset[k + 1]]` of the training split. Every client
    holds at least one; a row may occur more than once, and some may occur nowhere.

    Raises:
      FedLPError: the arrays contradict each other.
    """

    order: np.ndarray  # i32[N'], rows of the training split, client after client
    offset: np.ndarray  # i64[K + 1], from 0 to N'
    labels: np.ndarray  # i32[N], of the whole training split
    num_classes: int

    def __post_init__(self) -> None:
        labels = class_labels(self.labels)
        order, offset = _integers("order", self.order), _integers("offset", self.offset)
        if len(offset) < 2 or offset[0] != 0 or offset[-1] != len(order):
            raise FedLPError(
                f"offset must go from 0 to the {len(order):,} rows of order over at least one "
                f"client; got {len(offset)} entries, {offset[:1].tolist()} to "
                f"{offset[-1:].tolist()}."
            )
        sizes = np.diff(offset.astype(np.int64))  # of unsigned numbers, no step is below 0
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
        classes = self.num_classes
        if not isinstance(classes, int | np.integer) or isinstance(classes, bool):
            raise FedLPError(f"num_classes must be a whole number, got {shown(classes)}.")
        if labels.max() >= classes:
            raise FedLPError(
                f"label {labels.max()} is out of range for num_classes={self.num_classes}."
            )
        order, offset = _frozen(order, np.int32), _frozen(offset, np.int64)
        for name, value in (("order", order), ("offset", offset), ("labels", labels)):
            object.__setattr__(self, name, value)

    @property
    def clients(self) -> int:
        """K."""
        return len(self.offset) - 1

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """Examples of each client, `i64[K]`."""
        return _frozen(np.diff(self.offset), np.int64)

    def rows(self, client: int) -> np.ndarray:
        """Rows of the training split that a client holds, `i32[n_k]`."""
        whole = isinstance(client, int | np.integer) and not isinstance(client, bool)
        if not whole or not 0 <= client < self.clients:
            raise FedLPError(
                f"There is no client {shown(client)}: they count from 0 to {self.clients - 1}."
            )
        return self.order[self.offset[client] : self.offset[client + 1]]

    @functools.cached_property
    def histogram(self) -> np.ndarray:
        """Examples of each client and class, `i64[K, num_classes]`."""
        counts = np.bincount(self._cells(), minlength=self.clients * self.num_classes)
        return _frozen(counts, np.int64).reshape(self.clients, self.num_classes)

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of the partition and the labels it was made for; the same on every platform."""
        digest = hashlib.sha256(f"partition {self.clients} {self.num_classes} ".encode())
        for array, kind in ((self.offset, "<i8"), (self.order, "<i4"), (self.labels, "<i4")):
            digest.update(np.ascontiguousarray(array, kind).data)
        return digest.hexdigest()

    def describe(self) -> str:
        """One line of what there is: clients, examples, sizes and classes a client."""
        sizes = self.sizes
        owner = np.unique(self._cells()) // self.num_classes
        classes = np.bincount(owner, minlength=self.clients)
        return (
            f"{self.clients:,} clients with {len(self.order):,} examples of {self.num_classes} "
            f"classes; per client {sizes.min():,} to {sizes.max():,} examples (median "
            f"{np.median(sizes):g}) of {classes.min()} to {classes.max()} classes (median "
            f"{np.median(classes):g})"
        )

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws it, see `fedlp_jax.reporting.plots.partition`."""
        from fedlp_jax.reporting import plots

        return plots.partition(self, path)

    def _cells(self) -> np.ndarray:
        """Client times class of every example held, as one number: `i64[N']`."""
        client = np.repeat(np.arange(self.clients), self.sizes)
        return client * self.num_classes + self.labels[self.order]

    def __repr__(self) -> str:
        return f"Partition({self.describe()})"


def by_owner(rows: np.ndarray, owner: np.ndarray, clients: int, labels: np.ndarray) -> Partition:
    """The partition in which row `rows[i]` belongs to client `owner[i]`.

    Args:
      rows: `i32[N']`; a client keeps its rows in this order.
      owner: integers `[N']` in `0 .. clients - 1`.
      clients: K.
      labels: `i32[N]`, of the whole training split.

    Returns:
      The partition, of as many classes as there are labels.
    """
    sizes = np.bincount(owner, minlength=clients)
    return by_size(rows[np.argsort(owner, kind="stable")], sizes, labels)


def by_size(rows: np.ndarray, sizes: np.ndarray, labels: np.ndarray) -> Partition:
    """The partition that cuts `rows` into pieces of the given sizes, `i64[K]`."""
    offset = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    return Partition(rows, offset, labels, int(labels.max()) + 1)


def class_labels(labels: Any) -> np.ndarray:
    """Checks labels and returns them as read-only `i32[N]`.

    Raises:
      FedLPError: they are not a list of at least one class number from 0 up.
    """
    labels = _integers("labels", labels)
    if len(labels) == 0:
        raise FedLPError("labels are empty; a partition needs at least one example.")
    if labels.min() < 0 or labels.max() >= 2**31 - 1 or len(labels) >= 2**31:
        raise FedLPError(
            f"{len(labels):,} labels go from {labels.min()} to {labels.max()}; expected class "
            "numbers from 0 up, and fewer than 2**31 of them."
        )
    return _frozen(labels, np.int32)


def _integers(name: str, values: Any) -> np.ndarray:
    values = as_array(name, values)
    if values.ndim != 1 or not (np.issubdtype(values.dtype, np.integer) or values.size == 0):
        raise FedLPError(
            f"{name} must be a one-dimensional array of integers, got {values.dtype}"
            f"{list(values.shape)}."
        )
    return values


def _frozen(values: np.ndarray, dtype: type) -> np.ndarray:
    """A read-only view, or copy if the type differs; the caller's array stays writable."""
    view: np.ndarray = np.ascontiguousarray(values, dtype)[:]
    view.flags.writeable = False
    return view
