"""`fedlp plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlp_jax.cli.options import ConfigFile

if TYPE_CHECKING:
    from rich.text import Text

    from fedlp_jax.config.overview import Overview
    from fedlp_jax.config.schema import Config
    from fedlp_jax.reporting.tables import NumbersTable
    from fedlp_jax.simulation.estimate import Estimate
    from fedlp_jax.simulation.scaling import Link, Modelled, Scaling

EXAMPLES = """
Examples:

  fedlp plan configs/cifar10.yaml

  fedlp plan configs/cifar10.yaml --algorithm.keep 0.3 --rounds 500 --seconds 30

A round on devices that are not here, from the seconds of a step measured here:

  fedlp plan configs/cifar10.yaml --devices 8,64,256

From those of the device that you mean, and its link:

  fedlp plan configs/cifar10.yaml --devices 8,64,256 --step-seconds 2e-4 --bandwidth 450
"""
_other = partial(typer.Option, rich_help_panel="Other numbers of devices")


def plan(
    context: typer.Context,
    config: ConfigFile,
    seconds: Annotated[
        float,
        typer.Option(help="About how long to time rounds; at least one round is.", metavar="S"),
    ] = 5.0,
    devices: Annotated[
        str | None,
        _other(
            help="Also model a round on so many devices like those of this machine.",
            metavar="N[,N...]",
        ),
    ] = None,
    step_seconds: Annotated[
        float | None,
        _other(
            help="Seconds of a local step of one client on such a device. Then nothing is timed.",
            metavar="S",
        ),
    ] = None,
    bandwidth: Annotated[
        float,
        _other(
            help="Of a device's link, each way; 50 is 400 Gb/s, as each GPU of a DGX H100 has.",
            metavar="GB/S",
        ),
    ] = 50.0,
    latency: Annotated[
        float,
        _other(
            help="Of a message; 5 is what NCCL's cost model has for a network.",
            metavar="MICROSECONDS",
        ),
    ] = 5.0,
) -> None:
    """Say what a run will take on this machine: time, memory, traffic. It runs a few rounds."""
    from fedlp_jax.cli.run import load
    from fedlp_jax.config.build import build
    from fedlp_jax.config.loading import split_words
    from fedlp_jax.config.overview import overview
    from fedlp_jax.errors import check_number
    from fedlp_jax.reporting.tables import show
    from fedlp_jax.simulation.estimate import estimate
    from fedlp_jax.simulation.scaling import Link

    numbers = _numbers(devices, step_seconds)
    check_number("--bandwidth", bandwidth, gt=0)
    check_number("--latency", latency, ge=0)
    loaded = load(*split_words([config, *context.args]))
    arguments = build(loaded)
    if step_seconds is None:
        typer.echo("compiling, then timing a few rounds ...", err=True)
        view = overview(loaded, arguments)
        show(_table(loaded, view, estimate(arguments, seconds)))
    if numbers:
        link = Link(bandwidth * 1e9, latency / 1e6)
        model = _model(arguments, seconds, step_seconds, link)
        show(*_scaled(model, numbers, "measured" if step_seconds is None else "given"))


def _model(
    arguments: Mapping[str, Any], seconds: float, step_seconds: float | None, link: Link
) -> Scaling:
    """The model of a run, from its pace on this machine or from a step that is given."""
    from fedlp_jax.simulation.estimate import measure_pace, of_rounds
    from fedlp_jax.simulation.run import Simulation
    from fedlp_jax.simulation.scaling import Pace, Scaling

    if step_seconds is None:
        pace, run = measure_pace(arguments, seconds)
        return Scaling(run, pace, link)
    return Scaling(Simulation(**of_rounds(arguments), rounds=0), Pace(step_seconds), link)


def _numbers(devices: str | None, step_seconds: float | None) -> list[int]:
    """The numbers in "8,64,256"."""
    from fedlp_jax.errors import FedLPError, check_number

    if devices is None and step_seconds is not None:
        raise FedLPError("--step-seconds is for other devices; say how many with --devices 8,64.")
    if step_seconds is not None:
        check_number("--step-seconds", step_seconds, gt=0)
    try:
        numbers = [int(word) for word in (devices or "").split(",") if devices is not None]
    except ValueError:
        numbers = [0]
    if any(number < 1 for number in numbers):
        raise FedLPError(
            f"--devices {devices!r} must be whole numbers of at least 1 with commas between them, "
            "such as 8,64,256."
        )
    return numbers


def _scaled(model: Scaling, numbers: Sequence[int], source: str) -> list[NumbersTable | Text]:
    """The table of a round on other numbers of devices, and what it says in sentences."""
    from fedlp_jax.reporting.tables import NumbersTable, note

    one, most = model(1), model.worthwhile()
    parts = [f"{part} [s]" for part in ("training", "fixed", "reduction", "a round")]
    head = ["devices", "steps", *parts, "speed-up", "lost to"]
    rows = []
    for found in map(model, numbers):
        seconds = (found.training, found.fixed, found.reduction, found.seconds)
        times = [f"{value:.3g}" for value in seconds]
        speedup = f"{one.seconds / found.seconds:.1f}"
        rows.append((str(found.devices), f"{found.steps:,.0f}", *times, speedup, _lost(found)))
    table = NumbersTable(
        "A round on other numbers of devices, modelled", head, rows, words={len(head) - 1}
    )
    notes = [
        f"from a step of {model.pace.step:.3g} s and {model.pace.fixed:.3g} s a round besides, "
        f"{source}; one reduction of {model.reduced_bytes / 1e6:.3g} MB at "
        f"{model.link.bandwidth / 1e9:g} GB/s and {model.link.latency * 1e6:g} us a message",
        f"More than {most} device(s) do not pay: twice as many save less than a tenth of a round, "
        f"which they lose to the {model(2 * most).limit}.",
    ]
    if not model.complete:
        notes.append(
            "The aggregator needs the updates of all clients; this exchange is not modelled, so "
            "more devices take longer than the table says."
        )
    idle = [n for n in numbers if n > model.cohort]
    if idle:
        notes.append(
            f"A cohort of {model.cohort} gives work to {model.cohort} devices; of "
            f"{', '.join(map(str, idle))} the others would idle. Enlarge the cohort, or sweep "
            "several runs at once."
        )
    return [table, *(note(text) for text in notes)]


def _lost(found: Modelled) -> str:
    """What holds a round back, if it takes a tenth of it."""
    share = found.lost[found.limit] / found.seconds
    return f"{found.limit}, {share:.0%}" if share >= 0.1 else ""


def _table(config: Config, view: Overview, found: Estimate) -> NumbersTable:
    from fedlp_jax.config.overview import training_macs
    from fedlp_jax.execution.plan import size
    from fedlp_jax.reporting.progress import duration
    from fedlp_jax.reporting.tables import NumbersTable
    from fedlp_jax.simulation.tuning import words

    macs = training_macs(config, view)
    device = "not known" if found.device_bytes is None else size(found.device_bytes)
    free = "" if found.free_bytes is None else f"{size(found.free_bytes)} free"
    times = "1 round timed" if found.rounds_timed == 1 else f"{found.rounds_timed} rounds timed"
    rounds = found.rounds
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
    title = f"{config.name} with {words(found.plan)}"
    return NumbersTable(title, ("", "", ""), rows, words={2})
