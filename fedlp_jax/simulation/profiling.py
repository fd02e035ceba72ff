"""Trace: JAX's profiler over some rounds of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax

from fedlp_jax.errors import FedLPError, check_number, shown, why


@dataclasses.dataclass(frozen=True)
class Trace:
    """Which rounds the profiler records, and where; Perfetto and TensorBoard show the file.

    The first round after compilation is slower than the others, so begin with a later one. The host
    waits for the rounds before and for the last one, which the seconds of these rounds show.

    Attributes:
      directory: for the trace; the profiler makes subdirectories by time.
      first: the first round that is recorded.
      last: the last one; None = `first` alone.
    """

    directory: str | Path
    first: int
    last: int | None = None

    def __post_init__(self) -> None:
        check_number("profile.first", self.first, ge=1, integer=True)
        if self.last is not None:
            check_number("profile.last", self.last, ge=self.first, integer=True)

    @property
    def end(self) -> int:
        """The last round that is recorded."""
        return self.first if self.last is None else self.last


def rounds_of(text: str) -> tuple[int, int]:
    """The rounds that `7` or `5-8` names.

    Raises:
      FedLPError: other text.
    """
    first, dash, last = text.partition("-")
    if not (first.isdecimal() and (last.isdecimal() if dash else not last)):
        raise FedLPError(
            f"profile={shown(text)} must be a round, or two with a dash, as in --profile 5-8."
        )
    return int(first), int(last or first)


class Recorder:
    """The profiler beside the loop over rounds. A context manager; it stops with the loop."""

    def __init__(self, trace: Trace | None, first: int, last: int):
        """Prepares for rounds `first` to `last`.

        Raises:
          FedLPError: the rounds to record are not among them.
        """
        if trace is not None and not first <= trace.first <= trace.end <= last:
            raise FedLPError(
                f"rounds {trace.first} to {trace.end} cannot be profiled: the run has rounds "
                f"{first} to {last}."
            )
        self._trace, self._records = trace, False

    def __enter__(self) -> Recorder:
        """Waits for the first round to record."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the recording if the run ends within it."""
        self._stop()

    def rounds_left(self, round: int) -> int:
        """How many rounds from this one on may share a dispatch: it ends where a recording does."""
        if self._trace is None or round > self._trace.end:
            return 2**31
        edge = self._trace.first - 1 if round < self._trace.first else self._trace.end
        return edge - round + 1

    def before(self, round: int, wait: Callable[[], None]) -> None:
        """Starts to record, if this round is the first to be; waits for those before it.

        Raises:
          FedLPError: the profiler cannot start.
        """
        if self._trace is None or round != self._trace.first:
            return
        wait()
        try:
            jax.profiler.start_trace(str(Path(self._trace.directory).expanduser()))
        except (OSError, RuntimeError) as error:
            raise FedLPError(f"the profiler cannot start: {why(error)}.") from error
        self._records = True

    def after(self, round: int, wait: Callable[[], None]) -> None:
        """Writes the trace, if this round was the last to record."""
        if self._records and self._trace is not None and round >= self._trace.end:
            wait()
            self._stop()

    def _stop(self) -> None:
        if self._records:
            self._records = False
            jax.profiler.stop_trace()
