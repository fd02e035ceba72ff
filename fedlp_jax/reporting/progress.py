"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere, on stderr."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

_SECONDS_BETWEEN_LINES = 10.0
_LINES = 10  # at least so many lines a run, where there is no bar


class Progress:
    """Shows rounds as they end: a bar on a terminal, plain lines elsewhere. A context manager."""

    def __init__(
        self,
        rounds: int,
        name: str,
        wanted: bool | None = None,
        console: Console | None = None,
        done: Sequence[Mapping[str, Any]] = (),
    ):
        """Prepares to show a run.

        Args:
          rounds: how many the run has.
          name: of the run.
          wanted: None = on a terminal only.
          console: where; None = stderr.
          done: the rows of the rounds before, if the run is resumed.
        """
        self._console = console or Console(stderr=True)
        self._wanted = self._console.is_terminal if wanted is None else wanted
        self._rounds, self._name = rounds, name
        self._uploaded = 0.0  # bytes
        self._accuracy, self._tested = "", 0
        for row in done:
            self._count(row)
        self._first = len(done) + 1
        self._shown, self._shown_at = len(done), time.monotonic()
        self._first_at = self._shown_at
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self._console,
        )
        self._task = self._bar.add_task(
            name, total=rounds, completed=len(done), numbers="loading and compiling ..."
        )

    def __enter__(self) -> Progress:
        """Starts showing."""
        if self._wanted and self._console.is_terminal:
            self._bar.start()
        elif self._wanted and self._rounds:
            which = "the first" if self._first == 1 else f"round {self._first}"
            self._line(f"{self._name}: compiling {which} of {self._rounds} rounds ...")
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends showing."""
        if self._console.is_terminal:
            self._bar.stop()

    def update(self, row: Mapping[str, Any]) -> None:
        """Shows one more round, a row of `metrics.jsonl`."""
        now, round = time.monotonic(), int(row["round"])
        if round == self._first:
            self._first_at = now
        self._count(row)
        if not self._wanted:
            return
        if self._console.is_terminal:
            self._bar.update(self._task, completed=round, numbers=self._numbers(row))
        elif self._due(round, now):
            self._shown, self._shown_at = round, now
            self._line(
                f"{self._name}: round {round}/{self._rounds}  {self._numbers(row)}"
                f"{self._remaining(round, now)}"
            )

    def _count(self, row: Mapping[str, Any]) -> None:
        self._uploaded += row["upload_bytes"]
        if row.get("test_accuracy") is not None:
            self._accuracy = f"accuracy {row['test_accuracy']:.4f}"
            self._tested = int(row["round"])

    def _due(self, round: int, now: float) -> bool:
        return (
            round in (self._first, self._rounds)
            or round - self._shown >= self._rounds / _LINES
            or now - self._shown_at >= _SECONDS_BETWEEN_LINES
        )

    def _numbers(self, row: Mapping[str, Any]) -> str:
        loss = row.get("train_loss")
        # An older accuracy says so: it is not that of the loss beside it.
        when = f" (round {self._tested})" if self._tested != row["round"] else ""
        parts = [
            f"loss {loss:.4f}" if loss is not None else "",
            self._accuracy and self._accuracy + when,
            f"{self._uploaded / 1e6:.1f} MB up",
        ]
        return "  ".join(filter(None, parts))

    def _remaining(self, round: int, now: float) -> str:
        if round <= self._first or round >= self._rounds:
            return ""
        # The first may hold what is done once.
        each = (now - self._first_at) / (round - self._first)
        return f"  {duration(each * (self._rounds - round))} left"

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """`75.2` -> `1m15s`."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
