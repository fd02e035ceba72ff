"""`fedlp run` as one of several processes: its options, how it joins the others, how it leaves."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer

_PANEL = "Several processes and hosts"
Coordinator = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Where process 0 is, and a free port there. Start the same command once a process, "
        "with the same configuration; the first one writes.",
        rich_help_panel=_PANEL,
    ),
]
NumProcesses = Annotated[
    int | None, typer.Option(metavar="N", help="How many there are.", rich_help_panel=_PANEL)
]
ProcessId = Annotated[
    int | None,
    typer.Option(metavar="I", help="Which this is, from 0 to N-1.", rich_help_panel=_PANEL),
]
Distributed = Annotated[
    bool,
    typer.Option(
        "--distributed",
        help="Find all three as jax does: on TPU pods, Slurm, Open MPI and Kubernetes.",
        rich_help_panel=_PANEL,
    ),
]
ConnectSeconds = Annotated[
    float, typer.Option(metavar="S", help="How long to wait for others.", rich_help_panel=_PANEL)
]


def join(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    distributed: bool,
    seconds: float,
) -> None:
    """Makes this process one of several, if any option says so.

    Raises:
      FedLPError: the options contradict each other, or the others are not there.
    """
    if not distributed and coordinator is num_processes is process_id is None:
        return
    from fedlp_jax.errors import FedLPError
    from fedlp_jax.execution.connection import connect
    from fedlp_jax.execution.processes import is_first

    if distributed and not (coordinator is num_processes is process_id is None):
        raise FedLPError(
            "--distributed finds coordinator and processes itself; leave it away, or leave away "
            "--coordinator, --num-processes and --process-id."
        )
    connect(coordinator, num_processes, process_id, seconds=seconds)
    if not is_first():
        warnings.simplefilter("ignore")  # the first one says them


def leave(code: int) -> None:
    """Leaves the other processes, with the exit code of this one; nothing if there are none."""
    if "fedlp_jax.execution.connection" not in sys.modules:
        return
    from fedlp_jax.execution.connection import part

    part(code)


def end(code: int) -> None:
    """Ends this process without Python's own clean-up."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
