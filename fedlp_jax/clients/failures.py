"""Client failures: which ones a simulation has, and how often.

The outcome of a client in a round follows from (seed, round, client) and the numbers here;
`fedlp_jax.clients.outcomes` defines how, and what a lost client still costs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax.clients.devices import Machines, Profile
from fedlp_jax.clients.outcomes import KINDS, Conditions
from fedlp_jax.errors import FedLPError, check_array, check_choice, check_number
from fedlp_jax.prng import Purpose, drawn_once
from fedlp_jax.types import Array

_STRENGTH = {"nan": 0.0, "scale": 10.0, "sign_flip": 1.0, "gaussian": 1.0, "label_flip": 0.0}


@dataclasses.dataclass(frozen=True)
class Corruption:
    """Clients that send something other than what they learnt.

    Attributes:
      kind: "nan"; "scale": strength x the update; "sign_flip": -strength x the update; "gaussian":
        strength x standard normal noise instead of the update; "label_flip": training on the labels
        `classes - 1 - label` (arXiv:2007.08432).
      share: of the clients.
      strength: None = 10 for "scale", else 1.
      fixed: True = the same `round(share K)` clients in all rounds, those with the smallest draws
        from (seed, client); False = each client with probability `share`, drawn in every round.
    """

    kind: str
    share: float
    strength: float | None = None
    fixed: bool = True


@dataclasses.dataclass(frozen=True)
class Faults:
    """Failures of a population; `fl.simulate(..., faults=Faults(...))`.

    Attributes:
      availability: probability that a chosen client answers: one number, K numbers, or a trace
        `[T, K]` of which round r reads row `(r - 1) mod T`. A trace may consist of 0 and 1.
      dropout: probability that a client that answered breaks off: one number, or K.
      corruption: corrupt clients, or None.
      profile: the clients' devices; None = nothing takes time.
      deadline: seconds after which a round takes no more updates; needs a profile.
      over_selection: factor by which more clients are chosen, rounded up. The round ends when the
        requested number has arrived (Bonawitz et al., arXiv:1902.01046). Above 1 it needs a
        profile.
    """

    availability: float | Sequence[Any] | np.ndarray = 1.0
    dropout: float | Sequence[float] | np.ndarray = 0.0
    corruption: Corruption | None = None
    profile: Profile | None = None
    deadline: float | None = None
    over_selection: float = 1.0

    def chosen(self, cohort: int) -> int:
        """The clients chosen for a cohort of C: C times the over-selection, rounded up."""
        return math.ceil(cohort * self.over_selection - 1e-9)


class Exposure:
    """Faults of a given population.

    Attributes:
      chosen: clients chosen a round: C times the over-selection.
    """

    def __init__(self, faults: Faults, root: Array, clients: int, cohort: int, classes: int):
        """Checks the settings and makes the draws of the whole run.

        Args:
          faults: the settings.
          root: the run's root key.
          clients: K.
          cohort: C, the arrivals requested.
          classes: number of classes in the data.

        Raises:
          FedLPError: a number out of range, a shape that does not fit K, or a deadline or an
            over-selection without a profile.
        """
        self._cohort = cohort
        self.chosen = _chosen(faults, clients, cohort)
        self._availability = _trace(faults.availability, clients)
        self._dropout = _probabilities("faults.dropout", faults.dropout, clients)
        self._deadline = _deadline(faults)
        self._machines: Machines | None = None
        if faults.profile is not None:
            self._machines = faults.profile.machines(root, clients)
        self._kind, self._strength, self._corruption = None, 0.0, np.zeros(clients)
        if faults.corruption is not None:
            self._kind = faults.corruption.kind
            self._strength = _strength(faults.corruption, classes)
            self._corruption = _corruption(faults.corruption, root, clients)

    @property
    def timed(self) -> bool:
        """Whether rounds take modelled time."""
        return self._machines is not None

    @property
    def corrupt(self) -> np.ndarray:
        """`f64[K]`, the probability that each client is corrupt in a round."""
        return self._corruption

    def conditions(self, round: int, client: np.ndarray) -> Conditions:
        """Conditions of the clients in slots `i32[D * P]` (-1 = empty) in a round; NumPy arrays."""
        here = np.maximum(client, 0)

        def f32(values: np.ndarray | float) -> Any:
            return np.broadcast_to(np.asarray(values, np.float32), here.shape)

        quota: Any = np.full(here.shape, self._cohort, np.int32)
        machines = None
        if self._machines is not None:
            machines = Machines(*(values[here] for values in self._machines))
        row = (round - 1) % len(self._availability)
        return Conditions(
            availability=f32(self._availability[row, here]),
            dropout=f32(self._dropout[here]),
            corruption=f32(self._corruption[here]),
            strength=f32(self._strength),
            deadline=f32(self._deadline),
            quota=quota,
            machines=machines,
            kind=self._kind,
        )


def _chosen(faults: Faults, clients: int, cohort: int) -> int:
    factor = check_number("faults.over_selection", faults.over_selection, ge=1)
    if factor > 1 and faults.profile is None:
        raise FedLPError(
            f"faults.over_selection={factor:g} takes the first clients to finish, but without a "
            "profile nothing takes time; give faults.profile."
        )
    chosen = faults.chosen(cohort)
    if chosen > clients:
        raise FedLPError(
            f"faults.over_selection={factor:g} would choose {chosen} clients for a cohort of "
            f"{cohort}, but the population has {clients}; lower one of them."
        )
    return chosen


def _deadline(faults: Faults) -> float:
    if faults.deadline is None:
        return math.inf
    deadline = check_number("faults.deadline", faults.deadline, gt=0, hint="it is in seconds")
    if faults.profile is None:
        raise FedLPError(
            f"faults.deadline={deadline:g} has no effect without a profile, because nothing takes "
            "time; give faults.profile."
        )
    return float(deadline)


def _trace(value: Any, clients: int) -> np.ndarray:
    """`f64[T, K]`."""
    array = check_array("faults.availability", value, ge=0, le=1)
    if array.ndim == 2 and array.shape[0] > 0 and array.shape[1] == clients:
        return array
    return _probabilities("faults.availability", array, clients, " or a trace [T, K]")[None]


def _probabilities(name: str, value: Any, clients: int, otherwise: str = "") -> np.ndarray:
    """One probability, or K, as `f64[K]`."""
    array = check_array(name, value, ge=0, le=1)
    if array.shape not in ((), (clients,)):
        raise FedLPError(
            f"{name} has shape {list(array.shape)}; give one probability, or one for each of the "
            f"{clients} clients{otherwise}."
        )
    return np.broadcast_to(array, (clients,))


def _strength(corruption: Corruption, classes: int) -> float:
    check_choice("faults.corruption.kind", corruption.kind, KINDS)
    if corruption.kind == "label_flip":
        if classes < 1:
            raise FedLPError(
                "faults.corruption.kind='label_flip' needs class labels, but the targets are real "
                "numbers; choose sign_flip, scale, gaussian or nan."
            )
        return float(classes - 1)
    if corruption.strength is None:
        return _STRENGTH[corruption.kind]
    name = "faults.corruption.strength"
    return float(check_number(name, corruption.strength, ge=0, lt=1e30))


def _corruption(corruption: Corruption, root: Array, clients: int) -> np.ndarray:
    """`f64[K]`, the probability that each client is corrupt in a round."""
    share = _probabilities("faults.corruption.share", corruption.share, clients)
    if not corruption.fixed:
        return share
    if np.ndim(corruption.share):
        raise FedLPError(
            f"faults.corruption.share has shape {list(share.shape)}, but fixed corrupt clients "
            "need one number; give one, or fixed=False."
        )
    draws = drawn_once(
        root, clients, Purpose.CORRUPTION, lambda key: jax.random.uniform(key, (), jnp.float32)
    )
    bad = np.argsort(draws, kind="stable")[: round(float(corruption.share) * clients)]
    probability = np.zeros(clients)
    probability[bad] = 1.0
    return probability
