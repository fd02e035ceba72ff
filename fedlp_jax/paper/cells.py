"""A directory of cells: their status, an estimate of the rest, and running it.

    DIR/cells/ROW-SPLIT-DRAWS-seedS/         a run directory per cell
    DIR/cells/ROW-SPLIT-DRAWS-seedS@WHERE/   the same cell, run elsewhere

A cell is recognised by its directory's name and its configuration, however it was run: `fedlp run
configs/paper/homo-0.5-iid.yaml --out DIR/cells/homo-0.5-iid-reference-seed25` makes one too. So
directories of several machines are merged by copying. A cell that has run for fewer rounds than
the study's counts for those it has. A finished cell never runs again, so the same command resumes
after any interruption.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from pydantic import Field

from fedlp_jax.config.build import build, build_partition
from fedlp_jax.config.experiment import execute
from fedlp_jax.config.loading import load_config
from fedlp_jax.config.resume import identity
from fedlp_jax.config.schema import Config, Data, Text
from fedlp_jax.config.sweep import Log, execute_runs
from fedlp_jax.data.loading import Dataset, load
from fedlp_jax.errors import FedLPError, why
from fedlp_jax.paper.costs import row_cost
from fedlp_jax.paper.published import DRAWS, ROWS, SPLITS, Cell, Draws, cell_config
from fedlp_jax.reporting.environment import origin, versions
from fedlp_jax.reporting.progress import duration
from fedlp_jax.reporting.run_directory import CONFIG, METRICS, SUMMARY, read_metrics
from fedlp_jax.simulation.cohorts import cohort_size
from fedlp_jax.simulation.loop import simulate
from fedlp_jax.simulation.result import DivergedError
from fedlp_jax.simulation.snapshot import refuse_other

Status = Literal["done", "diverged", "unfinished"]

ORIGIN = "origin.json"  # device, versions and commit that a cell's summary does not have
_NAME = re.compile(
    rf"({'|'.join(map(re.escape, ROWS))})-({'|'.join(SPLITS)})-({'|'.join(DRAWS)})-seed(\d+)"
    r"(?:@[\w.-]+)?"
)
_VERSION = re.compile(r"^# fedlp_jax (\S+)$", re.MULTILINE)  # in the config.yaml of a run
_NUMBERS = ("round", "test_accuracy", "upload_bytes", "seconds")  # of a row, for the table
_MAY_DIFFER = ("name", "rounds", "sinks", "plan", "checkpoint")
_STEPS = 3  # local steps that `estimate` measures
# `Dataset.hash` of what may come from a file. Other images or another order is another study.
_SHA256 = {"cifar10": "016371612be976197eeaa1bd2e25e13cc9bedc98b13d12e30cfc972d1a231e39"}


class _FromFile(Data):
    """A data set that is read from a file of it. A run is the same without the file."""

    file: Text = Field(exclude=True)

    def build(self, **arguments: Any) -> Dataset:
        """Reads the file."""
        return dataclasses.replace(load(self.file), name=self.name)


class Study(NamedTuple):
    """Cells of one scale in one directory."""

    out: Path
    scale: str = "paper"
    rounds: int | None = None  # None = those of the scale
    data: str | None = None  # an .npz file of the same examples; None = the data set by its name

    def config(self, cell: Cell) -> Config:
        """The configuration of a cell in this study.

        Raises:
          FedLPError: as `cell_config`, or a file for a scale that needs none.
        """
        config = cell_config(cell, self.scale, self.rounds)
        if self.data is None:
            return config
        if config.data.name not in _SHA256:
            raise FedLPError(
                f"scale {self.scale} has its data, the embedded {config.data.name}; omit --data."
            )
        return config.model_copy(update={"data": _FromFile(name=config.data.name, file=self.data)})

    def path(self, cell: Cell) -> Path:
        """The run directory of a cell."""
        return self.out / "cells" / cell.name


class CellRun(NamedTuple):
    """A run of one cell, as its directory holds it."""

    path: Path
    status: Status
    rounds: int  # done
    rows: list[dict[str, Any]]  # of metrics.jsonl
    summary: dict[str, Any]  # and what its origin.json adds


class Estimate(NamedTuple):
    """What a cell is expected to take."""

    upload_megabytes: float  # of all clients and rounds
    training_macs: float
    seconds: float


def read_runs(study: Study) -> dict[Cell, list[CellRun]]:
    """Reads all cells in a study's directory; of several runs of one cell the longest is first.

    Raises:
      FedLPError: a cell was run with another configuration, such as another scale, for more rounds
        than the study's; or its files cannot be read.
    """
    runs: dict[Cell, list[CellRun]] = {}
    for path in sorted((study.out / "cells").glob("*")):
        name = _NAME.fullmatch(path.name)
        if name and (path / METRICS).is_file():
            cell = Cell(name[1], name[2], int(name[4]), cast(Draws, name[3]))
            runs.setdefault(cell, []).append(_read_run(study, cell, path))
    return {cell: sorted(several, key=lambda run: -run.rounds) for cell, several in runs.items()}


def read_cells(study: Study) -> dict[Cell, CellRun]:
    """The longest run of each cell in a study's directory; raises as `read_runs` does."""
    return {cell: runs[0] for cell, runs in read_runs(study).items()}


def unfinished(study: Study, cells: Sequence[Cell]) -> list[Cell]:
    """The cells that are still to run.

    Raises:
      FedLPError: as `read_runs`; or another version of this package has run a cell of the study.
    """
    runs = read_runs(study)
    for several in runs.values():
        for run in several:
            _refuse_other_version(run.path)
    return [cell for cell in cells if cell not in runs or runs[cell][0].status == "unfinished"]


