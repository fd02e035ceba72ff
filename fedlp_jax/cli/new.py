"""`fedlp new`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """
Examples:

  fedlp new my-experiment

  cd my-experiment && python -m pytest && fedlp run config.yaml
"""
_TEMPLATE = Path(__file__).parent / "project"


def new(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Made if it does not exist.")],
) -> None:
    """Begin a project: a configuration, a model, a mask policy, and a test of all three."""
    from fedlp_jax.errors import FedLPError, why

    place = directory.expanduser()
    if place.exists() and not place.is_dir():
        raise FedLPError(f"{place} is a file; name a directory.")
    if place.is_dir() and any(place.iterdir()):
        raise FedLPError(f"{place} is not empty; name a directory that is, or a new one.")
    try:
        place.mkdir(parents=True, exist_ok=True)
        for file in sorted(_TEMPLATE.iterdir()):
            if file.is_file():
                (place / file.name).write_bytes(file.read_bytes())
    except OSError as error:
        raise FedLPError(f"the project cannot be written to {place}: {why(error)}.") from error
    typer.echo(f"{place} has a small experiment. Next:\n")
    typer.echo(f"  cd {place}\n  python -m pytest\n  fedlp run config.yaml")
