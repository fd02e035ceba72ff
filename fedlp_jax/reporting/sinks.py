"""Sinks: where the rows of a run go while it runs.

A sink is three functions, so one of your own takes ten lines. A sink that fails costs a warning and
is left out of the rest of the run, which continues.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fedlp_jax.errors import FedLPError, warn

Row = Mapping[str, Any]
Status = Literal["done", "interrupted", "failed"]


class Sink(NamedTuple):
    """Receives the rows of one run; in the first of several processes only."""

    name: str  # for messages
    write: Callable[[Row], None]  # each round's row, in order
    begin: Callable[[Mapping[str, Any]], None] = lambda settings: None  # before the first row
    end: Callable[[Status], None] = lambda status: None  # once, however the run ends


def tensorboard(directory: str | Path) -> Sink:
    """Writes every number of a row as a scalar, by round, for TensorBoard.

    Needs the extra `fedlp-jax[tensorboard]`.

    Args:
      directory: for the event file; several runs in one directory are shown together.

    Raises:
      FedLPError: tensorboardX is not installed.
    """
    module = _imported("tensorboardX", "tensorboard")
    writer: list[Any] = []

    def begin(settings: Mapping[str, Any]) -> None:
        writer.append(module.SummaryWriter(str(Path(directory).expanduser())))
        if settings:
            writer[0].add_text("settings", _indented(settings))

    def write(row: Row) -> None:
        for key, value in numbers(row).items():
            writer[0].add_scalar(key, value, row["round"])
        writer[0].flush()

    return Sink("tensorboard", write, begin, lambda status: writer[0].close())


def wandb(project: str, name: str | None = None, mode: str | None = None) -> Sink:
    """Logs every row to Weights & Biases.

    Needs the extra `fedlp-jax[wandb]`.

    Args:
      project: of W&B.
      name: of the run there; None = chosen there.
      mode: "online", "offline" or "disabled"; None = that of the environment (`WANDB_MODE`).

    Raises:
      FedLPError: wandb is not installed.
    """
    module = _imported("wandb", "wandb")
    run: list[Any] = []

    def begin(settings: Mapping[str, Any]) -> None:
        run.append(module.init(project=project, name=name, mode=mode, config=dict(settings)))

    def write(row: Row) -> None:
        run[0].log(numbers(row), step=row["round"])

    return Sink("wandb", write, begin, lambda status: run[0].finish(int(status == "failed")))


def numbers(row: Row) -> dict[str, float]:
    """The entries of a row that are numbers, but for the round."""
    return {
        key: float(value)
        for key, value in row.items()
        if key != "round" and isinstance(value, int | float) and not isinstance(value, bool)
    }


@contextlib.contextmanager
def opened(
    sinks: Sequence[Sink], settings: Mapping[str, Any]
) -> Iterator[list[Callable[[Row], None]]]:
    """Begins sinks, yields their `write` functions, and ends them however the run ends.

    Args:
      sinks: of one run.
      settings: what the sinks are told of the run.
    """
    guarded = [_Guarded(sink) for sink in sinks]
    for sink in guarded:
        sink.call("begin", settings)
    status: Status = "failed"
    try:
        yield [sink.write for sink in guarded]
        status = "done"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        for sink in guarded:
            sink.call("end", status)


@dataclasses.dataclass
class _Guarded:
    """A sink that may fail without harm."""

    sink: Sink
    works: bool = True

    def write(self, row: Row) -> None:
        self.call("write", row)

    def call(self, function: str, argument: Any) -> None:
        if not self.works:
            return
        try:
            getattr(self.sink, function)(argument)
        except Exception as error:
            self.works = False
            kind = type(error).__name__
            warn(
                f"the sink '{self.sink.name}' failed and gets no more of this run, which "
                f"continues: {kind}: {error}"
            )


def _indented(settings: Mapping[str, Any]) -> str:
    """Settings as TensorBoard shows code: Markdown, each line indented."""
    text = json.dumps(settings, indent=2, default=str)
    return "\n".join(f"    {line}" for line in text.splitlines())


def _imported(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise FedLPError(f"this sink needs {module}: pip install 'fedlp-jax[{extra}]'.") from error
