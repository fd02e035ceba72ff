"""`fedlp tune`: its options, and what it does with them."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fedlp_jax.config.schema import Config
    from fedlp_jax.config.tuning_conv import Measured
    from fedlp_jax.execution.map_clients import Plan
    from fedlp_jax.simulation.tuning import Trial

EXAMPLES = """
Examples:

  fedlp tune configs/cifar10.yaml

  fedlp tune configs/cifar10.yaml --seconds 30 --dry-run

With [bold]--convolutions[/bold] it measures the forms of the model's convolutions instead, and puts
them into a table of your own, in $FEDLP_CONV_TABLE or convolutions.json of the cache directory:

  fedlp tune configs/cifar10.yaml --convolutions
"""

Seconds = Annotated[
    float, typer.Option(help="Begin no further plan after so many seconds.", metavar="S")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Measure, but write nothing.")]


Convolutions = Annotated[
    bool, typer.Option("--convolutions", help="Measure the model's convolutions instead.")
]


def tune(config: Config, file: str, seconds: float, dry_run: bool) -> None:
    """Measures plans for a configuration, says each, and writes the quickest into its file."""
    from fedlp_jax.config.build import build
    from fedlp_jax.config.loading import write_plan
    from fedlp_jax.errors import FedLPError
    from fedlp_jax.execution.map_clients import Plan
    from fedlp_jax.simulation.tuning import describe
    from fedlp_jax.simulation.tuning import tune as measure

    if not dry_run and not os.access(file, os.W_OK):
        raise FedLPError(f"{file} cannot be written; measure only, with --dry-run.")
    arguments: dict[str, Any] = build(config)
    names = "  ".join(f"{field.name:>7}" for field in dataclasses.fields(Plan))
    typer.echo(f"{names}  seconds a round  of the quickest before  compiled in", err=True)
    tuning = measure(arguments, seconds, _say)
    for plan in tuning.left_out:
        typer.echo(f"{_row(plan)}  not measured: the {seconds:g} seconds are over", err=True)
    typer.echo(describe(tuning))
    if dry_run:
        typer.echo(f"{file} is left as it is.")
        return
    write_plan(file, tuning.best)
    typer.echo(f"It is now the plan of {file}.")


def tune_convolutions(config: Config, seconds: float, dry_run: bool) -> None:
    """Measures the convolutions of a model, says each, and puts them into the user's table."""
    from fedlp_jax.config.build import build
    from fedlp_jax.config.tuning_conv import tune_convolutions as measure
    from fedlp_jax.errors import FedLPError
    from fedlp_jax.nn.conv import table

    file = table.path()
    if file is None and not dry_run:
        raise FedLPError(
            f"{table.VARIABLE} is empty, which means no table; let it name a file, or unset it."
        )
    found = measure(build(config), None if dry_run else file, seconds, _say_convolution)
    changed = sum(measured.now != measured.before for measured in found)
    typer.echo(f"{changed} of {len(found)} convolutions take another form now.")
    typer.echo("Nothing is written." if dry_run else f"All new runs here choose by {file}.")


def _say_convolution(measured: Measured) -> None:
    times = "  ".join(f"{form} {time:g} ms" for form, time in measured.times.items())
    typer.echo(f"{measured.shapes}: {measured.now} (was {measured.before}); {times}", err=True)


def _say(trial: Trial) -> None:
    if trial.error:
        typer.echo(f"{_row(trial.plan)}  cannot run: {trial.error}", err=True)
        return
    typer.echo(
        f"{_row(trial.plan)}  {trial.seconds:15.4f}  {trial.ratio:22.2f}  "
        f"{trial.compile_seconds:9.1f} s",
        err=True,
    )


def _row(plan: Plan) -> str:
    fields = dataclasses.asdict(plan)
    return "  ".join(f"{value!s:>{max(7, len(name))}}" for name, value in fields.items())
