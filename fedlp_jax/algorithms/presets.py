"""FedLP as its authors' code runs it, and as we read the method: two presets of the same settings.

A behaviour is what a setting is where it is not given. `docs/behaviours.md` says of each setting
where the two differ, where in the authors' code that is, and what it is worth.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from fedlp_jax.errors import check_choice


class Behaviour(NamedTuple):
    """The settings in which the two differ, under the names of the arguments they are."""

    # of `fedavg`, `fedlp_homo`, `fedlp_hetero`
    weighting: Literal["examples", "uniform"]
    layers: Literal["by_module", "by_tensor"]
    heads: Literal["persist", "reset_to_init", "shared"]
    train_loss: Literal["examples", "batches"]
    # of a model
    init: Literal["flax", "pytorch"]
    # of a dirichlet or mixed partition
    reference: bool


BEHAVIOURS = {
    "reference": Behaviour("uniform", "by_tensor", "reset_to_init", "batches", "pytorch", True),
    "layerwise": Behaviour("examples", "by_module", "persist", "examples", "flax", False),
}
DEFAULT = "layerwise"


def named(name: str) -> Behaviour:
    """The behaviour of a name.

    Raises:
      FedLPError: there is none of that name.
    """
    check_choice("behaviour", name, tuple(BEHAVIOURS))
    return BEHAVIOURS[name]
