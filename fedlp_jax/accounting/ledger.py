"""The ledger: parameters and bytes exchanged, counted from the masks that were drawn.

Every number here is modelled: counted from layer tables and masks, exact, and never read from a
clock.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fedlp_jax.pruning.layers import LayerRule, LayerTable, layer_table
from fedlp_jax.types import Variables

BYTES = 4  # of a parameter or statistic on the wire: float32


class Wire(NamedTuple):
    """What a client exchanges with the server in a round, by layer.

    Where clients hold slices of layers, arrays are `[G, L]`, with a row for each submodel level.
    """

    upload: np.ndarray  # i64[L], bytes of each layer that it sends
    download: np.ndarray  # i64[L], bytes of each layer that it receives
    header: int  # bytes of an upload, whatever layers are in it
    beside: np.ndarray  # i64[L], the part of `upload` that no compression touches
    params: np.ndarray  # i64[L], parameters of each layer

    def at(self, level: Any) -> Wire:
        """The rows of clients at levels `i32[C]`; as it is where clients hold layers whole."""
        if self.params.ndim == 1:
            return self
        rows = (values[level] for values in (self.upload, self.download, self.beside, self.params))
        upload, download, beside, params = rows
        return Wire(upload, download, self.header, beside, params)


def wire_of(
    layers: LayerTable,
    upload: int = 0,
    download: int = 0,
    numbers: int = 0,
    compressed: np.ndarray | None = None,
) -> Wire:
    """What an algorithm exchanges: the model, and trees like its parameters with it.

    Every number takes 4 bytes unless it is compressed, the mask of an upload one bit per layer.

    Args:
      layers: the layer table; its sizes may be `[G, L]`, see `layers_of_levels`.
      upload: trees with an update, such as SCAFFOLD's change of the control variate.
      download: trees with the model, such as SCAFFOLD's control variate.
      numbers: single numbers with an update, such as FedNova's.
      compressed: `f64[L]`, expected bytes of the parameters of an update; None = 4 each.
    """
    tree = BYTES * layers.params
    beside = BYTES * layers.statistics + upload * tree
    header = mask_bytes(layers) + BYTES * numbers
    sent = beside + (tree if compressed is None else compressed)
    return Wire(sent, layer_bytes(layers) + download * tree, header, beside, layers.params)


def layers_of_levels(layers: LayerTable, held: Sequence[LayerTable]) -> LayerTable:
    """The layer table with sizes `[G, L]`: what each level holds of each layer."""
    return dataclasses.replace(
        layers,
        params=np.stack([table.params for table in held]),
        statistics=np.stack([table.statistics for table in held]),
    )


class Ledger:
    """Parameters and bytes, up and down, by layer, client and round.

    A client downloads what its submodel shares with the server and uploads the layers that it
    keeps. `*_params` count learnable parameters, as the FedLP paper does. `*_bytes` count
    everything exchanged: parameters and batch statistics at 4 bytes each, what an algorithm sends
    with them and, for an upload, one bit per layer for its mask. An upload that the aggregate
    leaves out (NaN) still counts as sent.

    Attributes:
      layers: the layer table.
      wire: bytes of each layer, up and down.
      senders: for each round `i64[L]`, clients that sent each layer; `i64[G, L]`, of each level,
        where clients hold slices of layers.
      receivers: the same of clients that received each layer.
      clients: for each round, clients that reported: C unless some fail.
      upload_bytes: for each round, of all clients.
      layer_upload_bits: `i64[L]`, over all rounds, without masks and numbers of their own.
      client_upload_bytes: `i64[K]`, over all rounds.
      client_download_bytes: `i64[K]`, over all rounds.
    """

    def __init__(self, layers: LayerTable, clients: int, wire: Wire | None = None):
        self.layers = layers
        self.wire = wire or wire_of(layers)
        self.senders: list[np.ndarray] = []
        self.receivers: list[np.ndarray] = []
        self.clients: list[int] = []
        self.upload_bytes: list[int] = []
        self.layer_upload_bits = np.zeros(len(layers), np.int64)
        self.client_upload_bytes = np.zeros(clients, np.int64)
        self.client_download_bytes = np.zeros(clients, np.int64)

    def add(
        self,
        client: np.ndarray,
        upload: np.ndarray,
        download: np.ndarray,
        arrived: np.ndarray | None = None,
        bits: np.ndarray | None = None,
        level: np.ndarray | None = None,
    ) -> dict[str, int]:
        """Books one round.

        Args:
          client: `i32[C]`, client ids.
          upload: `f32[C, L]`, 1 = sent.
          download: `f32[C, L]`, 1 = received.
          arrived: `bool[C]`, clients that reported; the others sent nothing, not even a mask.
            None = all.
          bits: `i32[C, L]`, of each layer's parameters where uploads are compressed, counted by
            the round; None = they are not.
          level: `i32[C]`, submodel levels, where clients hold slices of layers.

        Returns:
          The round's `upload_params`, `download_params`, `upload_bytes`, `download_bytes`, summed
          over the cohort.
        """
        upload, download = upload.astype(np.int64), download.astype(np.int64)
        arrived = np.ones(len(client), bool) if arrived is None else arrived
        wire = self.wire.at(level)
        self.senders.append(self._by_level(upload, level))
        self.receivers.append(self._by_level(download, level))
        self.clients.append(int(arrived.sum()))
        if bits is None:
            whole = upload * wire.upload.astype(np.int64)
            sent = whole.sum(axis=1) + wire.header * arrived
            self.layer_upload_bits += 8 * whole.sum(axis=0)
        else:
            bits = upload * bits.astype(np.int64)
            beside = upload * wire.beside
            sent = -(-bits.sum(axis=1) // 8) + beside.sum(axis=1) + wire.header * arrived
            self.layer_upload_bits += bits.sum(axis=0) + 8 * beside.sum(axis=0)
        self.upload_bytes.append(int(sent.sum()))
        self.client_upload_bytes[client] += sent
        self.client_download_bytes[client] += (download * wire.download).sum(axis=1)
        row = modelled_traffic(
            self.layers, self.senders[-1], self.receivers[-1], self.clients[-1], self.wire
        )
        row["upload_bytes"] = self.upload_bytes[-1]
        return {name: int(value) for name, value in row.items()}

    def __repr__(self) -> str:
        """Rounds, layers and the traffic of all clients."""
        up, down = (self.total[f"{way}_bytes"] / 1e6 for way in ("upload", "download"))
        rounds = f"{len(self.clients)} rounds of {len(self.layers)} layers"
        return f"Ledger({rounds}: {up:,.4g} MB up, {down:,.4g} MB down)"

    @property
    def total(self) -> dict[str, int]:
        """The same four numbers, summed over all rounds."""
        booked = self.arrays()
        rounds = modelled_traffic(
            self.layers, booked["senders"], booked["receivers"], booked["clients"], self.wire
        )
        rounds["upload_bytes"] = booked["upload_bytes"]
        return {name: int(values.sum()) for name, values in rounds.items()}

    @property
    def layer_upload_params(self) -> np.ndarray:
        """`i64[L]`, parameters of each layer sent over all rounds."""
        sent = self.arrays()["senders"].sum(axis=0) * self.wire.params
        return sent if sent.ndim == 1 else sent.sum(axis=0)

    def _by_level(self, exchanged: np.ndarray, level: np.ndarray | None) -> np.ndarray:
        """The clients of each layer, by level where the wire distinguishes levels."""
        if self.wire.params.ndim == 1 or level is None:
            return exchanged.sum(axis=0)
        counts = np.zeros(self.wire.params.shape, np.int64)
        np.add.at(counts, level, exchanged)
        return counts

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything booked so far, for `load`."""
        shape = (-1, *self.wire.params.shape)
        return {
            "senders": np.asarray(self.senders, np.int64).reshape(shape),
            "receivers": np.asarray(self.receivers, np.int64).reshape(shape),
            "clients": np.asarray(self.clients, np.int64),
            "upload_bytes": np.asarray(self.upload_bytes, np.int64),
            "layer_upload_bits": self.layer_upload_bits.copy(),
            "client_upload_bytes": self.client_upload_bytes.copy(),
            "client_download_bytes": self.client_download_bytes.copy(),
        }

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """Restores the ledger that returned these `arrays`."""
        self.senders = list(arrays["senders"])
        self.receivers = list(arrays["receivers"])
        self.clients = arrays["clients"].tolist()
        self.upload_bytes = arrays["upload_bytes"].tolist()
        self.layer_upload_bits = arrays["layer_upload_bits"].copy()
        self.client_upload_bytes = arrays["client_upload_bytes"].copy()
        self.client_download_bytes = arrays["client_download_bytes"].copy()


