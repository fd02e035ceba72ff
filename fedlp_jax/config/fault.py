"""The sections of a configuration about clients that fail or lie, and what holds against them."""

from __future__ import annotations

from typing import Annotated, Any

from fedlp_jax.config.field import (
    Checked,
    Flag,
    NotNegative,
    Positive,
    Section,
    choice,
    optional,
    real,
    refuse,
    several,
    whole,
)
from fedlp_jax.errors import shown


def _shares(value: Any) -> Any:
    return several(real(0, 1), alone=True)(value)


def _trace(value: Any) -> Any:
    if isinstance(value, list | tuple) and any(isinstance(row, list | tuple) for row in value):
        return several(several(real(0, 1)))(value)
    return _shares(value)


Shares = Annotated[float | tuple[float, ...], Checked(_shares)]  # one, or one for every client
Trace = Annotated[float | tuple[float, ...] | tuple[tuple[float, ...], ...], Checked(_trace)]
Speeds = Annotated[float | tuple[float, ...], Checked(several(real(0, above=True), alone=True))]
Clip = Annotated[float | None, Checked(optional(real(0, above=True)))]


# FAULTS


class Corruption(Section):
    """Clients that send something else than they learnt; the arguments of `fl.Corruption`."""

    kind: Annotated[str, Checked(choice("nan", "scale", "sign_flip", "gaussian", "label_flip"))]
    share: Annotated[float, Checked(real(0, 1))]
    strength: Annotated[float | None, Checked(optional(real(0)))] = None
    fixed: Flag = True  # the same clients in all rounds


class Profile(Section):
    """The clients' machines; the arguments of `fl.Profile`."""

    compute: Speeds  # MACs a second, one number or one for every client
    download: Speeds  # bytes a second
    upload: Speeds
    spread: NotNegative = 0.0  # of the logarithm, between clients


class Faults(Section):
    """What clients are exposed to; the arguments of `fl.Faults`."""

    availability: Trace = 1.0  # probability to answer: one, K of them, or rows of K for the rounds
    dropout: Shares = 0.0  # probability to break off
    corruption: Corruption | None = None
    profile: Profile | None = None
    deadline: Annotated[float | None, Checked(optional(real(0, above=True)))] = None  # seconds
    over_selection: Annotated[float, Checked(real(1))] = 1.0


# AGGREGATION


class Privacy(Section):
    """Client-level differential privacy; the arguments of `fl.Privacy`."""

    clip: Positive  # largest norm of an update
    noise_multiplier: Positive  # of the noise in the sum, in units of clip
    delta: Annotated[float, Checked(real(0, 1, above=True, below=True))] = 1e-5


_SETTINGS: dict[str, dict[str, Any]] = {
    "masked_mean": {},
    "cohort_mean": {},
    "inverse_probability": {},
    "median": {},
    "trimmed_mean": {"trim": real(0, 0.5)},
    "krum": {"byzantine": real(0, 0.5)},
    "multi_krum": {"byzantine": real(0, 0.5)},
    "geometric_median": {"iterations": whole(1, 10_000)},
}


def _aggregator(value: Any) -> Any:
    known = choice(*_SETTINGS)
    if not isinstance(value, dict):
        return known(value)
    if "name" not in value:
        raise refuse(f"is {shown(value)}, but must have a name: {', '.join(_SETTINGS)}")
    name = known(value["name"])
    takes = _SETTINGS[name]
    settings = {key: one for key, one in value.items() if key != "name"}
    for key in settings:
        if key not in takes:
            has = f"it has {', '.join(takes)}" if takes else "it has no settings"
            raise refuse(f"has a setting {key!r} that {name} does not take; {has}")
    return {"name": name} | {key: takes[key](one) for key, one in settings.items()}


Aggregator = Annotated[str | dict[str, Any], Checked(_aggregator)]
