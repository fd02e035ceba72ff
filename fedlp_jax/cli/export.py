"""`fedlp export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlp_jax.cli.options import Runs

EXAMPLES = """
Examples:

  fedlp export runs/* --out rounds.parquet

  fedlp export runs/quickstart-1 --clients --out clients.csv
"""


def export(
    runs: Runs,
    out: Annotated[Path, typer.Option(metavar="FILE", help="FILE.csv or FILE.parquet.")],
    clients: Annotated[
        bool, typer.Option("--clients", help="A row for each client of each round.")
    ] = False,
) -> None:
    """Write the rounds of several runs into one table, for pandas, R or a spreadsheet."""
    from fedlp_jax.reporting.frames import runs_frame, write

    table = runs_frame([Path(run).expanduser() for run in runs], clients=clients)
    write(table, out)
    typer.echo(f"{len(table):,} rows written to {out}.")
