"""Checks of single configuration fields, and the sentences said about values they refuse.

A check takes a raw value and returns the good one. Its sentence is a predicate ("is 1.5, but must
be ..."), before which `config_problem` puts the dotted field.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import date
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict
from pydantic import BeforeValidator as Checked
from pydantic_core import PydanticCustomError

from fedlp_jax.errors import nearest, shown

Check = Callable[[Any], Any]
_HUGE, _TINY = 2.0**127, 2.0**-126  # what float32 can tell from infinity and from zero
_MANY = 2**31  # rounds, clients, steps and sizes are counted in 32 bits


def refuse(sentence: str) -> PydanticCustomError:
    """The error a check raises; its sentence is shown as it is."""
    # Braces in a sentence would be taken for places to fill in, hence the detour.
    return PydanticCustomError("refused", "{sentence}", {"sentence": sentence})


def optional(check: Check) -> Check:
    """Also accepts null."""
    return lambda value: None if value is None else check(value)


def whole(low: int, high: int | None = None) -> Check:
    """Whole numbers from low to high, also written as 1e6."""
    wanted = "a whole number " + (f"from {low} to {high}" if high is not None else f">= {low}")

    def check(value: Any) -> int:
        if high is None and is_number(value) and value >= _MANY:
            raise refuse(f"is {shown(value)}, but must be {wanted} and below {_MANY}")
        good = is_number(value) and value >= low and value % 1 == 0
        if not good or (high is not None and value > high):
            raise refuse(f"is {shown(value)}, but must be {wanted}")
        return int(value)

    return check


def real(low: float, high: float = math.inf, *, above: bool = False, below: bool = False) -> Check:
    """Numbers from low to high; `above` leaves out low itself, `below` high itself."""
    wanted = f"a number {'above' if above else '>='} {low:g}"
    if not math.isinf(high):
        wanted += f" and {'below' if below else '<='} {high:g}"

    def check(value: Any) -> float:
        if math.isinf(high) and is_number(value) and _HUGE <= value < math.inf:
            raise refuse(f"is {shown(value)}, but must be {wanted} and below {_HUGE:.2g}")
        good = is_number(value) and low <= value <= high and value < _HUGE
        if not good or (above and value == low) or (below and value == high):
            raise refuse(f"is {shown(value)}, but must be {wanted}")
        if 0 < abs(value) < _TINY:
            raise refuse(
                f"is {value!r}, which is 0 in float32; give 0 or a number of at least {_TINY:.2g}"
            )
        return float(value)

    return check


def several(element: Check, *, alone: bool = False, minimum: int = 1) -> Check:
    """Lists of at least `minimum` elements; with `alone`, also one element by itself."""

    def check(value: Any) -> Any:
        if isinstance(value, list | tuple):
            if len(value) < minimum:
                raise refuse(f"is {shown(value)}, but must have {minimum} or more entries")
            return tuple(_entry(element, i, v) for i, v in enumerate(value))
        if not alone:
            raise refuse(f"is {shown(value)}, but must be a list")
        return element(value)

    return check


def mapping(entry: Check) -> Check:
    """Mappings from names to values."""

    def check(value: dict[Any, Any]) -> dict[str, Any]:
        for name in value:
            if not isinstance(name, str) or not name or not name.isprintable():
                raise refuse(f"has an entry for {shown(name)}, which is no name")
        return {name: entry(one) for name, one in value.items()}

    return check


def without(*taken: str) -> Check:
    """Mappings to plain values, that leave some names to the section they are in."""

    def check(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name in taken:
            if name in value:
                raise refuse(f"has {name}, which is a field beside it; write it one level up")
        return mapping(_plain)(value)

    return check


def _plain(value: Any, depth: int = 0) -> Any:
    """What is written into a file and read back as it was; dates too, which no option takes."""
    if depth > 5:
        raise refuse("is nested more than 5 levels deep")
    if isinstance(value, dict):
        return mapping(lambda one: _plain(one, depth + 1))(value)
    if isinstance(value, list | tuple):
        return [_plain(one, depth + 1) for one in value]
    if isinstance(value, str) and not value.isprintable():
        raise refuse(f"has {shown(value)}, but must have text of printable characters")
    huge = isinstance(value, int) and abs(value) >= 2**64
    if huge or not isinstance(value, str | int | float | date | None):
        raise refuse(
            f"has {shown(value)}, but may have numbers below 2**64, text, lists and sections"
        )
    return value


def choice(*known: str) -> Check:
    """One of a few words."""

    def check(value: Any) -> str:
        if value not in known:
            hint = nearest(value, known) if isinstance(value, str) else ""
            raise refuse(f"is {shown(value)}, but must be {' or '.join(known)}{hint}")
        return str(value)

    return check


def text(value: Any) -> str:
    """Text that is not empty, in one line of at most 1,000 characters."""
    if not isinstance(value, str) or not value:
        raise refuse(f"is {shown(value)}, but must be text")
    if not value.isprintable() or len(value) > 1000:
        raise refuse(f"is {shown(value)}, but must be text of at most 1000 printable characters")
    return value


def flag(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise refuse(f"is {shown(value)}, but must be true or false")
    return value


def _entry(element: Check, index: int, value: Any) -> Any:
    try:
        return element(value)
    except PydanticCustomError as error:
        raise refuse(f"[{index}] {error.message()}") from error


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a float; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


Seed = Annotated[int, Checked(whole(0, 2**32 - 1))]
OwnSeed = Annotated[int | None, Checked(optional(whole(0, 2**32 - 1)))]  # null = the run's
Count = Annotated[int, Checked(whole(1))]
OptionalCount = Annotated[int | None, Checked(optional(whole(1)))]
Share = Annotated[float, Checked(real(0, 1))]
Decay = Annotated[float, Checked(real(0, 1, below=True))]
Positive = Annotated[float, Checked(real(0, above=True))]
NotNegative = Annotated[float, Checked(real(0))]
Flag = Annotated[bool, Checked(flag)]


class Section(BaseModel):
    """A part of the configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")
