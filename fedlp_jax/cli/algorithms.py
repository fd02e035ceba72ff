"""`fedlp algorithms`."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer

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

    if name:
        check_choice("algorithm", name, tuple(ALGORITHMS))
        section = ALGORITHMS[name]
        typer.echo(inspect.getdoc(section.factory))
        typer.echo("\nFields of `algorithm:` in a file, with their defaults:")
        for field, info in section.model_fields.items():
            if field != "name":
                default = "(required)" if info.is_required() else info.get_default()
                typer.echo(f"  {field}: {'null' if default is None else default}")
        return
    width = max(map(len, ALGORITHMS))
    for known, section in ALGORITHMS.items():
        first = (inspect.getdoc(section.factory) or "").splitlines()[0]
        typer.echo(f"{known:{width}}  {first}")
