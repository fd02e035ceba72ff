"""Progress of a run on stderr: a live table with a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Column, Table

from fedlp_jax.reporting.metrics import headline, smaller_is_better

_SECONDS_BETWEEN_LINES = 10.0
_LINES = 10  # at least, per run, where there is no bar
_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARKS = 24  # columns of a sparkline


class Progress:
    """Shows each round as it ends. A context manager."""

    def __init__(
        self,
        rounds: int,
        name: str,
        show: bool | None = None,
        console: Console | None = None,
        done: Sequence[Mapping[str, Any]] = (),
        parameters: int | None = None,
    ):
        """Prepares the display of a run.

        Args:
          rounds: of the run.
          name: of the run.
          show: None = on a terminal only.
          console: to print to; None = stderr.
          done: rows of the rounds before, if the run is resumed.
          parameters: of the model, if known.
        """
        self._console = console or _stderr()
        self._show = self._console.is_terminal if show is None else show
        self._rounds, self._name, self._first = rounds, name, len(done) + 1
        self._model = "" if parameters is None else f" of a model of {parameters:,} parameters"
        self._uploaded = 0.0  # bytes
        self._test, self._tested = "", 0
        self._curves: dict[str, list[tuple[int, float]]] = {}  # metric -> rounds and values
        for row in done:
            self._count(row)
        self._bar = Bar(
            # Of a narrow line the name gives way, not the numbers.
            TextColumn("{task.description}", table_column=Column(overflow="fold")),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self._console,
            get_time=time.monotonic,
        )
        self._task = self._bar.add_task(name, total=rounds, completed=len(done), numbers="")
        self._line_round, self._line_at = len(done), self._bar.get_time()
        self._live = Live(console=self._console, get_renderable=self._view, refresh_per_second=4)

    def __enter__(self) -> Progress:
        """Says what is compiled; on a terminal, shows table and bar."""
        if self._show and self._rounds:
            which = "the first" if self._first == 1 else f"round {self._first}"
            self._line(f"compiling {which} of {self._rounds} rounds{self._model} ...")
        if self._show and self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Leaves the table and the bar where they are."""
        if self._live.is_started:
            self._live.stop()

    def update(self, row: Mapping[str, Any]) -> None:
        """Shows one more round, given as a row of `metrics.jsonl`."""
        round = int(row["round"])
        self._count(row)
        terminal = self._console.is_terminal  # whose table has the numbers
        self._bar.update(
            self._task, completed=round, numbers="" if terminal else self._numbers(row)
        )
        if not self._show or terminal:
            return
        now = self._bar.get_time()
        if (
            round in (self._first, self._rounds)
            or round - self._line_round >= self._rounds / _LINES
            or now - self._line_at >= _SECONDS_BETWEEN_LINES
        ):
            self._line_round, self._line_at = round, now
            left = self._bar.tasks[self._task].time_remaining
            eta = f"  {duration(left)} left" if left and round > self._first else ""
            self._line(f"round {round}/{self._rounds}  {self._numbers(row)}{eta}")

    def _count(self, row: Mapping[str, Any]) -> None:
        self._uploaded += row["upload_bytes"]
        key = headline(row)
        for metric in ("train_loss", key):
            if metric is not None and row.get(metric) is not None:
                self._curves.setdefault(metric, []).append((int(row["round"]), row[metric]))
        if key is not None:
            self._test = f"{key.removeprefix('test_').replace('_', ' ')} {row[key]:.4f}"
            self._tested = int(row["round"])

    def _view(self) -> Group:
        """The table of metrics, each with its course so far, above the bar."""
        table = Table.grid(padding=(0, 2))
        for metric, curve in self._curves.items():
            rounds, values = zip(*curve, strict=True)
            costs = np.asarray(values) * (1 if smaller_is_better(metric) else -1)
            best = int(np.argmin(np.where(np.isnan(costs), np.inf, costs)))
            table.add_row(
                metric.replace("_", " "),
                sparkline(values, _SPARKS if self._console.width >= 92 else _SPARKS // 2),
                f"{values[-1]:.4f}",
                f"best {values[best]:.4f} in round {rounds[best]}",
            )
        if self._curves:
            table.add_row("uploaded", "", f"{self._uploaded / 1e6:.1f} MB", "")
        return Group(table, self._bar.get_renderable())

    def _numbers(self, row: Mapping[str, Any]) -> str:
        loss = row.get("train_loss")
        # A test of an earlier round says so, since the loss next to it is newer.
        when = f" (round {self._tested})" if self._tested != row["round"] else ""
        parts = [
            f"loss {loss:.4f}" if loss is not None else "",
            self._test and self._test + when,
            f"{self._uploaded / 1e6:.1f} MB up",
        ]
        return "  ".join(filter(None, parts))

    def _line(self, text: str) -> None:
        _print(self._console, self._name, text)


def say(name: str, text: str) -> None:
    """Prints on stderr what a run does before its progress begins."""
    _print(_stderr(), name, text)


def _print(console: Console, name: str, text: str) -> None:
    console.print(f"{name}: {text}", markup=False, highlight=False, soft_wrap=True)


def _stderr() -> Console:
    """The console of stderr. A notebook, which calls itself a terminal, gets plain lines."""
    console = Console(stderr=True)
    if console.is_jupyter:
        return Console(stderr=True, force_jupyter=False, force_terminal=False)
    return console


def sparkline(values: Sequence[float], columns: int = _SPARKS) -> str:
    """A curve as a line of blocks, from its smallest to its greatest value; blank where NaN.

    Of more values than columns, each column is the mean of those that share it.
    """
    parts = np.array_split(np.asarray(values, float), min(len(values), columns) or 1)
    means = np.array([part.mean() if len(part) else np.nan for part in parts])
    finite = means[np.isfinite(means)]
    if not len(finite):
        return " " * len(values[:columns])
    low, span = finite.min(), np.ptp(finite) or 1.0
    level = np.where(np.isfinite(means), (means - low) / span * (len(_BLOCKS) - 1), -1.0)
    return "".join(_BLOCKS[round(x)] if x >= 0 else " " for x in level.tolist())


def duration(seconds: float) -> str:
    """`75.2` -> `1m15s`."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
