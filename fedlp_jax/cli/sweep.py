"""`fedlp sweep`."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from fedlp_jax.cli.options import ConfigFile

EXAMPLES = """
Examples:

  fedlp sweep configs/quickstart.yaml --grid algorithm.keep=0.1,0.5,1 --seeds 5 --out sweeps/keep

  fedlp sweep configs/quickstart.yaml --grid algorithm.keep=0.3,0.7 --grid partition.clients=50,100
  --rounds 20 --out sweeps/two

The grid may stand in the file, as its section sweep:

  sweep: {grid: {algorithm.keep: [0.1, 0.5, 1]}, seeds: 5}

Ctrl-C or a kill costs no run that has ended; this continues:

  fedlp sweep configs/quickstart.yaml --grid algorithm.keep=0.1,0.5,1 --seeds 5 --out sweeps/keep
  --resume
"""
_SECONDS_BETWEEN_LINES = 10.0


def sweep(
    context: typer.Context,
    config: ConfigFile,
    out: Annotated[str, typer.Option(help="Directory of the sweep.", metavar="DIR")],
    grid: Annotated[
        list[str] | None,
        typer.Option(help="A field and its values; repeat it for more.", metavar="FIELD=V1,V2"),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Seeds of each point, from the run's on.", metavar="N", min=1)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the sweep in that directory.")
    ] = False,
) -> None:
    """Run a grid of settings with several seeds, many runs in one program; table and plots."""
    from fedlp_jax.cli.run import prepare, stop_signals
    from fedlp_jax.config.loading import located, split_words
    from fedlp_jax.config.own import search
    from fedlp_jax.config.sweep import (
        TABLE,
        execute_sweep,
        parse_grid,
        remaining,
        sweep_points,
    )

    path, overrides = split_words([config, *context.args])
    search(located(path).parent)
    points = sweep_points(path, overrides, parse_grid(grid or ()), seeds)
    devices = [one.plan.devices for _, one in points]
    prepare(path, None if None in devices else max(devices))
    todo = [one for _, one in (remaining(points, out) if resume else points)]
    rounds = sum(one.rounds for one in todo)
    with stop_signals() as stop, SweepProgress(len(todo), rounds) as shown:
        outcome = execute_sweep(points, out, resume=resume, log=shown.update, stop=stop)
    typer.echo(outcome.table)
    for one in outcome.diverged:
        typer.echo(f"{one} diverged; its metrics end there.")
    typer.echo(f"\n{len(outcome.runs)} runs in {outcome.directory}; {TABLE} there has this table.")
    typer.echo(f"Curves in plots/; more with: fedlp report {shlex.quote(str(outcome.directory))}")


class SweepProgress:
    """Shows runs and rounds as they end, on stderr: a bar on a terminal, lines elsewhere."""

    def __init__(self, runs: int, rounds: int):
        """Prepares for so many runs, and rounds of all of them together."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._runs, self._rounds = runs, rounds
        self._done: dict[tuple[str, int], int] = {}
        self._console = Console(stderr=True)
        self._line_at = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task(f"compiling for {runs} runs", total=rounds)

    def __enter__(self) -> SweepProgress:
        if self._console.is_terminal:
            self._bar.start()
        elif self._runs:
            self._line(f"compiling for {self._runs} runs of {self._rounds} rounds in all ...")
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def update(self, label: str, seed: int, row: Mapping[str, Any]) -> None:
        """Shows one more round of a run."""
        self._done[label, seed] = int(row["round"])
        total = sum(self._done.values())
        words = f"{len(self._done)} of {self._runs} runs begun, {total}/{self._rounds} rounds"
        self._bar.update(self._task, completed=total, description=words)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._line_at >= _SECONDS_BETWEEN_LINES:
            from fedlp_jax.reporting.progress import duration

            self._line_at = now
            left = self._bar.tasks[self._task].time_remaining
            self._line(f"{words}{f'  {duration(left)} left' if left else ''}")

    def _line(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)
