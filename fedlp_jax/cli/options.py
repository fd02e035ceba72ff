"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, as in configs/.")]
Runs = Annotated[list[str], typer.Argument(metavar="RUN...", help="Run directories, or sweeps.")]
Target = Annotated[
    float | None, typer.Option(help="Add what it took to reach this value.", metavar="T")
]
Metric = Annotated[
    str | None, typer.Option(help="Key of a row of metrics.jsonl; by default the test accuracy.")
]
