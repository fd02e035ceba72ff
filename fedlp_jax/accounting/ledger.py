"""The ledger: what was really sent, from the real masks, and what a forward pass costs.

Everything here is `modelled`: counted from layer tables, masks and traced programs, exact, and
never read from a clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.extend.core import jaxprs_in_params

from fedlp_jax.nn import conv, dense
from fedlp_jax.pruning.layers import LayerRule, LayerTable, layer_table
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import Array, Batch, Variables

BYTES = 4  # of a parameter or statistic on the wire: float32
_NORM_OPERATIONS = 4  # per element of a batch normalisation, the convention of the FedLP table


class Ledger:
    """Parameters and bytes, up and down, per layer, client and round.

    A client downloads what its submodel shares with the server and uploads the layers it kept.
    `*_params` count learnable parameters, as the FedLP paper does; `*_bytes` all that is exchanged:
    parameters and batch statistics at 4 bytes, and for an upload one bit per layer for its mask. A
    client that was left out of the mean has sent all the same.

    Attributes:
      layers: the layer table.
      senders: for each round `i64[L]`, clients that sent each layer.
      receivers: for each round `i64[L]`, clients that received it.
      clients: for each round, the clients that were heard: C, unless there are faults.
      client_upload_bytes: `i64[K]`, over all rounds.
      client_download_bytes: `i64[K]`.
    """

    def __init__(self, layers: LayerTable, clients: int):
        self.layers = layers
        self.senders: list[np.ndarray] = []
        self.receivers: list[np.ndarray] = []
        self.clients: list[int] = []
        self.client_upload_bytes = np.zeros(clients, np.int64)
        self.client_download_bytes = np.zeros(clients, np.int64)

    @property
    def mask_bytes(self) -> int:
        """Bytes of one client's upload mask."""
        return mask_bytes(self.layers)

    def add(
        self,
        client: np.ndarray,
        upload: np.ndarray,
        download: np.ndarray,
        arrived: np.ndarray | None = None,
    ) -> dict[str, int]:
        """Books one round.

        Args:
          client: `i32[C]`, client ids.
          upload: `f32[C, L]`, 1 = sent.
          download: `f32[C, L]`, 1 = received.
          arrived: `bool[C]`, who was heard; those who were not sent nothing, not even their mask.
            None = all.

        Returns:
          The round's `upload_params`, `download_params`, `upload_bytes`, `download_bytes`, summed
          over the cohort.
        """
        upload, download = upload.astype(np.int64), download.astype(np.int64)
        self.senders.append(upload.sum(axis=0))
        self.receivers.append(download.sum(axis=0))
        arrived = np.ones(len(client), bool) if arrived is None else arrived
        self.clients.append(int(arrived.sum()))
        self.client_upload_bytes[client] += upload @ self._layer_bytes + self.mask_bytes * arrived
        self.client_download_bytes[client] += download @ self._layer_bytes
        return {name: int(values[-1]) for name, values in self._columns(slice(-1, None)).items()}

    @property
    def total(self) -> dict[str, int]:
        """The same four numbers over all rounds."""
        return {name: int(values.sum()) for name, values in self._columns(slice(None)).items()}

    def arrays(self) -> dict[str, np.ndarray]:
        """All that was booked, for `load`."""
        shape = (-1, len(self.layers))
        return {
            "senders": np.asarray(self.senders, np.int64).reshape(shape),
            "receivers": np.asarray(self.receivers, np.int64).reshape(shape),
            "clients": np.asarray(self.clients, np.int64),
            "client_upload_bytes": self.client_upload_bytes.copy(),
            "client_download_bytes": self.client_download_bytes.copy(),
        }

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """Makes this the ledger that gave the arrays."""
        self.senders = list(arrays["senders"])
        self.receivers = list(arrays["receivers"])
        self.clients = arrays["clients"].tolist()
        self.client_upload_bytes = arrays["client_upload_bytes"].copy()
        self.client_download_bytes = arrays["client_download_bytes"].copy()

    @property
    def layer_upload_params(self) -> np.ndarray:
        """`i64[L]`, parameters of each layer sent over all rounds."""
        return sum(self.senders, np.zeros(len(self.layers), np.int64)) * self.layers.params

    @property
    def _layer_bytes(self) -> np.ndarray:
        return BYTES * (self.layers.params + self.layers.statistics)

    def _columns(self, rounds: slice) -> dict[str, np.ndarray]:
        shape = (-1, len(self.layers))
        sent = np.asarray(self.senders[rounds], np.int64).reshape(shape)
        received = np.asarray(self.receivers[rounds], np.int64).reshape(shape)
        clients = np.asarray(self.clients[rounds], np.int64)
        return {
            "upload_params": sent @ self.layers.params,
            "download_params": received @ self.layers.params,
            "upload_bytes": sent @ self._layer_bytes + clients * self.mask_bytes,
            "download_bytes": received @ self._layer_bytes,
        }


