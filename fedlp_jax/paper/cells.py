"""A directory of cells: their status, an estimate of the rest, and running it.

    DIR/cells/ROW-SPLIT-seedS/    a run directory per cell

A cell is recognised by its configuration, however it was run: `fedlp run
configs/paper/homo-0.5-iid.yaml --out DIR/cells/homo-0.5-iid-seed25` makes one too. A finished cell
never runs again, so the same command resumes after any interruption.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fedlp_jax.config.build import build, build_partition
from fedlp_jax.config.experiment import execute
from fedlp_jax.config.resume import refuse_other_run
from fedlp_jax.config.schema import Config
from fedlp_jax.errors import FedLPError, why
from fedlp_jax.paper.costs import row_cost
from fedlp_jax.paper.published import ROWS, SPLITS, Cell, cell_config
from fedlp_jax.reporting.progress import duration
from fedlp_jax.reporting.run_directory import METRICS, SUMMARY, read_metrics
from fedlp_jax.simulation.cohorts import cohort_size
from fedlp_jax.simulation.loop import simulate
from fedlp_jax.simulation.result import DivergedError

Status = Literal["done", "diverged", "unfinished"]

_NAME = re.compile(rf"({'|'.join(map(re.escape, ROWS))})-({'|'.join(SPLITS)})-seed(\d+)")
_STEPS = 3  # local steps that `estimate` measures


class Study(NamedTuple):
    """Cells of one scale in one directory."""

    out: Path
    scale: str = "paper"
    rounds: int | None = None  # None = those of the scale

    def config(self, cell: Cell) -> Config:
        """The configuration of a cell in this study."""
        return cell_config(cell, self.scale, self.rounds)

    def path(self, cell: Cell) -> Path:
        """The run directory of a cell."""
        return self.out / "cells" / cell.name


class CellRun(NamedTuple):
    """The run of one cell, as its directory holds it."""

    status: Status
    rounds: int  # done
    rows: list[dict[str, Any]]  # of metrics.jsonl, if the run has ended
    summary: dict[str, Any]


class Estimate(NamedTuple):
    """What a cell is expected to take."""

    upload_megabytes: float  # of all clients and rounds
    training_macs: float
    seconds: float


def read_cells(study: Study) -> dict[Cell, CellRun]:
    """Reads all cells in a study's directory.

    Raises:
      FedLPError: a cell was run with another configuration, such as another scale.
    """
    runs: dict[Cell, CellRun] = {}
    for path in sorted((study.out / "cells").glob("*")):
        name = _NAME.fullmatch(path.name)
        if name and (path / METRICS).is_file():
            cell = Cell(name[1], name[2], int(name[3]))
            runs[cell] = _read_cell(study, cell)
    return runs


def unfinished(study: Study, cells: Sequence[Cell]) -> list[Cell]:
    """The cells that have not ended; raises as `read_cells` does."""
    runs = read_cells(study)
    return [cell for cell in cells if cell not in runs or runs[cell].status == "unfinished"]


def run_cells(
    study: Study,
    cells: Sequence[Cell],
    *,
    progress: bool | None = None,
    say: Callable[[str], None] = lambda line: None,
    stop: Callable[[], bool] | None = None,
) -> Iterator[Cell]:
    """Runs the cells that have not ended, and yields each once it has.

    Args:
      study: directory and scale.
      cells: to run, in this order.
      progress: as in `experiment.execute`.
      say: called with a line when a cell begins: its name and the expected time left.
      stop: as in `experiment.execute`.

    Raises:
      FedLPError: the directory holds another study, another process runs one of these cells, or the
        data cannot be read.
    """
    todo = unfinished(study, cells)
    started = time.perf_counter()
    for ran, cell in enumerate(todo):
        done = len(cells) - len(todo) + ran
        each = (time.perf_counter() - started) / max(ran, 1)
        eta = f", about {duration(each * (len(todo) - ran))} left" if ran else ""
        say(f"cell {done + 1} of {len(cells)}: {cell.name}{eta}")
        path = study.path(cell)
        try:
            execute(study.config(cell), path, resume=path.exists(), progress=progress, stop=stop)
        except DivergedError as error:  # and would again, so it is not repeated
            say(f"{cell.name} diverged: {error}")
        except BaseException as error:
            error.add_note(
                f"{done} of {len(cells)} cells are done. The same command resumes {cell.name} from "
                "its last checkpoint."
            )
            raise
        yield cell


def estimate(study: Study, cells: Sequence[Cell]) -> dict[Cell, Estimate]:
    """Estimates traffic, computation and time of cells.

    Traffic and computation are modelled. Time is measured on a few local steps of FedAvg and one
    evaluation, and scaled by modelled multiply-accumulates; it excludes compilation, and shallow
    submodels take longer than it says.

    Raises:
      FedLPError: the data cannot be read.
    """
    config = study.config(Cell("fedavg", "iid"))
    local = config.algorithm.model_copy(update={"epochs": None, "steps": _STEPS})
    arguments = build(config.model_copy(update={"algorithm": local}))
    rows = simulate(
        **arguments | {"rounds": 3, "eval_every": None}, progress="estimate"
    ).history.rows
    training, evaluation = rows[1]["seconds"], rows[2]["seconds"] - rows[1]["seconds"]
    data = arguments["data"]
    shape = data.train.inputs.shape[1:]

    def macs_per_image(row: str) -> float:
        cost = row_cost(row, shape)
        return 1e6 * (cost.comp_mmacs + cost.backward_mmacs)

    size = cohort_size(config.cohort, arguments["clients"].clients)
    measured_macs = size * _STEPS * local.batch_size * macs_per_image("fedavg")
    estimates = {}
    for cell in cells:
        own = study.config(cell)
        clients = build_partition(own, data)
        visits = own.rounds * size
        images = visits * float(clients.sizes.mean()) * (own.algorithm.epochs or 1)
        macs = images * macs_per_image(cell.row)
        seconds = training * macs / measured_macs + own.rounds * max(evaluation, 0.0)
        upload = visits * row_cost(cell.row, shape).upload_bytes / 1e6
        estimates[cell] = Estimate(upload, macs, seconds)
    return estimates


def _read_cell(study: Study, cell: Cell) -> CellRun:
    path = study.path(cell)
    refuse_other_run(study.config(cell), path, may_differ=("name", "plan", "checkpoint"))
    summary_file = path / SUMMARY
    try:
        summary = json.loads(summary_file.read_text("utf-8")) if summary_file.is_file() else {}
        if summary.get("status") in ("done", "diverged"):
            rows = read_metrics(path)
            return CellRun(summary["status"], len(rows), rows, summary)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise FedLPError(
            f"{path} has a {SUMMARY} or {METRICS} that cannot be read: {why(error)}. Remove the "
            "directory, and the same command runs that cell again."
        ) from error
    lines = (path / METRICS).read_text("utf-8", errors="replace").count("\n")
    return CellRun("unfinished", lines, [], summary)
