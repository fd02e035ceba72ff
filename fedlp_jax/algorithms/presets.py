"""Presets: FedLP as its authors' code runs it ("reference"), and as we read it ("layerwise").

A behaviour sets the defaults of seven settings. `docs/behaviours.md` explains each: how the two
differ, where the authors' code does so, and what the difference is worth.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from fedlp_jax.errors import check_choice


class Behaviour(NamedTuple):
    """The settings in which the two differ; fields are named as the arguments they set."""

    # Of `fedavg`, `fedlp_homo` and `fedlp_hetero`:
    weighting: Literal["examples", "uniform"]  # a_k: the client's examples, or 1
    layers: Literal["by_module", "by_tensor"]  # what is kept or pruned as one
    heads: Literal["persist", "reset_to_init", "shared"]  # where a shallow client's head lives
    train_loss: Literal["examples", "batches"]  # mean over examples, or over steps and clients
    # Of a model:
    init: Literal["flax", "pytorch"]  # initialisation of weights
    # Of a dirichlet or mixed partition:
    reference: bool  # drawn as in the authors' code
    # Of a configuration:
    draws: Literal["own", "reference"]  # whose random numbers


BEHAVIOURS = {
    "reference": Behaviour(
        "uniform", "by_tensor", "reset_to_init", "batches", "pytorch", True, "reference"
    ),
    "layerwise": Behaviour("examples", "by_module", "persist", "examples", "flax", False, "own"),
}
DEFAULT = "layerwise"


def named(name: str) -> Behaviour:
    """Looks up a behaviour.

    Raises:
      FedLPError: an unknown name.
    """
    check_choice("behaviour", name, tuple(BEHAVIOURS))
    return BEHAVIOURS[name]
