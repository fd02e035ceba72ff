"""What a mask policy is: `MaskPolicy`, the masks that it draws, and what it learns of a round.

A policy is a tuple of pure functions. Its numbers (keep probabilities) live in its state, which is
an argument of the compiled round: FedAvg is FedLP-Homo at keep = 1, and both are one program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fedlp_jax.pruning.layers import LayerTable
from fedlp_jax.types import Array, Cohort, PyTree, Terms


class Masks(NamedTuple):
    """Layer masks of a cohort, slots as in `Cohort`."""

    download: Array  # f32[C, L], 1 = received
    upload: Array  # f32[C, L], 1 = sent
    keep: Array  # f32[C, L], probability of sending what is held, for inverse-probability means
    train: Array | None = None  # f32[C, L], 1 = trained, the others are frozen; None = all it holds


def always(layers: LayerTable, clients: int) -> np.ndarray:
    """Rates of a policy that sends every layer, `f32[1, 1]`."""
    del layers, clients
    return np.ones((1, 1), np.float32)


class Feedback(NamedTuple):
    """What a policy learns of a round. Trees are of parameters."""

    params: PyTree  # the server's before its step
    update: PyTree  # the mean of what clients sent, of any float dtype; 0 where nobody sent a layer
    senders: Array  # f32[L], clients that sent a layer and count
    client: Array  # i32[C], client ids; -1 = empty slot
    counted: Array  # bool[C], False = the client was lost or sent a NaN, and keeps what it had
    extras: Terms  # what the aggregate has besides
    round: Array  # i32[], from 1
    layers: LayerTable


class MaskPolicy(NamedTuple):
    """Chooses layers before training."""

    init: Callable[[LayerTable, int], PyTree]  # (layers, K) -> state
    # (root key, state, cohort, round i32[], coverage f32[C, L]) -> (masks, state)
    sample: Callable[[Array, PyTree, Cohort, Array, Array], tuple[Masks, PyTree]]
    # (layers, K) -> expected share of rounds in which a client sends a layer it holds,
    # f32[1 or K, 1 or L]; on the host, for modelled traffic
    expected: Callable[[LayerTable, int], np.ndarray] = always
    # the same for the layers that it receives
    received: Callable[[LayerTable, int], np.ndarray] = always
    # (state, what the round came to) -> state; None = masks do not depend on what was sent
    learn: Callable[[PyTree, Feedback], PyTree] | None = None
    # Clients keep their model, and train on with their own of a layer that they do not receive.
    keeps_models: bool = False
    cohort_rounds: int = 1  # rounds for which a drawn cohort stays together
    needs_order: bool = False  # `init` reads `LayerTable.order`
