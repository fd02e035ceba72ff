"""Reducer: the one interface of masked means and robust rules.

A mean needs one running sum, so `prepare` returns what a client adds to it. A robust rule needs the
updates themselves, C models next to each other: it is `stacked`, and `prepare` returns the update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from fedlp_jax.execution.plan import Plan
from fedlp_jax.pruning.layers import LayerTable
from fedlp_jax.pruning.submodels import Submodel
from fedlp_jax.types import NO_TERMS, Array, PyTree, Terms, Variables


class UploadInfo(NamedTuple):
    """What a client sends with its update; with a leading axis `[C]`, what a cohort sends."""

    weight: Array  # f32[], a_k
    mask: Array  # f32[L], 1 = sent
    keep: Array  # f32[L], the probability with which it was sent


class Received(NamedTuple):
    """What the server has of a cohort."""

    contributions: PyTree  # their sum over clients, or [D * P, ...] if the reducer is stacked
    uploads: UploadInfo  # [D * P, ...]
    counted: Array  # bool[D * P], False = contributes nothing
    client: Array  # i32[D * P], ids; -1 = empty slot


class Aggregate(NamedTuple):
    """What the clients of a round add up to."""

    update: Variables  # like the server's variables; 0 in a layer that nobody sent
    gate: Any  # bool[L], False = the layer keeps its value; where levels are slices, a tree of bool
    cohort_weight: Array  # f32[], sum of a_k over the clients that count; 0 = nobody
    extras: Terms = NO_TERMS  # what clients sent with their updates, averaged as these are


class Reducer(NamedTuple):
    """Turns the updates of a cohort into one. `prepare` sees ONE client, `reduce` all of them."""

    init: Callable[[Variables], PyTree]  # variables -> state, which holds the rule's numbers
    # (update, upload, counted bool[], layers of the submodel) -> contribution
    prepare: Callable[[Variables, UploadInfo, Array, LayerTable], PyTree]
    # (contribution, submodel, server's variables, layers of the submodel)
    #   -> contribution in the server's structure
    embed: Callable[[PyTree, Submodel, Variables, LayerTable], PyTree]
    # (received, state, layers, plan) -> aggregate
    reduce: Callable[[Received, PyTree, LayerTable, Plan], Aggregate]
    stacked: bool = False  # contributions are kept side by side instead of being summed
    # (keep f32[C, L], chosen bool[C, 1]) -> f32[L], the largest factor that multiplies a client's
    # update in the sum; None = unknown, so privacy is refused. Needs a `WeightedSum`.
    sensitivity: Callable[[Array, Array], Array] | None = None
    # (update, layers of the submodel) -> bool[L]: of the layers drawn, those that ONE client sends
    # after all, such as those that moved far. The others are neither booked nor averaged. None = it
    # sends what was drawn. A deadline of `Faults` is still modelled with all layers drawn.
    sends: Callable[[Variables, LayerTable], Array] | None = None
    # (received, state, layers) -> f32[D * P, L]: the layers that the server asks for once each
    # client has reported a number for every layer; only where stacked. None = what was drawn.
    select: Callable[[Received, PyTree, LayerTable], Array] | None = None
    sender_mean: bool = False  # the mean over those who sent a layer, by their weights
    senders: int = 1  # clients that `select` asks for; smaller cohorts are refused
