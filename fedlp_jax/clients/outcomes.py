"""Client outcomes, drawn inside the compiled round from (seed, round, client).

A chosen client that

    does not answer                               is unavailable   costs nothing
    breaks off at some point of its training      is dropped       download, training until then
    would finish after the deadline               is late          download, whole training
    would finish when enough others have          is surplus       download, whole training
    finishes in time                              has arrived      download, training, upload

The round ends when the requested number of clients has arrived; otherwise when the last client that
answered has finished or broken off, or at the deadline, whichever comes first. The server learns at
once who does not answer or breaks off. Times are modelled from masks and machines
(`fedlp_jax.clients.devices`). A client that does not arrive contributes nothing, and its private
state is unchanged.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax.accounting.ledger import Wire
from fedlp_jax.accounting.macs import backward_blocks, macs_of_models
from fedlp_jax.clients.devices import PASSES, Machines
from fedlp_jax.clients.local_training import LocalWork, examples_seen
from fedlp_jax.prng import Purpose, uniforms
from fedlp_jax.pruning.layers import LayerTable
from fedlp_jax.pruning.masks import Masks
from fedlp_jax.pruning.submodels import Submodel
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import Array, Batch, Cohort, RoundMetrics, Variables

KINDS = ("nan", "scale", "sign_flip", "gaussian", "label_flip")


class ClientStatus(enum.IntEnum):
    """How a client's round ended; see the table of this module."""

    ARRIVED = 0
    UNAVAILABLE = 1
    DROPPED = 2
    LATE = 3
    SURPLUS = 4


@flax.struct.dataclass
class Conditions:
    """Failure rates and machines of a cohort, slots as in `Cohort`: arguments of the round."""

    availability: Array  # f32[C], probability to answer
    dropout: Array  # f32[C], probability to break off
    corruption: Array  # f32[C], probability to be corrupt
    strength: Array  # f32[C], of the corruption; for "label_flip" the highest label
    deadline: Array  # f32[C], seconds, equal in all slots
    quota: Array  # i32[C], arrivals that end the round, equal in all slots
    machines: Machines | None = None  # f32[C] each; None = nothing takes time
    kind: str | None = flax.struct.field(pytree_node=False, default=None)  # of corruption


class ClientOutcome(NamedTuple):
    """What the training of ONE client needs to know of its outcome."""

    arrives: Array  # bool[]
    corrupt: Array  # bool[]
    strength: Array  # f32[]


class Outcomes(NamedTuple):
    """Outcomes of a cohort, slots as in `Cohort`. The last two are None without machines."""

    status: Array  # i32[C], a `ClientStatus`
    corrupt: Array  # bool[C]
    macs: Array | None  # f32[C], modelled multiply-accumulates done until the round ended
    time: Array | None  # f32[C], modelled seconds of the round, equal in all slots


def draw_outcomes(
    key: Array,
    round: Array,
    cohort: Cohort,
    masks: Masks,
    wire: Wire,
    levels: Sequence[Submodel],
    layers: Sequence[LayerTable],
    work: LocalWork,
    example: Batch,
) -> Outcomes:
    """Draws the failures of each client and computes when the round ends.

    Args:
      key: the run's root key.
      round: `i32[]`, from 1.
      cohort: with conditions.
      masks: of this round; a layer that is not sent takes no time.
      wire: bytes of each layer.
      levels: of the scheme.
      layers: the layer table of each level.
      work: how much a client trains.
      example: a batch of one row.
    """
    c: Conditions = cohort.conditions
    macs = _training_macs(cohort, levels, work, key, example)
    if masks.train is not None and c.machines is not None:
        shares = _backward_shares(masks.train, levels, layers, key, example)
        own = jnp.take_along_axis(shares, cohort.level[None], axis=0)[0]
        macs = macs * (1 + (PASSES - 1) * own) / PASSES

    def draws(purpose: Purpose, count: int) -> Array:
        return uniforms(key, round, cohort.client, purpose, count).T

    answers = (cohort.client >= 0) & (draws(Purpose.AVAILABILITY, 1)[0] < c.availability)
    chance, share = draws(Purpose.DROPOUT, 2)
    drops = answers & (chance < c.dropout)
    corrupt = draws(Purpose.CORRUPTION, 1)[0] < c.corruption

    begin, train, send = _durations(c.machines, masks, wire, cohort.level, macs)
    finish = begin + train + send
    end = jnp.where(drops, begin + share * train, finish)
    in_time = answers & ~drops & (finish <= c.deadline)
    order = jnp.lexsort((cohort.client, jnp.where(in_time, finish, jnp.inf)))
    place = jnp.argsort(order).astype(jnp.int32)
    arrives = in_time & (place < c.quota)
    last = jnp.where(answers, end, 0.0).max()
    enough = jnp.where(arrives, finish, 0.0).max()
    time = jnp.where(in_time.sum(dtype=jnp.int32) >= c.quota, enough, jnp.minimum(last, c.deadline))

    lost = [ClientStatus.UNAVAILABLE, ClientStatus.DROPPED, ClientStatus.LATE, ClientStatus.SURPLUS]
    status = jnp.select(
        [~answers, drops, ~in_time, ~arrives],
        [jnp.int32(each) for each in lost],
        jnp.int32(ClientStatus.ARRIVED),
    )
    if c.machines is None:
        return Outcomes(status, corrupt, None, None)
    done = (jnp.minimum(end, time) - begin) / jnp.where(train > 0, train, 1.0)
    macs = jnp.where(answers, done.clip(0.0, 1.0) * macs, 0.0)
    return Outcomes(status, corrupt, macs, jnp.broadcast_to(time, macs.shape))


