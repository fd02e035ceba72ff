"""`fedlp report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlp_jax.cli.options import Metric, Runs, Target

EXAMPLES = """
Examples:

  fedlp report runs/*

  fedlp report sweeps/keep

  fedlp report runs/fedavg-* runs/homo-* --target 0.85 --out homo.html --title "FedLP on digits"
"""


def report(
    runs: Runs,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The file to write.")] = Path(
        "report.html"
    ),
    target: Target = None,
    metric: Metric = None,
    title: Annotated[str, typer.Option(help="Of the page.")] = "Federated learning runs",
) -> None:
    """Write runs as one HTML page: table, curves to hover over, layers, partition, settings."""
    from fedlp_jax.reporting import report as page

    paths = [Path(run).expanduser() for run in runs]
    written = page.report(paths, out, target=target, metric=metric, title=title)
    typer.echo(f"Written to {written}.")
