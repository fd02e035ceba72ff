"""A directory of cells: which of them are done, and running those that are not.

    DIR/cells/ROW-SPLIT-seedS/    a run directory for each cell

A cell is known by its configuration, whoever ran it: `fedlp run configs/paper/homo-0.5-iid.yaml
--out DIR/cells/homo-0.5-iid-seed25` makes one as well. What has ended is never run again, so the
same command goes on after any interruption.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fedlp_jax.config.experiment import execute
from fedlp_jax.config.schema import Config, load_config
from fedlp_jax.data.files import read_plain
from fedlp_jax.errors import FedLPError, why
from fedlp_jax.paper.published import ROWS, SPLITS, Cell, cell_config
from fedlp_jax.reporting.progress import duration
from fedlp_jax.reporting.run_directory import CONFIG, METRICS, SUMMARY, read_metrics
from fedlp_jax.simulation.result import DivergedError

Status = Literal["done", "diverged", "unfinished"]

_NAME = re.compile(rf"({'|'.join(map(re.escape, ROWS))})-({'|'.join(SPLITS)})-seed(\d+)")


class Study(NamedTuple):
    """Cells of one scale in one directory."""

    out: Path
    scale: str = "paper"
    rounds: int | None = None  # None = those of the scale

    def config(self, cell: Cell) -> Config:
        """What a cell of this study runs."""
        return cell_config(cell, self.scale, self.rounds)

    def path(self, cell: Cell) -> Path:
        """Where it is written."""
        return self.out / "cells" / cell.name


class Found(NamedTuple):
    """A cell that a directory holds."""

    status: Status
    rounds: int  # done
    rows: list[dict[str, Any]]  # of metrics.jsonl, if it has ended
    summary: dict[str, Any]


def survey(study: Study) -> dict[Cell, Found]:
    """All cells that a study's directory holds, also those that nobody asks for now.

    Raises:
      FedLPError: one of them was run with another configuration, as another scale.
    """
    found: dict[Cell, Found] = {}
    for path in sorted((study.out / "cells").glob("*")):
        name = _NAME.fullmatch(path.name)
        if name and (path / METRICS).is_file():
            cell = Cell(name[1], name[2], int(name[3]))
            found[cell] = _found(study, cell)
    return found


def remaining(study: Study, cells: Sequence[Cell]) -> list[Cell]:
    """Those of some cells that have not ended; raises as `survey` does."""
    held = survey(study)
    return [cell for cell in cells if cell not in held or held[cell].status == "unfinished"]


def run_cells(
    study: Study,
    cells: Sequence[Cell],
    *,
    progress: bool | None = None,
    say: Callable[[str], None] = lambda line: None,
    stop: Callable[[], bool] | None = None,
) -> Iterator[Cell]:
    """Runs the cells that have not ended, and yields each after it has.

    Args:
      study: where, and at which scale.
      cells: which, in this order.
      progress: of the rounds within a cell, as in `experiment.execute`.
      say: is told which cell begins and how long the rest may take.
      stop: asked before every round; once it is true the cell is saved, and a KeyboardInterrupt
        ends the study.

    Raises:
      FedLPError: the directory holds other cells, another process runs one of these now, or the
        data cannot be read.
    """
    left = remaining(study, cells)
    before, seconds = len(cells) - len(left), 0.0
    for ran, cell in enumerate(left):
        done, still = before + ran, ""
        if ran:
            still = f", about {duration(seconds / ran * (len(left) - ran))} left"
        say(f"cell {done + 1} of {len(cells)}: {cell.name}{still}")
        started = time.perf_counter()
        try:
            _run(study, cell, progress, say, stop)
        except BaseException as error:
            error.add_note(
                f"{done} of {len(cells)} cells are done. The same command goes on with "
                f"{cell.name}, from its last checkpoint."
            )
            raise
        seconds += time.perf_counter() - started
        yield cell


def _run(
    study: Study,
    cell: Cell,
    progress: bool | None,
    say: Callable[[str], None],
    stop: Callable[[], bool] | None,
) -> None:
    """Runs one cell, from the last checkpoint that an interrupted run has left of it."""
    path = study.path(cell)
    try:
        execute(study.config(cell), path, resume=path.exists(), progress=progress, stop=stop)
    except DivergedError as error:
        # It would diverge again: a run is a function of its configuration.
        say(f"{cell.name} diverged: {error}")


def _found(study: Study, cell: Cell) -> Found:
    path = study.path(cell)
    settings, summary_file = path / CONFIG, path / SUMMARY
    # Both are missing for a moment, in which a run may have been killed.
    if settings.is_file() and settings.stat().st_size:
        _check_same(load_config(settings), study.config(cell), path)
    try:
        summary = dict(json.loads(read_plain(summary_file))) if summary_file.is_file() else {}
        if summary.get("status") in ("done", "diverged"):
            rows = read_metrics(path)
            return Found(summary["status"], len(rows), rows, summary)
    except Exception as error:  # what is no such JSON can raise almost anything
        raise FedLPError(
            f"{path} has a {SUMMARY} or {METRICS} that cannot be read: {why(error)}. Remove the "
            "directory, and the same command runs that cell again."
        ) from error
    lines = (path / METRICS).read_text("utf-8", errors="replace").count("\n")
    return Found("unfinished", lines, [], summary)


def _check_same(there: Config, wanted: Config, path: Path) -> None:
    old, new = _settings(there), _settings(wanted)
    for field in sorted(set(old) | set(new)):
        if old.get(field) != new.get(field):
            raise FedLPError(
                f"{path} holds another run: {field} is {old.get(field)!r} there and "
                f"{new.get(field)!r} here. Choose another --out, or the --scale and --rounds of "
                "that run."
            )


def _settings(config: Config) -> dict[str, Any]:
    """Dotted field -> value, of all that decides a result."""
    raw = config.model_dump(
        exclude={"name": True, "plan": True, "checkpoint": True, "data": {"data_dir"}}
    )

    def flat(section: dict[str, Any], before: str) -> Iterator[tuple[str, Any]]:
        for key, value in section.items():
            if isinstance(value, dict) and value:
                yield from flat(value, f"{before}{key}.")
            else:
                yield before + key, value

    return dict(flat(raw, ""))
