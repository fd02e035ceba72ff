"""Words and shapes of the whole package.

Letters, everywhere in the package:

    K  clients in the population          C  clients in the cohort of a round
    L  layers (see `fedlp_jax.pruning.layers`)    S  local steps of one client
    B  batch size                         M  largest number of examples of a client
    N  examples in a split                D  devices on the mesh
    W  clients vmapped at once            P  client slots of one device
    G  submodel levels (1 unless a scheme has several, as FedLP-Hetero)

A *layer* is a named group of variables that is kept or pruned as one. *keep* is the
layer-preserving rate of FedLP (arXiv:2303.06360): the probability of being kept, never a drop rate.
*variables* are everything exchanged: parameters and batch statistics. *weight* is a_k, what a
client counts for, and nothing else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
PyTree = Any  # a nested dict of arrays
Variables = Any  # {"params": tree, "batch_stats": tree, ...}


def wide(dtype: Any) -> Any:
    """The dtype in which numbers of `dtype` are summed: float32 or wider."""
    return np.dtype(np.float32) if jnp.finfo(dtype).bits < 32 else np.dtype(dtype)


def cast_like(tree: PyTree, other: PyTree) -> PyTree:
    """A tree of arrays in the dtypes of another: rules count in float32, a model may be shorter."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, other)


class Normalize(NamedTuple):
    """Affine map from stored to model inputs: `x * gain + shift`, computed inside jit."""

    gain: np.ndarray | Array  # f32[] or f32[channels]
    shift: np.ndarray | Array  # f32[] or f32[channels]


class Batch(NamedTuple):
    """One batch of one client, padded to B rows."""

    inputs: Array  # uint8|f32|i32[B, ...], as stored: not normalised
    labels: Array  # i32[B] classes, or targets [B, ...] of any shape and dtype
    valid: Array | None  # bool[B], False = padding; None = every row counts (known statically)
    normalize: Normalize  # of the data set; a task may carry another
    classes: Array | None = None  # bool[outputs], those that training heeds; None = all
    round: Array | None = None  # i32[], from 1, where the task heeds it


class Examples(NamedTuple):
    """A whole split on the device, or the rows that each device needs, one device after another."""

    inputs: Array  # uint8|f32|i32[N, ...]
    labels: Array  # i32[N] classes, or targets [N, ...]
    normalize: Normalize


@flax.struct.dataclass
class Cohort:
    """The clients of one round, laid out in slots: device d owns slots d * P to (d + 1) * P.

    Within a device, slots are grouped by level; `segment[d, g]` to `segment[d, g + 1]` are those of
    level g, counted from the first slot of the device. Slots after the last segment are empty.
    """

    client: Array  # i32[D * P], client id; -1 = empty slot
    size: Array  # i32[D * P], examples; 0 = empty slot
    level: Array  # i32[D * P], submodel level, 0 to G - 1
    rows: Array  # i32[D * P, M], rows of `Examples`, padded with 0
    segment: Array  # i32[D, G + 1]
    staleness: Any = None  # i32[D * P], versions a client is behind, where a server does not wait
    conditions: PyTree = None  # a `fedlp_jax.clients.outcomes.Conditions`, where a run has faults
    # The size of every client of the population, if all are equal: the round then omits the masks
    # that uneven clients need.
    even_size: int | None = flax.struct.field(pytree_node=False, default=None)
    # A size with which a client takes as many steps an epoch as every other, if there is one and
    # runs share a program. Their loops then have one length, which the program knows; else JAX
    # selects the carry of each run in every step.
    like_size: int | None = flax.struct.field(pytree_node=False, default=None)
    # The largest size of each bucket, ascending, where trip counts must be known; else none.
    buckets: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())
    # How many clients of each level run at once, where levels differ in it; else none.
    widths: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())


class Mean(NamedTuple):
    """A weighted mean as two sums: means over batches and clients add up exactly.

    The only division is on the host, once.
    """

    total: Array  # f32[], sum of weight x value
    weight: Array  # f32[], sum of weights, such as the number of examples


Metrics = dict[str, Mean]


class ClientMetrics(NamedTuple):
    """What one client reports besides its update."""

    means: Metrics  # of its task, over the examples seen while training
    batch_loss_sum: Array  # f32[], sum over steps of the mean loss of the batch
    steps: Array  # i32[]
    finite: Array  # bool[], False = the update held a NaN or infinity and was left out


class Terms(NamedTuple):
    """What an algorithm adds to the model: the server's state, what clients read, what they send.

    A tree has the structure of the parameters, so that a submodel gets its part of it, and a layer
    that nobody sent keeps its part.
    """

    numbers: dict[str, Any]  # such as FedProx's mu
    trees: dict[str, PyTree]  # such as SCAFFOLD's control variate


NO_TERMS = Terms({}, {})


class ServerState(NamedTuple):
    """Everything a run carries from round to round, besides the state of the clients.

    A resumed run needs only this, that state, the configuration and the seed.
    """

    variables: Variables  # what the server holds: the deepest model (and shared heads)
    policy: PyTree  # of the MaskPolicy: keep probabilities and the like
    aggregator: PyTree  # of the UpdatePipeline: numbers of the aggregator, clip and noise
    optimizer: PyTree  # of the server optimizer (optax)
    client_scale: Array  # f32[], factor on the client optimizer's updates
    round: Array  # i32[], rounds done
    halted: Array  # bool[], a round left no finite model; later rounds change nothing
    algorithm: Any = ()  # the `Terms` of its ServerRule, if the algorithm has one

    def __repr__(self) -> str:
        """The round and the size, without the arrays."""
        count = sum(getattr(x, "size", 0) for x in jax.tree.leaves(self.variables))
        return f"ServerState(after round {self.round}, {count:,} numbers in variables)"


class RoundMetrics(NamedTuple):
    """What a round reports but does not carry. Slots as in `Cohort`."""

    client: ClientMetrics  # arrays [D * P]
    upload: Array  # f32[D * P, L], 1 = sent
    download: Array  # f32[D * P, L], 1 = received
    halted: Array  # bool[], the state is unchanged: the round left no finite model
    bits: Any = ()  # i32[D * P, L], of each layer's parameters, where uploads are compressed
    outcomes: PyTree = ()  # a `fedlp_jax.clients.outcomes.Outcomes`, where a run has faults
