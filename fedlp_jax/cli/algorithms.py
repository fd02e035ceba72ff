"""`fedlp algorithms`."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fedlp_jax.config.schema import Section

EXAMPLES = """
Examples:

  fedlp algorithms

  fedlp algorithms scaffold
"""


def algorithms(
    name: Annotated[str, typer.Argument(metavar="NAME", help="One of the algorithms.")] = "",
) -> None:
    """List the algorithms that a configuration can name; with NAME its rule and its fields."""
    from fedlp_jax.config.schema import ALGORITHMS
    from fedlp_jax.errors import check_choice
    from fedlp_jax.reporting.tables import NumbersTable, show

    if name:
        check_choice("algorithm", name, tuple(ALGORITHMS))
        section = ALGORITHMS[name]
        typer.echo(f"{_documented(section.factory).partition(_ARGUMENTS)[0].rstrip()}\n")
        title = "Fields of `algorithm:` in a file, where none is written as null"
        head = ("field", "default", "meaning")
        show(NumbersTable(title, head, _fields(section), words={1, 2}))
        return
    width = max(map(len, ALGORITHMS))
    for known, section in ALGORITHMS.items():
        typer.echo(f"{known:{width}}  {_documented(section.factory).splitlines()[0]}")


_ARGUMENTS = "\nArgs:\n"


def _documented(function: Callable[..., Any]) -> str:
    return inspect.getdoc(function) or ""


def _meanings(function: Callable[..., Any]) -> dict[str, str]:
    """What the docstring of a function says of each argument."""
    section = _documented(function).partition(_ARGUMENTS)[2].partition("\n\n")[0]
    found = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", section, re.MULTILINE)
    return {argument: " ".join(text.split()) for argument, text in found}


def _fields(section: type[Section]) -> Iterator[tuple[str, str, str]]:
    """Name, default and meaning of each field of an algorithm, its own fields first."""
    from fedlp_jax.algorithms.compose import compose
    from fedlp_jax.config.schema import preset

    own, values = _meanings(section.factory), preset(section)
    meanings = _meanings(compose) | own
    for field, info in sorted(section.model_fields.items(), key=lambda item: item[0] not in own):
        meaning, default = meanings.get(field, ""), values.get(field, info.default)
        if info.is_required() or meaning.endswith("required."):
            default = "(required)"
        elif default is None:
            default = "none"
        elif not isinstance(default, str):
            default = json.dumps(default)  # which is YAML
        if field != "name":
            yield field, default, meaning