def layer_bytes(layers: LayerTable) -> np.ndarray:
    """`i64[L]`, bytes of each layer on the wire: parameters and batch statistics."""
    return BYTES * (layers.params + layers.statistics)


def mask_bytes(layers: LayerTable) -> int:
    """Bytes of one client's upload mask: ceil(L / 8)."""
    return -(-len(layers) // 8)


def modelled_traffic(
    layers: LayerTable,
    senders: np.ndarray,
    receivers: np.ndarray,
    clients: Any,
    wire: Wire | None = None,
) -> dict[str, Any]:
    """Traffic of a round, from the number of clients that exchange each layer.

    Expected numbers of clients give the expected traffic.

    Args:
      layers: the layer table.
      senders: `[..., L]`, clients that send each layer; `[..., G, L]` where `wire` is by level.
      receivers: the same of clients that receive it.
      clients: `[...]` or a number, clients that send a mask.
      wire: bytes of each layer; None = of the model alone.

    Returns:
      `upload_params`, `download_params`, `upload_bytes`, `download_bytes`, each `[...]`.
    """
    wire = wire or wire_of(layers)

    def total(counts: np.ndarray, sizes: np.ndarray) -> Any:
        return counts @ sizes if sizes.ndim == 1 else (counts * sizes).sum(axis=(-2, -1))

    return {
        "upload_params": total(senders, wire.params),
        "download_params": total(receivers, wire.params),
        "upload_bytes": total(senders, wire.upload) + clients * wire.header,
        "download_bytes": total(receivers, wire.download),
    }


def fedavg_traffic(
    variables: Variables, rule: LayerRule, layers: LayerTable, *, senders: int, receivers: int
) -> dict[str, int]:
    """Modelled traffic of FedAvg, in which every client receives and sends the whole model.

    Args:
      variables: of the deepest model.
      rule: assigns variables to layers.
      layers: all layers of the server, which may hold more (shared heads).
      senders: clients that report, summed over rounds.
      receivers: clients that start, summed over rounds; some may fail later.

    Returns:
      The four numbers of `Ledger.add`.
    """
    covered = layer_table(variables, rule, layers.names).covered
    names = [name for name, held in zip(layers.names, covered, strict=True) if held]
    whole = layer_table(variables, rule, names)
    everything = np.ones(len(names), np.int64)
    row = modelled_traffic(whole, senders * everything, receivers * everything, senders)
    return {name: int(value) for name, value in row.items()}
