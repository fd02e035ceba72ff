"""What befalls the clients of a round, inside the compiled round, for each from (seed, round, id).

A client that was chosen

    does not answer                               unavailable   costs nothing
    breaks off at some point of its training      dropped       download, training until then
    would finish after the deadline               late          download, training until the end
    would finish when enough others have          surplus       download, training until the end
    is heard in time                              arrived       download, training, upload

The round ends when as many as wanted have arrived; else, when the last who answered has finished or
broken off, or at the deadline, whichever is first. The server hears at once of those who do not
answer or break off. Times are modelled from masks and machines (`fedlp_jax.clients.devices`). A
client that does not arrive counts nowhere, and what it keeps for itself stays as it was.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax.accounting.ledger import layer_bytes, mask_bytes
from fedlp_jax.accounting.macs import forward_macs
from fedlp_jax.clients.devices import PASSES, Machines
from fedlp_jax.clients.local_training import LocalWork, examples_seen
from fedlp_jax.prng import Purpose, client_key
from fedlp_jax.pruning.layers import LayerTable
from fedlp_jax.pruning.masks import Masks
from fedlp_jax.pruning.submodels import Submodel
from fedlp_jax.tasks.task import Task
from fedlp_jax.types import Array, Batch, Cohort, RoundMetrics, Variables

KINDS = ("nan", "scale", "sign_flip", "gaussian", "label_flip")


class Outcome(enum.IntEnum):
    """What became of a client; see the table of this module."""

    ARRIVED = 0
    UNAVAILABLE = 1
    DROPPED = 2
    LATE = 3
    SURPLUS = 4


@flax.struct.dataclass
class Conditions:
    """What a cohort is exposed to, slots as in `Cohort`; all numbers are arguments of the round."""

    availability: Array  # f32[C], probability to answer
    dropout: Array  # f32[C], probability to break off
    corruption: Array  # f32[C], probability to be corrupt in this round
    strength: Array  # f32[C], of the corruption; for "label_flip" the highest label
    deadline: Array  # f32[C], seconds, the same in every slot
    quota: Array  # i32[C], arrivals that end the round, the same in every slot
    machines: Machines | None = None  # f32[C] each; None = nothing takes time
    kind: str | None = flax.struct.field(pytree_node=False, default=None)  # of corruption


class Lot(NamedTuple):
    """A client's share of all that, as its training sees it."""

    arrives: Array  # bool[]
    corrupt: Array  # bool[]
    strength: Array  # f32[]


class Fate(NamedTuple):
    """What became of the clients, slots as in `Cohort`. The last two: None without machines."""

    outcome: Array  # i32[C], an `Outcome`
    corrupt: Array  # bool[C]
    macs: Array | None  # f32[C], modelled multiply-accumulates done until the round ended
    time: Array | None  # f32[C], modelled seconds of the round, the same in every slot


def judge(
    key: Array,
    round: Array,
    cohort: Cohort,
    masks: Masks,
    layers: LayerTable,
    levels: Sequence[Submodel],
    work: LocalWork,
    example: Batch,
) -> Fate:
    """Draws what befalls each client and works out when the round ends.

    Args:
      key: the run's root key.
      round: `i32[]`, from 1.
      cohort: with conditions.
      masks: of this round; what is not sent takes no time.
      layers: the layer table.
      levels: of the scheme.
      work: how much a client trains.
      example: a batch of one row.
    """
    c: Conditions = cohort.conditions
    macs = _training_macs(cohort, levels, work, key, example)

    def draws(purpose: Purpose, count: int) -> Array:
        def draw(client: Array) -> Array:
            return jax.random.uniform(
                client_key(key, round, client, purpose), (count,), jnp.float32
            )

        return jax.vmap(draw)(cohort.client).T

    answers = (cohort.client >= 0) & (draws(Purpose.AVAILABILITY, 1)[0] < c.availability)
    chance, share = draws(Purpose.DROPOUT, 2)
    drops = answers & (chance < c.dropout)
    corrupt = draws(Purpose.CORRUPTION, 1)[0] < c.corruption

    begin, train, send = _durations(c.machines, masks, layers, macs)
    finish = begin + train + send
    end = jnp.where(drops, begin + share * train, finish)
    in_time = answers & ~drops & (finish <= c.deadline)
    order = jnp.lexsort((cohort.client, jnp.where(in_time, finish, jnp.inf)))
    place = jnp.argsort(order).astype(jnp.int32)
    arrives = in_time & (place < c.quota)
    last = jnp.where(answers, end, 0.0).max()
    enough = jnp.where(arrives, finish, 0.0).max()
    time = jnp.where(in_time.sum(dtype=jnp.int32) >= c.quota, enough, jnp.minimum(last, c.deadline))

    outcome = jnp.select(
        [~answers, drops, ~in_time, ~arrives],
        [jnp.int32(o) for o in (1, 2, 3, 4)],
        jnp.int32(Outcome.ARRIVED),
    )
    if c.machines is None:
        return Fate(outcome, corrupt, None, None)
    done = (jnp.minimum(end, time) - begin) / jnp.where(train > 0, train, 1.0)
    macs = jnp.where(answers, done.clip(0.0, 1.0) * macs, 0.0)
    return Fate(outcome, corrupt, macs, jnp.broadcast_to(time, macs.shape))