def mask_bytes(layers: LayerTable) -> int:
    """Bytes of one client's upload mask: ceil(L / 8)."""
    return -(-len(layers) // 8)


def fedavg_traffic(
    variables: Variables, rule: LayerRule, layers: LayerTable, *, senders: int, receivers: int
) -> dict[str, int]:
    """What it costs that clients receive and send the whole model, as FedAvg's do.

    Args:
      variables: of the deepest model.
      rule: by which they are cut into layers.
      layers: all that the server holds, which may be more.
      senders: clients that are heard, summed over rounds.
      receivers: clients that began, of whom some may have been lost.

    Returns:
      The numbers of `Ledger.add`, modelled.
    """
    covered = layer_table(variables, rule, layers.names).covered
    names = [name for name, held in zip(layers.names, covered, strict=True) if held]
    ledger = Ledger(layer_table(variables, rule, names), clients=1)
    everything = np.ones((1, len(names)))
    one = ledger.add(np.zeros(1, np.int64), everything, everything)
    times = {"upload": senders, "download": receivers}
    return {key: value * times[key.split("_")[0]] for key, value in one.items()}


def forward_macs(task: Task, variables: Variables, example: Batch) -> dict[str, int]:
    """Multiply-accumulates of one sample's forward pass, by module.

    Dots and convolutions are counted in the traced program, so any model is covered; a batch
    normalisation counts 4 operations per element, and activations, pooling and biases nothing: the
    convention under which the FedLP table was made.

    Args:
      task: of the (sub-)model.
      variables: its variables, or their shapes.
      example: a batch of one row.

    Returns:
      `{"conv1/conv": macs, ...}`; a program part outside any module is under "".
    """
    shapes = jax.eval_shape(lambda v: v, variables)
    # Counted as written, whatever form is computed. In a function of its own, as jax remembers what
    # it has traced. A record around it is of what is computed.
    with conv.using("direct"), conv.recording():
        jaxpr = jax.make_jaxpr(lambda v: task.outputs(v, example))(shapes)
    statistics = {
        "/".join(map(str, path[1:-1])) for path in flatten_dict(shapes) if path[0] != "params"
    }
    macs: dict[str, int] = {}
    normalised: dict[str, int] = {}
    for equation, scope, times in _equations(jaxpr.jaxpr, ""):
        module = _module(scope)
        count = times * _macs(equation)
        if count:
            macs[module] = macs.get(module, 0) + count
        elif module in statistics:
            size = max(int(np.prod(out.aval.shape)) for out in equation.outvars)
            normalised[module] = max(normalised.get(module, 0), size)
    rows = max(example.labels.shape[0], 1)
    for module, size in normalised.items():
        macs[module] = macs.get(module, 0) + _NORM_OPERATIONS * size
    return {module: count // rows for module, count in macs.items()}


def level_macs(tasks: Sequence[Task], key: Array, example: Batch) -> list[float]:
    """Modelled work of a step of each submodel level: the forward MACs of one sample."""
    if len(tasks) == 1:
        return [1.0]  # only proportions matter
    shapes = [jax.eval_shape(task.init, key, example) for task in tasks]
    return [
        float(sum(forward_macs(task, shape, example).values()))
        for task, shape in zip(tasks, shapes, strict=True)
    ]


def backward_macs(task: Task, variables: Variables, example: Batch) -> int:
    """Multiply-accumulates of one sample's backward pass: its dots and convolutions, nothing else.

    The first layer has none for its inputs, of which nobody asks the gradient, so this is less than
    twice the forward pass.

    Args:
      task: of the (sub-)model.
      variables: its variables, or their shapes.
      example: a batch of one row.
    """
    shapes = jax.eval_shape(lambda v: v, variables)

    def gradient(variables: Variables) -> Variables:
        def loss(params: Variables) -> Any:
            return task.loss({**variables, "params": params}, example, jax.random.key(0))[0]

        return jax.grad(loss)(variables["params"])

    with conv.using("direct"), conv.recording(), dense.as_written():  # each product counts
        forward = jax.make_jaxpr(lambda v: task.outputs(v, example))(shapes)
        both = jax.make_jaxpr(gradient)(shapes)
    counts = [sum(n * _macs(e) for e, _, n in _equations(p.jaxpr, "")) for p in (both, forward)]
    return (counts[0] - counts[1]) // max(example.labels.shape[0], 1)


def _equations(jaxpr: Any, scope: str, times: int = 1) -> Iterator[tuple[Any, str, int]]:
    """All equations of a program, in the scope of what calls them, and how often each is run.

    The body of a `while` counts once, as nobody knows how often it is run, and so does every branch
    of a `cond`.
    """
    for equation in jaxpr.eqns:
        here = "/".join(filter(None, (scope, str(equation.source_info.name_stack))))
        inner = list(jaxprs_in_params(equation.params))
        if not inner:
            yield equation, here, times
        often = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for sub in inner:
            yield from _equations(sub, here, often)


def _module(scope: str) -> str:
    """The module's path in a name stack: flax opens it with the class name of the outermost."""
    return "/".join(scope.split("/")[1:])


def _macs(equation: Any) -> int:
    name = equation.primitive.name
    if name not in ("dot_general", "conv_general_dilated"):
        return 0
    out = int(np.prod(equation.outvars[0].aval.shape))
    kernel = equation.invars[1].aval.shape
    if name == "dot_general":
        (contract, _), _ = equation.params["dimension_numbers"]
        return out * int(np.prod([equation.invars[0].aval.shape[d] for d in contract]))
    features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    # Of a dilated input, as in a transposed convolution, most elements are zeros put in between.
    inserted = math.prod(equation.params["lhs_dilation"])
    return out * int(np.prod(kernel)) // features // inserted
