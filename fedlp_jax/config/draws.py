"""`draws: reference` in a configuration: what the authors' code draws for it, from its seed."""

from __future__ import annotations

from typing import Any

from fedlp_jax.algorithms.base import Algorithm
from fedlp_jax.algorithms.compose import compose
from fedlp_jax.algorithms.reference_draws import ReferenceDraws, reference_draws
from fedlp_jax.config.schema import Config
from fedlp_jax.data.dataset import Dataset
from fedlp_jax.errors import FedLPError, shown
from fedlp_jax.simulation.cohorts import cohort_size

_WORD = "draws='reference' (which behaviour: reference sets)"
_ROUNDS = 1000  # drawn at least, so that a longer run can resume a shorter one


def draw(config: Config, data: Dataset) -> ReferenceDraws:
    """Draws partition, depths, cohorts and masks.

    Raises:
      FedLPError: the authors' code has no such partition, scheme, depths or keep rate.
    """
    partition, algorithm = config.partition, config.algorithm
    if partition.name not in ("iid", "dirichlet", "mixed"):
        raise FedLPError(
            f"{_WORD} has no partition '{partition.name}'; choose iid, dirichlet or mixed, or "
            "draws='own'."
        )
    if partition.seed is not None:
        raise FedLPError(
            f"{_WORD} deals the examples by the run's seed, {config.seed}; remove partition.seed="
            f"{partition.seed}, or use draws='own'."
        )
    settings = algorithm.arguments()
    flag, keep = settings.get("depths"), settings.get("keep")
    if algorithm.name == "fedlp_hetero":
        if keep != 1 or not isinstance(flag, int | str):
            raise FedLPError(
                f"{_WORD} has depths from a flag 1 to 5 or 'uniform', and no masks for them; got "
                f"depths={shown(flag)}, keep={shown(keep)}. Use draws='own'."
            )
        keep = None
    elif algorithm.name not in ("fedavg", "fedlp_homo") or not isinstance(keep, float | None):
        raise FedLPError(
            f"{_WORD} is for fedavg, fedlp_hetero, and fedlp_homo with one keep rate; got "
            f"{algorithm.name} with keep={shown(keep)}. Use draws='own'."
        )
    shape = {name: getattr(partition, name, None) for name in ("alpha", "ratio")}
    if settings.get("download") is not None:
        raise FedLPError(
            f"{_WORD} has no masks for what clients receive, but download="
            f"{settings['download']:g}; remove it, or use draws='own'."
        )
    return reference_draws(
        data.train.labels,
        split=partition.name,
        clients=partition.clients,
        cohort=cohort_size(config.cohort, partition.clients),
        rounds=max(config.rounds, _ROUNDS),
        flag=flag,
        keep=keep,
        seed=config.seed,
        **{name: value for name, value in shape.items() if value is not None},
    )


def algorithm_with(config: Config, draws: ReferenceDraws, **arguments: Any) -> Algorithm:
    """The configured algorithm with the depths or masks of the draws.

    Args:
      config: the configuration.
      draws: from `draw`.
      **arguments: as of `Section.build`.
    """
    if draws.depths is not None:
        return config.algorithm.build(**arguments, depths=draws.depths)
    settings = config.algorithm.arguments()
    for name in ("keep", "download"):
        settings.pop(name, None)
    return compose(**settings | arguments, policy=draws.policy())
