"""`fedlp tune`: its options, and what it does with them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fedlp_jax.config import Config
    from fedlp_jax.placement import Plan
    from fedlp_jax.tuning import Trial

EXAMPLES = """
Examples:

  fedlp tune configs/cifar10.yaml

  fedlp tune configs/cifar10.yaml --seconds 30 --dry-run
"""

Seconds = Annotated[
    float, typer.Option(help="Begin no further plan after so many seconds.", metavar="S")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Measure, but leave the file as it is.")]


def tune(config: Config, file: str, seconds: float, dry_run: bool) -> None:
    """Measures plans for a configuration, says each, and writes the quickest into its file."""
    from fedlp_jax.experiment import build
    from fedlp_jax.placement import Plan
    from fedlp_jax.plan_file import check_writable, write_plan
    from fedlp_jax.tuning import describe
    from fedlp_jax.tuning import tune as measure

    if not dry_run:
        check_writable(file)
    arguments: dict[str, Any] = build(config)
    names = "".join(f"{field.name:>9}" for field in dataclasses.fields(Plan))
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
    return "".join(f"{value!s:>9}" for value in dataclasses.asdict(plan).values())
