"""`fedlp tune`."""

from __future__ import annotations

import dataclasses
import os
import stat
from typing import TYPE_CHECKING, Annotated

import typer

from fedlp_jax.cli.options import ConfigFile

if TYPE_CHECKING:
    from fedlp_jax.execution.plan import Plan
    from fedlp_jax.simulation.tuning import Trial

EXAMPLES = """
Examples:

  fedlp tune configs/cifar10.yaml

  fedlp tune configs/cifar10.yaml --seconds 30 --dry-run
"""


def tune(
    context: typer.Context,
    config: ConfigFile,
    seconds: Annotated[
        float, typer.Option(help="Start no further plan after this many seconds.", metavar="S")
    ] = 120.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure, but write nothing.")] = False,
) -> None:
    """Measure plans (devices, width, data) for a configuration; write the fastest into its file."""
    from fedlp_jax.cli.run import load
    from fedlp_jax.config.build import build
    from fedlp_jax.config.loading import located, split_words, write_plan
    from fedlp_jax.errors import FedLPError
    from fedlp_jax.execution.plan import Plan
    from fedlp_jax.simulation.tuning import describe
    from fedlp_jax.simulation.tuning import tune as measure

    file, overrides = split_words([config, *context.args])
    if not dry_run and not os.path.exists(file) and located(file).exists():
        raise FedLPError(
            f"{file} is an example of the package, which stays as it is; tune a file of yours, or "
            "measure only, with --dry-run."
        )
    loaded = load(file, overrides, every_device=True)
    # root may write to any file; the owner's bit decides.
    if not dry_run and not (os.access(file, os.W_OK) and os.stat(file).st_mode & stat.S_IWUSR):
        raise FedLPError(f"{file} is read-only; make it writable, or measure only, with --dry-run.")
    arguments = build(loaded)
    names = "  ".join(f"{field.name:>7}" for field in dataclasses.fields(Plan))
    typer.echo(f"{names}  seconds per round  of the fastest so far  compiled in", err=True)
    tuning = measure(arguments, seconds, _print_trial)
    for plan in tuning.left_out:
        typer.echo(f"{_row(plan)}  not measured: {seconds:g} seconds have passed", err=True)
    typer.echo(describe(tuning))
    if dry_run:
        typer.echo(f"{file} is unchanged.")
        return
    write_plan(file, tuning.best)
    typer.echo(f"Written to {file}.")


def _print_trial(trial: Trial) -> None:
    if trial.error:
        typer.echo(f"{_row(trial.plan)}  cannot run: {trial.error}", err=True)
        return
    typer.echo(
        f"{_row(trial.plan)}  {trial.seconds:17.4f}  {trial.ratio:21.2f}  "
        f"{trial.compile_seconds:9.1f} s",
        err=True,
    )


def _row(plan: Plan) -> str:
    fields = dataclasses.asdict(plan)
    return "  ".join(f"{value!s:>{max(7, len(name))}}" for name, value in fields.items())
