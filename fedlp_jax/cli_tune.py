"""`fedlp tune`: its options, and what it does with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fedlp_jax.config import Config
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
    from fedlp_jax.tuning import describe, write_plan
    from fedlp_jax.tuning import tune as measure

    arguments: dict[str, Any] = build(config)
    typer.echo("devices  width  seconds a round  of the quickest before  compiled in", err=True)
    tuning = measure(arguments, seconds, _say)
    for plan in tuning.left_out:
        words = f"{plan.devices:7}  {plan.width:5}"
        typer.echo(f"{words}  not measured: the {seconds:g} seconds are over", err=True)
    typer.echo(describe(tuning))
    if dry_run:
        typer.echo(f"{file} is left as it is.")
        return
    write_plan(file, tuning.best)
    typer.echo(f"It is now the plan of {file}.")


def _say(trial: Trial) -> None:
    words = f"{trial.plan.devices:7}  {trial.plan.width:5}"
    if trial.error:
        typer.echo(f"{words}  cannot run: {trial.error}", err=True)
        return
    ratio = trial.seconds / trial.best_so_far
    typer.echo(
        f"{words}  {trial.seconds:15.4f}  {ratio:22.2f}  {trial.compile_seconds:9.1f} s", err=True
    )