def _training_macs(
    cohort: Cohort, levels: Sequence[Submodel], work: LocalWork, key: Array, example: Batch
) -> Array:
    """`f32[C]`, modelled multiply-accumulates of each client's whole training."""
    if cohort.conditions.machines is None:
        return jnp.zeros(cohort.size.shape, jnp.float32)
    shapes = [jax.eval_shape(level.task.init, key, example) for level in levels]
    forward = [
        sum(forward_macs(level.task, held, example).values())
        for level, held in zip(levels, shapes, strict=True)
    ]
    seen = examples_seen(cohort.size, work).astype(jnp.float32)
    return PASSES * jnp.asarray(forward, jnp.float32)[cohort.level] * seen


def _durations(
    machines: Machines | None, masks: Masks, layers: LayerTable, macs: Array
) -> tuple[Array, Array, Array]:
    """Seconds of download, training and upload, `f32[C]` each."""
    if machines is None:
        return (jnp.zeros_like(macs),) * 3
    size = jnp.asarray(layer_bytes(layers), jnp.float32)
    # Sums rather than products of matrices, which accelerators round.
    down = (masks.download * size[None]).sum(axis=1)
    up = (masks.upload * size[None]).sum(axis=1) + mask_bytes(layers)
    return down / machines.download, macs / machines.compute, up / machines.upload


def corrupted(kind: str | None, update: Variables, lot: Lot, key: Array) -> Variables:
    """What ONE client sends: its update, or what a corrupt client makes of it.

    Args:
      kind: "nan", "scale" (strength x update), "sign_flip" (-strength x update), "gaussian"
        (strength x standard normal instead); "label_flip" and None leave updates alone.
      update: as trained.
      lot: the client's.
      key: consumed.
    """
    if kind in (None, "label_flip"):
        return update
    leaves, treedef = jax.tree.flatten(update)

    def bad(i: int, leaf: Array) -> Array:
        strength = lot.strength.astype(leaf.dtype)
        if kind == "nan":
            return jnp.full_like(leaf, jnp.nan)
        if kind == "gaussian":
            return strength * jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype)
        return leaf * (-strength if kind == "sign_flip" else strength)

    chosen = [jnp.where(lot.corrupt, bad(i, leaf), leaf) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(treedef, chosen)


def with_flipped_labels(task: Task, lot: Lot) -> Task:
    """A task that trains ONE client, if it is corrupt, on `highest label - label`."""

    def loss(variables: Variables, batch: Batch, key: Array) -> Any:
        top = lot.strength.astype(batch.labels.dtype)
        labels = jnp.where(lot.corrupt, top - batch.labels, batch.labels)
        return task.loss(variables, batch._replace(labels=labels), key)

    return task._replace(loss=loss)


def came_true(metrics: RoundMetrics, fate: Fate) -> RoundMetrics:
    """Masks as they came true: who does not answer receives nothing, the lost send nothing."""
    began = (fate.outcome != Outcome.UNAVAILABLE)[:, None]
    arrived = (fate.outcome == Outcome.ARRIVED)[:, None]
    return metrics._replace(
        upload=jnp.where(arrived, metrics.upload, 0.0),
        download=jnp.where(began, metrics.download, 0.0),
        fate=fate,
    )


def fate_metrics(fate: Fate) -> dict[str, Any]:
    """A round's numbers, on the host, from arrays `[C]` of the clients that were chosen.

    Returns:
      How many were `chosen`, `arrived`, lost as `unavailable`, `dropped`, `late` or `surplus`, and
      `corrupt` among those who arrived; with machines the modelled seconds `simulated_time` and the
      multiply-accumulates `train_macs`, of which `lost_macs` by clients who did not arrive.
    """
    arrived = fate.outcome == Outcome.ARRIVED
    row: dict[str, Any] = {"chosen": int(fate.outcome.size)}
    row |= {o.name.lower(): int((fate.outcome == o).sum()) for o in Outcome}
    row["corrupt"] = int((fate.corrupt & arrived).sum())
    if fate.macs is not None and fate.time is not None:
        macs = np.asarray(fate.macs, np.float64)
        row["simulated_time"] = float(fate.time[0])
        row["train_macs"] = round(macs.sum())
        row["lost_macs"] = round(macs[~np.asarray(arrived)].sum())
    return row
