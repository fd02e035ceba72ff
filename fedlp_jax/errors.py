"""Errors and warnings as sentences: what is wrong, with the numbers, and the way out."""

from __future__ import annotations

import contextlib
import contextvars
import difflib
import math
import numbers
import re
import reprlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np


class FedLPError(ValueError):
    """Bad input: the message says what is wrong, with the numbers, and the way out."""


# The lists that `warn` adds to: one for each `collecting` around it, in this thread.
_Lists = tuple[list[str], ...]
_collections: contextvars.ContextVar[_Lists] = contextvars.ContextVar("collections", default=())


def warn(sentence: str, category: type[Warning] = UserWarning, *, stacklevel: int = 2) -> None:
    """Warns, and adds the sentence to the warnings of the run.

    Args:
      sentence: what is assumed or went wrong, and the way out.
      category: as for `warnings.warn`.
      stacklevel: as for `warnings.warn`; 1 is the caller.
    """
    note([sentence])
    warnings.warn(sentence, category, stacklevel=stacklevel + 1)


def note(sentences: Iterable[str]) -> None:
    """Adds sentences that were said before, and still hold, to the warnings of the run."""
    for found in _collections.get():
        found.extend(sentence for sentence in sentences if sentence not in found)


def warner() -> Callable[[str], None]:
    """Returns a `warn` that only notes a sentence which it said before."""
    said: list[str] = []

    def warn_once(sentence: str) -> None:
        if sentence in said:
            return note([sentence])
        said.append(sentence)
        warn(sentence, stacklevel=3)

    return warn_once


@contextlib.contextmanager
def collecting() -> Iterator[list[str]]:
    """Yields the list that fills with the warnings given inside, each of them once."""
    found: list[str] = []
    token = _collections.set((*_collections.get(), found))
    try:
        yield found
    finally:
        _collections.reset(token)


class _Short(reprlib.Repr):
    """`repr` of values that may be huge, deeply nested, or too long an integer to print."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 3, 6, 6, 6
        self.maxstring = self.maxother = 80

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 100 else f"about {'-' * (x < 0)}2**{x.bit_length() - 1}"


_SHORT = _Short()
_ADDRESS = re.compile(" at 0x[0-9a-f]+")  # of an object in memory: differs between processes


def shown(value: object) -> str:
    """`repr` of a value for a sentence: on one line and short."""
    words = _SHORT.repr(value).replace("\n", " ")
    return words if len(words) <= 200 else f"{words[:200]}..."


def check_number(
    name: str,
    value: Any,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    integer: bool = False,
    optional: bool = False,
    hint: str = "",
) -> Any:
    """Checks a finite number and converts it from NumPy to Python. Bools are not numbers.

    Args:
      name: of the setting.
      value: a Python or NumPy number.
      ge: smallest value.
      gt: bound that the value must exceed.
      le: largest value.
      lt: bound that the value must stay below.
      integer: accept integers only, not 3.0.
      optional: say that the setting may be None. None itself is for the caller to accept.
      hint: the reason or the way out, appended to the sentence.

    Returns:
      The number as an `int` or a `float`.

    Raises:
      FedLPError: not such a number.
    """
    kind = (int, np.integer) if integer else numbers.Real
    good = (
        isinstance(value, kind) and not isinstance(value, bool) and _within(value, ge, gt, le, lt)
    )
    if not (good and abs(value) < math.inf):
        raise FedLPError(
            f"{name}={shown(value)} must be a {'whole ' * integer}number{_bounds(ge, gt, le, lt)}"
            f"{', or None' * optional}{hint and f': {hint}'}."
        )
    return int(value) if isinstance(value, int | np.integer) else float(value)


def check_client(client: Any, clients: int) -> None:
    """Refuses what is not the number of one of K clients.

    Raises:
      FedLPError: with the numbers there are.
    """
    integer = isinstance(client, int | np.integer) and not isinstance(client, bool)
    if not integer or not 0 <= client < clients:
        raise FedLPError(f"there is no client {shown(client)}: they count from 0 to {clients - 1}.")


def check_array(
    name: str,
    value: Any,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    dtype: Any = np.float64,
    hint: str = "",
) -> np.ndarray:
    """Converts a number or nested numbers to an array and checks every entry.

    Args:
      name: of the setting.
      value: anything `np.asarray` takes.
      ge: smallest entry.
      gt: bound that each entry must exceed.
      le: largest entry.
      lt: bound that each entry must stay below.
      dtype: of the result.
      hint: the reason or the way out, appended to the sentence.

    Raises:
      FedLPError: not numbers, or one that is out of bounds or not finite; the first is shown.
    """
    try:
        array = np.asarray(value, dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise FedLPError(
            f"{name}={shown(value)} is not a number or an array of numbers."
        ) from error
    good = np.isfinite(array) & _within(array, ge, gt, le, lt)
    if not good.all():
        raise FedLPError(
            f"{name}={array[~good].flat[0]:g} must be a number{_bounds(ge, gt, le, lt)}"
            f"{hint and f': {hint}'}."
        )
    return array


def _within(
    value: Any, ge: float | None, gt: float | None, le: float | None, lt: float | None
) -> Any:
    """Whether the bounds hold, entry by entry; never for NaN."""
    good: Any = value == value
    good = good if ge is None else good & (value >= ge)
    good = good if gt is None else good & (value > gt)
    good = good if le is None else good & (value <= le)
    return good if lt is None else good & (value < lt)


def _bounds(ge: float | None, gt: float | None, le: float | None, lt: float | None) -> str:
    """The bounds in words: " of at least 3", " in [0, 1]", " above 0"."""
    low, high = (ge if gt is None else gt), (le if lt is None else lt)
    if low is not None and high is not None:
        return f" in {'[' if gt is None else '('}{low:g}, {high:g}{']' if lt is None else ')'}"
    if low is not None:
        return f" of at least {low:g}" if gt is None else f" above {low:g}"
    if high is not None:
        return f" of at most {high:g}" if lt is None else f" below {high:g}"
    return ""


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuses a value that is not among `choices`, and suggests the nearest one.

    Raises:
      FedLPError: with the choices.
    """
    if value in choices:
        return
    hint = nearest(value, choices) or "."
    raise FedLPError(f"{name} {shown(value)} is unknown{hint} Known: {', '.join(choices)}.")


def nearest(word: object, known: Iterable[str], shown: Callable[[str], str] = str) -> str:
    """A suggestion of the closest known word.

    Args:
      word: the unknown word.
      known: the known words.
      shown: formats a known word for the hint.

    Returns:
      `"; did you mean 'keep'?"`, or `""` if no word is close.
    """
    # The most common slip is another way to join words: fedlp-homo.
    plain = {k.lower().replace("-", "_"): k for k in known}
    close = difflib.get_close_matches(str(word).lower().replace("-", "_"), plain, n=1)
    return f"; did you mean '{shown(plain[close[0]])}'?" if close else ""


def why(error: BaseException) -> str:
    """The message of an error as part of a sentence: short, on one line, without its path."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, KeyError) and error.args:  # a mapping that lacks a name
        said = str(error.args[0]) if " " in str(error.args[0]) else f"it has no {error}"
    words = _ADDRESS.sub("", " ".join(said.split())) or type(error).__name__
    return (words if len(words) <= 200 else f"{words[:200]}...").rstrip(".")