def _training_macs(
    cohort: Cohort, levels: Sequence[Submodel], work: LocalWork, key: Array, example: Batch
) -> Array:
    """`f32[C]`, modelled multiply-accumulates of each client's whole training."""
    if cohort.conditions.machines is None:
        return jnp.zeros(cohort.size.shape, jnp.float32)
    forward = macs_of_models([level.task for level in levels], key, example)
    seen = examples_seen(cohort.size, work).astype(jnp.float32)
    return PASSES * jnp.asarray(forward, jnp.float32)[cohort.level] * seen


def _backward_shares(
    train: Array,
    levels: Sequence[Submodel],
    layers: Sequence[LayerTable],
    key: Array,
    example: Batch,
) -> Array:
    """The share of the backward pass that frozen layers leave, at every level, `f32[G, C]`."""
    shares = []
    for level, table in zip(levels, layers, strict=True):
        held = jax.eval_shape(level.task.init, key, example)
        blocks = backward_blocks(level.task, held, example, table)
        due = [
            train[:, sorted(needed)].max(axis=1) if needed else jnp.ones_like(train[:, 0])
            for needed, _ in blocks
        ]
        macs = np.asarray([macs for _, macs in blocks], np.float32)
        shares.append((jnp.stack(due, axis=1) * macs[None] / max(macs.sum(), 1.0)).sum(axis=1))
    return jnp.stack(shares)


def _durations(
    machines: Machines | None, masks: Masks, wire: Wire, level: Array, macs: Array
) -> tuple[Array, Array, Array]:
    """Seconds of download, training and upload, `f32[C]` each."""
    if machines is None:
        return (jnp.zeros_like(macs),) * 3
    sizes = (jnp.asarray(x, jnp.float32) for x in (wire.download, wire.upload))
    received, sent = (x[None] if x.ndim == 1 else x[level] for x in sizes)
    # Sums rather than products of matrices, which accelerators round.
    down = (masks.download * received).sum(axis=1)
    up = (masks.upload * sent).sum(axis=1) + wire.header
    return down / machines.download, macs / machines.compute, up / machines.upload


def corrupted(kind: str | None, update: Variables, outcome: ClientOutcome, key: Array) -> Variables:
    """The update that ONE client sends, corrupted if the client is corrupt.

    Args:
      kind: "nan", "scale" (strength x update), "sign_flip" (-strength x update), "gaussian"
        (strength x standard normal instead); "label_flip" and None leave updates alone.
      update: as trained.
      outcome: the client's.
      key: consumed.
    """
    if kind in (None, "label_flip"):
        return update
    leaves, treedef = jax.tree.flatten(update)

    def bad(i: int, leaf: Array) -> Array:
        strength = outcome.strength.astype(leaf.dtype)
        if kind == "nan":
            return jnp.full_like(leaf, jnp.nan)
        if kind == "gaussian":
            return strength * jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)
        return leaf * (-strength if kind == "sign_flip" else strength)

    chosen = [jnp.where(outcome.corrupt, bad(i, leaf), leaf) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(treedef, chosen)


def with_flipped_labels(task: Task, outcome: ClientOutcome) -> Task:
    """A task that trains ONE client, if it is corrupt, on `highest label - label`."""

    def loss(variables: Variables, batch: Batch, key: Array) -> Any:
        batch = batch._replace(labels=flipped(batch.labels, outcome))
        return task.loss(variables, batch, key)

    return task._replace(loss=loss)


def flipped(labels: Array, outcome: ClientOutcome) -> Array:
    """The labels on which ONE client trains that may flip them."""
    top = outcome.strength.astype(labels.dtype)
    return jnp.where(outcome.corrupt, top - labels, labels)


def with_outcomes(metrics: RoundMetrics, outcomes: Outcomes) -> RoundMetrics:
    """Clears masks of failed transfers: the unavailable receive nothing, the lost send nothing."""
    began = (outcomes.status != ClientStatus.UNAVAILABLE)[:, None]
    arrived = (outcomes.status == ClientStatus.ARRIVED)[:, None]
    return metrics._replace(
        upload=jnp.where(arrived, metrics.upload, 0.0),
        download=jnp.where(began, metrics.download, 0.0),
        outcomes=outcomes,
    )


def outcome_metrics(outcomes: Outcomes) -> dict[str, Any]:
    """The numbers of a round, on the host, from arrays `[C]` of the chosen clients.

    Returns:
      The counts `chosen`, `arrived`, `unavailable`, `dropped`, `late` and `surplus`, and `corrupt`
      among those that arrived; with machines the modelled seconds `simulated_time` and the
      multiply-accumulates `train_macs`, of which `lost_macs` by clients that did not arrive.
    """
    arrived = outcomes.status == ClientStatus.ARRIVED
    row: dict[str, Any] = {"chosen": int(outcomes.status.size)}
    row |= {each.name.lower(): int((outcomes.status == each).sum()) for each in ClientStatus}
    row["corrupt"] = int((outcomes.corrupt & arrived).sum())
    if outcomes.macs is not None and outcomes.time is not None:
        macs = np.asarray(outcomes.macs, np.float64)
        row["simulated_time"] = float(outcomes.time[0])
        row["train_macs"] = round(macs.sum())
        row["lost_macs"] = round(macs[~np.asarray(arrived)].sum())
    return row
