"""`fedlp report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = """
Examples:

  fedlp report runs/*

  fedlp report sweeps/keep

  fedlp report runs/fedavg-* runs/homo-* --target 0.85 --out homo.html --title "FedLP on digits"
"""


def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Run directories, or sweeps.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The file to write.")] = Path(
        "report.html"
    ),
    target: Annotated[
        float | None, typer.Option(help="Add what it took to reach this value.", metavar="T")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="Key of a row of metrics.jsonl; by default the test accuracy."),
    ] = None,
    title: Annotated[str, typer.Option(help="Of the page.")] = "Federated learning runs",
) -> None:
    """Write runs as one HTML page: table, curves to hover over, layers, partition, settings."""
    from fedlp_jax.reporting import report as page

    paths = [Path(run).expanduser() for run in runs]
    written = page.report(paths, out, target=target, metric=metric, title=title)
    typer.echo(f"Written to {written}.")
