"""`fedlp plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from fedlp_jax.config.overview import Overview
    from fedlp_jax.config.schema import Config
    from fedlp_jax.simulation.estimate import Estimate

EXAMPLES = """
Examples:

  fedlp plan configs/cifar10.yaml

  fedlp plan configs/cifar10.yaml --algorithm.keep 0.3 --rounds 500 --seconds 30
"""


def plan(
    context: typer.Context,
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, as in configs/.")],
    seconds: Annotated[
        float, typer.Option(help="About how long to time rounds.", metavar="S")
    ] = 5.0,
) -> None:
    """Say what a run will take on this machine: time, memory, traffic. It runs a few rounds."""
    from fedlp_jax.cli.run import load
    from fedlp_jax.config.build import build
    from fedlp_jax.config.loading import split_words
    from fedlp_jax.config.overview import overview
    from fedlp_jax.reporting.tables import show
    from fedlp_jax.simulation.estimate import estimate

    loaded = load(*split_words([config, *context.args]))
    arguments = build(loaded)
    view = overview(loaded, arguments)
    typer.echo("compiling, then timing a few rounds ...", err=True)
    show(_table(loaded, view, estimate(arguments, seconds)))


def _table(config: Config, view: Overview, found: Estimate) -> Table:
    from fedlp_jax.config.overview import training_macs
    from fedlp_jax.execution.plan import size
    from fedlp_jax.reporting.progress import duration
    from fedlp_jax.reporting.tables import numbers_table
    from fedlp_jax.simulation.tuning import words

    macs = training_macs(config, view)
    device = "not known" if found.device_bytes is None else size(found.device_bytes)
    free = "" if found.free_bytes is None else f"{size(found.free_bytes)} free"
    times, rounds = f"{found.rounds_timed} rounds timed", found.rounds
    megabytes = (view.upload_bytes / 1e6, view.download_bytes / 1e6)
    rows = [
        ("compilation", duration(found.compile_seconds), "measured; a second start takes less"),
        ("a round", f"{found.round_seconds:.3g} s", f"measured; {times}"),
        ("an evaluation", f"{found.test_seconds:.3g} s", f"measured; {found.tests} in the run"),
        ("the run", duration(found.total_seconds), f"from these, for {rounds:,} rounds"),
        ("memory of each device", device, f"predicted by XLA; {free}"),
        ("memory of the process", size(found.process_bytes), "measured"),
        ("upload", f"{megabytes[0] * rounds:,.4g} MB", f"modelled; {megabytes[0]:.3g} a round"),
        ("download", f"{megabytes[1] * rounds:,.4g} MB", f"modelled; {megabytes[1]:.3g} a round"),
    ]
    if macs is not None:
        text = f"modelled; {macs / 1e9:,.4g} a round, a backward pass counted as two forward"
        rows.append(("training of all clients", f"{macs * rounds / 1e9:,.4g} GMAC", text))
    table = numbers_table(f"{config.name} with {words(found.plan)}", ("", "", ""), rows)
    table.show_header = False
    table.columns[2].justify = "left"
    return table
