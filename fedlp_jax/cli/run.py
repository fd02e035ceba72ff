"""`fedlp run`."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fedlp_jax.config.schema import Config

EXAMPLES = """
Any field of the configuration can be set: [bold]--algorithm.keep 0.7[/bold],
[bold]--model.hidden "[64, 32]"[/bold], [bold]--partition.name dirichlet --partition.alpha
0.1[/bold].

Examples:

  fedlp run quickstart

  fedlp run configs/quickstart.yaml

  fedlp run configs/mnist.yaml --rounds 5 --seed 1 --out results/mnist

  fedlp run configs/paper/homo-0.5-iid.yaml --algorithm.keep 0.9

JAX's profiler, over rounds 5 to 8:

  fedlp run quickstart --profile 5-8

Ctrl-C stops a run after the current round and saves it; this resumes it:

  fedlp run runs/quickstart-1 --resume

Two processes, on one host or on two; both get the same configuration:

  fedlp run configs/mnist.yaml --coordinator 10.0.0.1:1234 --num-processes 2 --process-id 0

  fedlp run configs/mnist.yaml --coordinator 10.0.0.1:1234 --num-processes 2 --process-id 1
"""
_several = partial(typer.Option, rich_help_panel="Several processes and hosts")
Coordinator = Annotated[
    str | None,
    _several(
        metavar="HOST:PORT",
        help="The address of process 0, and a free port there. Start the same command once per "
        "process, with the same configuration; the first process writes.",
    ),
]
NumProcesses = Annotated[int | None, _several(metavar="N", help="Number of processes.")]
ProcessId = Annotated[int | None, _several(metavar="I", help="This process, from 0 to N-1.")]
Distributed = Annotated[
    bool,
    _several(
        "--distributed",
        help="Let jax detect all three, on TPU pods, Slurm, Open MPI and Kubernetes.",
    ),
]
ConnectSeconds = Annotated[float, _several(metavar="S", help="How long to wait for the others.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in that directory.")]
Resume = Annotated[bool, typer.Option("--resume", help="Resume the run in that directory.")]
ProfiledRounds = Annotated[
    str | None,
    typer.Option(
        metavar="ROUNDS", help="Record rounds, such as 5-8, with JAX's profiler, in profile/."
    ),
]
_SECOND_SIGNAL = 1.0  # seconds after the first; GNU timeout sends two at once, which are one


def run(
    context: typer.Context,
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="A YAML file, or the name of an example; with --resume, a run directory.",
        ),
    ],
    out: Annotated[str | None, typer.Option(help="Run directory; default runs/NAME-N.")] = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    rounds: Annotated[str | None, typer.Option(help="Rounds to run.", metavar="N")] = None,
    cohort: Annotated[
        str | None, typer.Option(help="Clients of a round, or their share.", metavar="N")
    ] = None,
    seed: Annotated[str | None, typer.Option(help="Seed of the run.", metavar="N")] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the run; default that of the file.")
    ] = None,
    profile: ProfiledRounds = None,
    coordinator: Coordinator = None,
    num_processes: NumProcesses = None,
    process_id: ProcessId = None,
    distributed: Distributed = False,
    connect_seconds: ConnectSeconds = 120.0,
) -> None:
    """Train as a configuration says and write a run directory."""
    _join(coordinator, num_processes, process_id, distributed, connect_seconds)
    from fedlp_jax.cli.tables import result_table
    from fedlp_jax.config.experiment import Extras, execute
    from fedlp_jax.config.loading import split_words
    from fedlp_jax.config.resume import finished_rounds, resumed_run
    from fedlp_jax.execution import processes
    from fedlp_jax.reporting.tables import show

    options = {"rounds": rounds, "cohort": cohort, "seed": seed, "name": name}
    words = [f"--{field}={value}" for field, value in options.items() if value is not None]
    with processes.together():
        path, overrides = split_words([config, *context.args, *words])
        out = None if out is None else os.path.expanduser(out)
        if resume:
            path, out = resumed_run(path, out)
        loaded = load(path, overrides)
        done = finished_rounds(loaded, Path(out)) if resume and out else 0
    if not processes.is_first():
        warnings.simplefilter("ignore")  # the first process shows them
    done = max(map(int, processes.gather(str(done))))
    if done:
        if processes.is_first():
            typer.echo(f"{out} is finished: its {done} rounds are done.")
        return
    settings: dict[str, Any] = {"overwrite": overwrite, "resume": resume}
    settings["extras"] = Extras(profile=profile)
    with stop_signals() as stop:
        outcome = execute(loaded, out, **settings, progress=True, stop=stop)
        if processes.is_first():
            show(result_table(outcome.summary, outcome.directory))


def load(path: str, overrides: Mapping[str, Any], every_device: bool = False) -> Config:
    """Reads the configuration, then sets up jax, before its first use."""
    from fedlp_jax.config.loading import load_config, located
    from fedlp_jax.config.own import search

    search(located(path).parent)
    config = load_config(path, overrides)
    prepare(path, None if every_device else config.plan.devices)
    return config


def prepare(path: str, devices: int | None) -> None:
    """Sets up jax for the configuration that was read from `path`; None = every CPU device.

    Raises:
      FedLPError: a module that the configuration names has used jax.
    """
    from fedlp_jax.errors import FedLPError
    from fedlp_jax.execution.plan import setup

    try:
        setup(cpu_devices=devices)
    except FedLPError as error:
        raise FedLPError(
            f"a module that {path} names uses jax while it is imported, before its devices are "
            "set; move that into a function."
        ) from error


def _join(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    distributed: bool,
    seconds: float,
) -> None:
    """Connects this process to others, if an option asks for it.

    Raises:
      FedLPError: the options contradict each other, or jax cannot connect.
    """
    if not distributed and coordinator is num_processes is process_id is None:
        return
    from fedlp_jax.errors import FedLPError
    from fedlp_jax.execution.processes import connect

    if distributed and not (coordinator is num_processes is process_id is None):
        raise FedLPError(
            "--distributed detects coordinator and processes itself; omit it, or omit "
            "--coordinator, --num-processes and --process-id."
        )
    print(f"fedlp: waiting up to {seconds:g} s for the other processes", file=sys.stderr)
    connect(coordinator, num_processes, process_id, seconds=seconds)


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns True after Ctrl-C or SIGTERM; a second one exits at once."""
    signals: list[float] = []

    def handle(*_: object) -> None:
        signals.append(time.monotonic())
        if len(signals) == 1:
            print("fedlp: stopping after the round in flight; again: at once.", file=sys.stderr)
        elif signals[-1] - signals[0] >= _SECOND_SIGNAL:
            print("\x1b[?25h" * sys.stderr.isatty() + "fedlp: stopped at once.", file=sys.stderr)
            os._exit(130)

    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    handled = [s for s, handler in before.items() if handler != signal.SIG_IGN]  # nohup ignores one
    for number in handled:
        signal.signal(number, handle)
    try:
        yield lambda: bool(signals)
    finally:
        for number in handled:
            signal.signal(number, before[number])
