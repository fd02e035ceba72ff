"""Faults: what may go wrong with the clients of a simulation, and how often.

What befalls a client in a round follows from (seed, round, client) and the numbers here;
`fedlp_jax.clients.outcomes` says how, and what a lost client still costs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedlp_jax.clients.devices import Machines, Profile
from fedlp_jax.clients.outcomes import KINDS, Conditions
from fedlp_jax.errors import FedLPError, check_choice, is_number, shown
from fedlp_jax.prng import BEFORE_FIRST_ROUND, Purpose, client_key
from fedlp_jax.types import Array

_STRENGTH = {"nan": 0.0, "scale": 10.0, "sign_flip": 1.0, "gaussian": 1.0, "label_flip": 0.0}


@dataclasses.dataclass(frozen=True)
class Corruption:
    """Clients that send something else than they learnt.

    Attributes:
      kind: "nan"; "scale": strength x the update; "sign_flip": -strength x the update; "gaussian":
        strength x standard normal noise instead of the update; "label_flip": trained on the labels
        `classes - 1 - label` (arXiv:2007.08432).
      share: of the clients.
      strength: None = 10 for "scale", else 1.
      fixed: the same `round(share K)` clients in all rounds, those with the smallest draws from
        (seed, client); False: each client with probability `share`, anew in each round.
    """

    kind: str
    share: float
    strength: float | None = None
    fixed: bool = True


@dataclasses.dataclass(frozen=True)
class Faults:
    """What a population is exposed to; `fl.simulate(..., faults=Faults(...))`.

    Attributes:
      availability: probability that a chosen client answers: one number, K, or a trace `[T, K]`, of
        which round r takes row `(r - 1) mod T`. A trace of 0 and 1 says who is there.
      dropout: probability that a client that answered breaks off: one number, or K.
      corruption: corrupt clients, or None.
      profile: the clients' machines; None = nothing takes time.
      deadline: seconds after which a round takes no more updates; needs a profile.
      over_selection: the cohort is chosen this many times larger, rounded up, and the round ends
        when as many as asked for have arrived (Bonawitz et al., arXiv:1902.01046); above 1 it needs
        a profile.
    """

    availability: float | Sequence[Any] | np.ndarray = 1.0
    dropout: float | Sequence[float] | np.ndarray = 0.0
    corruption: Corruption | None = None
    profile: Profile | None = None
    deadline: float | None = None
    over_selection: float = 1.0

    def chosen(self, cohort: int) -> int:
        """How many clients are chosen for a cohort of C: C times the over-selection, rounded up."""
        return math.ceil(cohort * self.over_selection - 1e-9)

    @staticmethod
    def of(settings: Mapping[str, Any]) -> Faults:
        """From nested settings, as a configuration has them."""
        parts: dict[str, Any] = {"corruption": Corruption, "profile": Profile}
        return Faults(
            **{
                name: parts[name](**value) if name in parts and value is not None else value
                for name, value in settings.items()
            }
        )


class Exposure:
    """Faults bound to a population.

    Attributes:
      chosen: clients chosen a round: C times the over-selection.
    """

    def __init__(self, faults: Faults, root: Array, clients: int, cohort: int, classes: int):
        """Checks the settings and draws what is drawn once.

        Args:
          faults: the settings.
          root: the run's root key.
          clients: K.
          cohort: C, the arrivals that are asked for.
          classes: of the data.

        Raises:
          FedLPError: a number out of range, a shape that does not fit K, or a deadline or an
            over-selection without a profile.
        """
        self._cohort = cohort
        self.chosen = _chosen(faults, clients, cohort)
        self._availability = _trace(faults.availability, clients)
        self._dropout = _share("faults.dropout", faults.dropout, (clients,))
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
        """`f64[K]`, probability of each client to be corrupt in a round."""
        return self._corruption

    def conditions(self, round: int, client: np.ndarray) -> Conditions:
        """What the clients in slots `i32[D * P]` (-1 = empty) are exposed to in a round; numpy."""
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
    factor = faults.over_selection
    if not is_number(factor) or not 1 <= factor < math.inf:
        raise FedLPError(f"faults.over_selection={factor!r} must be a number of at least 1.")
    if factor > 1 and faults.profile is None:
        raise FedLPError(
            f"faults.over_selection={factor:g} takes the first to finish, but without a profile "
            "nobody takes any time; give faults.profile."
        )
    chosen = faults.chosen(cohort)
    if chosen > clients:
        raise FedLPError(
            f"faults.over_selection={factor:g} would choose {chosen} clients for a cohort of "
            f"{cohort}, but there are {clients}; lower one of them."
        )
    return chosen


def _deadline(faults: Faults) -> float:
    if faults.deadline is None:
        return math.inf
    if not is_number(faults.deadline) or not 0 < faults.deadline < math.inf:
        raise FedLPError(
            f"faults.deadline={faults.deadline!r} must be a number of seconds above 0."
        )
    if faults.profile is None:
        raise FedLPError(
            f"faults.deadline={faults.deadline:g} means nothing where nobody takes any time; give "
            "faults.profile."
        )
    return float(faults.deadline)


def _trace(value: Any, clients: int) -> np.ndarray:
    """`f64[T, K]`."""
    array = _array("faults.availability", value)
    if array.ndim == 2 and array.shape[0] > 0 and array.shape[1] == clients:
        return _in_unit("faults.availability", array)
    return _share("faults.availability", array, (clients,), " or a trace [T, K]")[None]


def _share(name: str, value: Any, shape: tuple[int], more: str = "") -> np.ndarray:
    array = _in_unit(name, _array(name, value))
    if array.shape not in ((), shape):
        raise FedLPError(
            f"{name} has shape {list(array.shape)}; give one probability, or one for each of the "
            f"{shape[0]} clients{more}."
        )
    return np.broadcast_to(array, shape)


def _array(name: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise FedLPError(
            f"{name}={shown(value)} is not a number or an array of numbers."
        ) from error


def _in_unit(name: str, array: np.ndarray) -> np.ndarray:
    inside = (array >= 0) & (array <= 1)  # False for NaN too
    if not inside.all():
        raise FedLPError(f"{name}={array[~inside].flat[0]:g} is outside [0, 1].")
    return array


def _strength(corruption: Corruption, classes: int) -> float:
    check_choice("faults.corruption.kind", corruption.kind, KINDS)
    if corruption.kind == "label_flip":
        return float(classes - 1)
    strength = corruption.strength
    if strength is None:
        return _STRENGTH[corruption.kind]
    if not is_number(strength) or not 0 <= strength < 1e30:
        raise FedLPError(f"faults.corruption.strength={strength!r} must be a number >= 0.")
    return float(strength)


def _corruption(corruption: Corruption, root: Array, clients: int) -> np.ndarray:
    """`f64[K]`, probability of each client to be corrupt in a round."""
    share = _share("faults.corruption.share", corruption.share, (clients,))
    if not corruption.fixed:
        return share
    if np.ndim(corruption.share):
        raise FedLPError("faults.corruption.share is one number where the clients are fixed.")

    def draw(client: Array) -> Array:
        key = client_key(root, BEFORE_FIRST_ROUND, client, Purpose.CORRUPTION)
        return jax.random.uniform(key, (), jnp.float32)

    draws = np.asarray(jax.jit(jax.vmap(draw))(jnp.arange(clients, dtype=jnp.int32)))
    bad = np.argsort(draws, kind="stable")[: round(float(corruption.share) * clients)]
    probability = np.zeros(clients)
    probability[bad] = 1.0
    return probability
