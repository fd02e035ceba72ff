"""Code of the user's own, which a configuration names as `module:name`.

A configuration that names code runs it, as a script would. Nothing is imported until the
configuration is checked to be run.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from fedlp_jax.errors import FedLPError, nearest, shown, why

_OWN = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")  # not mnist:3.0.1


def is_own(name: object) -> TypeGuard[str]:
    """Whether a name is written as `module:name`."""
    return isinstance(name, str) and _OWN.fullmatch(name) is not None


def search(folder: str | Path) -> None:
    """Also finds modules in the working directory and in `folder`, after all others."""
    for place in (os.getcwd(), str(Path(folder).resolve())):
        if place not in sys.path:
            sys.path.append(place)


def imported(name: str) -> Callable[..., Any]:
    """The function or class that `module:name` names.

    Raises:
      FedLPError: there is no such module or name, importing it fails, or it cannot be called.
    """
    path, _, attribute = name.partition(":")
    if path.split(".")[0] in sys.stdlib_module_names:
        raise FedLPError(
            f"name {shown(name)} is of Python's own library; name a function of your own"
        )
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise FedLPError(f"importing {path} failed: {why(error)}") from error
        raise FedLPError(
            f"there is no module {path}, neither on Python's path nor in {os.getcwd()}; run the "
            "command where the module lies, or set PYTHONPATH"
        ) from error
    except Exception as error:  # whatever a user's module raises
        raise FedLPError(f"importing {path} failed: {why(error)}") from error
    if not hasattr(module, attribute):
        known = [one for one in vars(module) if not one.startswith("_")]
        hint = nearest(attribute, known) or ""
        raise FedLPError(f"the module {path} has no {shown(attribute)}{hint}")
    found = getattr(module, attribute)
    if not callable(found):
        raise FedLPError(f"{name} is {shown(found)}, not a function or a class")
    return found


def takes(function: Callable[..., Any], argument: str) -> bool:
    """Whether a function can be called with this argument; of "**", whether with any."""
    made_by = function.__init__ if inspect.isclass(function) else function  # nnx hides it
    parameters = inspect.signature(made_by).parameters
    return argument in parameters or any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
    )


def taken(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that a function takes."""
    return {name: value for name, value in arguments.items() if takes(function, name)}


def check_made(name: str, value: Any, *kinds: type) -> Any:
    """`value`, which a user's function returned.

    Raises:
      FedLPError: it is not one of `kinds`.
    """
    if isinstance(value, kinds):
        return value
    names = " or ".join(f"{kind.__module__}.{kind.__name__}" for kind in kinds)
    raise FedLPError(f"{name} returned {shown(value)}, where it should return a {names}.")