def check_file(study: Study) -> None:
    """Reads the file of a study, if it names one, and refuses other examples than those it is for.

    Raises:
      FedLPError: it holds others, or cannot be read.
    """
    if study.data is None:
        return
    name, data = study.config(Cell("fedavg", "iid")).data.name, load(study.data)
    if data.hash != _SHA256[name]:
        raise FedLPError(
            f"{study.data} holds {data}, but not the images of {name} in their order; write it "
            f"from fl.load('{name}') with numpy.savez(path, train_inputs=..., ...)."
        )


def run_cells(
    study: Study,
    cells: Sequence[Cell],
    *,
    todo: Sequence[Cell] | None = None,
    progress: bool | None = None,
    say: Callable[[str], None] = lambda line: None,
    stop: Callable[[], bool] | None = None,
) -> Iterator[Cell]:
    """Runs the cells that have not ended, and yields each once it has.

    Args:
      study: directory and scale.
      cells: to run, in this order.
      todo: those that have not ended; None = `unfinished` is called.
      progress: as in `experiment.execute`.
      say: called with a line when a cell begins: its name and the expected time left.
      stop: as in `experiment.execute`.

    Raises:
      FedLPError: the directory holds another study, another process runs one of these cells, or the
        data cannot be read.
    """
    todo = unfinished(study, cells) if todo is None else todo
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


def run_cells_together(
    study: Study,
    cells: Sequence[Cell],
    *,
    todo: Sequence[Cell] | None = None,
    log: Log | None = None,
    stop: Callable[[], bool] | None = None,
) -> None:
    """Runs the cells that have not ended as a sweep: those of one structure are one program.

    Args:
      study: directory and scale.
      cells: to run.
      todo: as for `run_cells`.
      log: called with the name of a cell, its seed and each of its rows.
      stop: as in `experiment.execute`.

    Raises:
      FedLPError: as `run_cells`.
    """
    todo = unfinished(study, cells) if todo is None else todo
    runs = [(cell.name, study.config(cell), study.path(cell)) for cell in todo]
    execute_runs(runs, "The same command resumes the study.", resume=True, log=log, stop=stop)


def estimate(study: Study, cells: Sequence[Cell]) -> dict[Cell, Estimate]:
    """Estimates traffic, computation and time of cells.

    Traffic and computation are modelled. Time is measured on a few local steps of FedAvg and one
    evaluation, and scaled by modelled multiply-accumulates; it excludes compilation, and shallow
    submodels take longer than it says.

    Raises:
      FedLPError: the data cannot be read.
    """
    check_file(study)
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


def _read_run(study: Study, cell: Cell, path: Path) -> CellRun:
    _refuse_other_cell(study.config(cell), path)
    try:
        summary = _read_json(path / SUMMARY)
        told = {k: v for k, v in summary.items() if v is not None} | _read_json(path / ORIGIN)
        if summary.get("status") in ("done", "diverged"):
            rows = read_metrics(path)
            diverged = summary["status"] == "diverged"
            _check_content(() if diverged else rows, told)
            done = diverged or len(rows) >= study.config(cell).rounds
            return CellRun(path, summary["status"] if done else "unfinished", len(rows), rows, told)
        # The last line of a run that goes on may be half written.
        lines = (path / METRICS).read_bytes().split(b"\n")[:-1]
        rows = [json.loads(line) for line in lines]
        _check_content(rows, told)
    except (OSError, ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
        raise FedLPError(
            f"{path} has a {SUMMARY}, {ORIGIN} or {METRICS} that cannot be read: {why(error)}. "
            "Remove the directory, and the same command runs that cell again."
        ) from error
    return CellRun(path, "unfinished", len(rows), rows, told)


def _check_content(rows: Sequence[dict[str, Any]], told: dict[str, Any]) -> None:
    """Raises what a table would of rows without its numbers, or of an origin without its words."""
    for row in rows:
        for name in _NUMBERS:
            float(row[name])
    if told.get("versions"):
        origin({"commit": None, "device": None} | told)


def _read_json(path: Path) -> dict[str, Any]:
    """An object; empty if there is no file."""
    content = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return dict(content.items())


def _refuse_other_cell(config: Config, path: Path) -> None:
    """Compares a cell with the run in a directory, which may have fewer rounds or another plan.

    Raises:
      FedLPError: with each field that differs, and both values.
    """
    file = path / CONFIG
    # A run that was killed in its first moments leaves none, or an empty one.
    if not file.exists() or not file.stat().st_size:
        return
    theirs = load_config(file)
    may_differ = [one for one in _MAY_DIFFER if one != "rounds" or theirs.rounds <= config.rounds]
    old, new = (identity(_by_name(one), may_differ) for one in (theirs, config))
    refuse_other(old, new, f"{path} holds another run")


def _by_name(config: Config) -> Config:
    """With the name of its data set where it names a file of it, such as cifar10.npz."""
    if not config.data.name.endswith(".npz"):
        return config
    data = config.data.model_copy(update={"name": Path(config.data.name).stem})
    return config.model_copy(update={"data": data})


def _refuse_other_version(path: Path) -> None:
    """Refuses to add to a study whose cells another version of this package has run.

    Raises:
      FedLPError: with both versions.
    """
    file = path / CONFIG
    made = _VERSION.search(file.read_text("utf-8")) if file.exists() else None
    if made and made[1] != versions()["fedlp_jax"]:
        raise FedLPError(
            f"{path} was run by fedlp_jax {made[1]}, and this is {versions()['fedlp_jax']}; move "
            "it to a directory of its own, or use that version."
        )
