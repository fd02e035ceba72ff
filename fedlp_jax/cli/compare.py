"""`fedlp compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedlp_jax.cli.options import Metric, Runs, Target

EXAMPLES = """
Examples:

  fedlp compare runs/*

  fedlp compare sweeps/keep

  fedlp compare runs/fedavg-* runs/homo-* --target 0.85 --format latex > table.tex

  fedlp compare sweeps/keep --target 0.85 --columns "final,upload,rounds to" --format latex

  fedlp compare runs/* --target 0.85 --plots figures
"""


def compare(
    runs: Runs,
    target: Target = None,
    metric: Metric = None,
    columns: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Show these columns alone, by how their titles begin."),
    ] = None,
    format: Annotated[
        Literal["table", "md", "latex", "csv"], typer.Option(help="What to print.")
    ] = "table",
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Draw the metric into this directory.")
    ] = None,
) -> None:
    """Set runs next to each other; those that differ only in their seed become a mean."""
    from rich.console import Console

    from fedlp_jax.reporting import compare as comparing
    from fedlp_jax.reporting.metrics import headline_of
    from fedlp_jax.reporting.plots import axes_of, curves
    from fedlp_jax.reporting.tables import NumbersTable, note

    paths = [Path(run).expanduser() for run in runs]
    experiments = comparing.by_configuration(paths)
    table = comparing.compare(
        experiments,
        target=target,
        metric=metric,
        columns=None if columns is None else [word.strip() for word in columns.split(",")],
    )
    if plots is not None:
        rows = [row for seeds in experiments.values() for run in seeds for row in run]
        metric = metric or headline_of(rows)
        plots = plots.expanduser()
        plots.mkdir(parents=True, exist_ok=True)
        for x in axes_of(rows):
            curves(experiments, plots / f"{metric}_by_{x}.png", x, metric)
    if format == "table":
        console = Console()
        lines = [table.header, *table.lines()]
        shown = NumbersTable("", lines[0], lines[1:])
        if not shown.fits(console.width):  # an experiment a column instead of a line
            lines = [list(column) for column in zip(*lines, strict=True)]
            shown = NumbersTable("", lines[0], lines[1:])
        console.print(shown)
        for sentence in table.notes:
            console.print(note(sentence))
    else:
        written = {"md": table.to_markdown, "latex": table.to_latex, "csv": table.to_csv}
        typer.echo(written[format]().rstrip("\n"))
        for sentence in table.notes:  # not among the lines of a table that goes into a file
            typer.echo(sentence, err=True)
