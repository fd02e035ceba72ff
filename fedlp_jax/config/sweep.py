"""A configuration and a grid -> a run directory for each point and seed, and a table of them."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedlp_jax.config.build import build
from fedlp_jax.config.experiment import Record, note_failure, save_arrays, summarize
from fedlp_jax.config.loading import load_config, parse_value
from fedlp_jax.config.resume import finished_rounds, last_snapshot, run_checkpoint
from fedlp_jax.config.schema import Config
from fedlp_jax.data.files import replacing
from fedlp_jax.errors import FedLPError, collecting, shown
from fedlp_jax.execution import processes
from fedlp_jax.reporting.compare import Comparison, compare
from fedlp_jax.reporting.plots import draw_sweep
from fedlp_jax.reporting.run_directory import METRICS, PLOTS, SUMMARY, RunDirectory, read_metrics
from fedlp_jax.simulation.result import DivergedError, Result
from fedlp_jax.simulation.sweep import Point, run_points

RUNS, TABLE = "runs", "table.md"
_OWN = {  # sections and fields of the sweep, and their way out
    "seed": "it is given with --seeds",
    "name": "each point is named by its values",
    "sweep": "it is given with --grid and --seeds",
}
_WITHOUT = ("sinks", "keep_best")

# (label, seed, row of a round)
Log = Callable[[str, int, Mapping[str, Any]], None]


class SweepOutcome(NamedTuple):
    """A finished sweep."""

    directory: Path
    table: Comparison
    runs: list[Path]  # of every point and seed
    diverged: list[Path]  # of those without a finite model


def parse_grid(words: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """`["algorithm.keep=0.1,0.3"]` -> `{"algorithm.keep": (0.1, 0.3)}`; values are YAML.

    Raises:
      FedLPError: no field or no values, or a field twice.
    """
    grid: dict[str, tuple[Any, ...]] = {}
    for word in words:
        field, equals, values = word.partition("=")
        if not (field and equals):
            raise FedLPError(f"--grid {shown(word)} must be as in --grid algorithm.keep=0.1,0.3.")
        if field in grid:
            raise FedLPError(f"--grid names {field} twice; give all of its values at once.")
        grid[field] = tuple(parse_value(f"[{values}]"))
    return grid


def sweep_points(
    path: str | Path,
    overrides: Mapping[str, Any],
    grid: Mapping[str, Sequence[Any]],
    seeds: int | None = None,
) -> list[tuple[str, Config]]:
    """The configuration of each run, with the label of its point.

    Args:
      path: a YAML file, which may have a section `sweep`.
      overrides: dotted field -> value, for all points.
      grid: dotted field -> values, in addition to those of the file, or in their place.
      seeds: how many; None = as the file says.

    Raises:
      FedLPError: a field that is unknown or belongs to the sweep, a bad value, a value twice, a
        name beside a grid, sinks or a best model.
    """
    base = load_config(path, overrides)
    section = base.sweep
    fields = {**({} if section is None else section.grid), **grid}
    count = (1 if section is None else section.seeds) if seeds is None else seeds
    for field, values in fields.items():
        _check_field(field, values)
    if fields and "name" in overrides:
        raise FedLPError("the points of a grid are named by their values; omit --name.")
    points: list[tuple[str, Config]] = []
    for values in itertools.product(*fields.values()):
        point = dict(zip(fields, values, strict=True))
        label = _label(point) or base.name
        if any(label == other for other, _ in points):
            raise FedLPError(f"two points of the grid are called {label}; a value comes twice.")
        for seed in range(base.seed, base.seed + count):
            config = load_config(path, {**overrides, **point, "seed": seed, "name": label})
            _check_sections(config)
            points.append((label, config.model_copy(update={"sweep": None})))
    return points


def _check_field(field: str, values: Sequence[Any]) -> None:
    section = field.split(".")[0]
    if section in _OWN:
        raise FedLPError(f"the grid cannot have {field}; {_OWN[section]}.")
    if not values:
        raise FedLPError(f"the grid has no values of {field}; give some, or omit the field.")
    words = [shown(value) for value in values]
    twice = [word for word in words if words.count(word) > 1]
    if twice:
        raise FedLPError(f"the grid has {field}={twice[0]} twice; give each value once.")


def _check_sections(config: Config) -> None:
    for name in _WITHOUT:
        if getattr(config, name):
            raise FedLPError(f"a sweep has no {name}; omit the section, or use fedlp run.")


def _label(point: Mapping[str, Any]) -> str:
    """`"keep=0.1,alpha=1"`, with the last part of each field where that says which."""
    last = [field.split(".")[-1] for field in point]
    names = [x if last.count(x) == 1 else field for x, field in zip(last, point, strict=True)]
    return ",".join(f"{n}={_word(v)}" for n, v in zip(names, point.values(), strict=True))


def _word(value: Any) -> str:
    """A value within the name of a folder."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")[:60]


def remaining(points: Sequence[tuple[str, Config]], out: str | Path) -> list[tuple[str, Config]]:
    """The points whose runs in the directory of a sweep have not ended.

    Raises:
      FedLPError: the directory holds another run.
    """
    paths = _paths(points, Path(out).expanduser())
    return [
        point for point, path in zip(points, paths, strict=True) if not _has_ended(point[1], path)
    ]


def execute_sweep(
    points: Sequence[tuple[str, Config]],
    out: str | Path,
    *,
    resume: bool = False,
    log: Log | None = None,
    stop: Callable[[], bool] | None = None,
) -> SweepOutcome:
    """Runs every point into `OUT/runs/LABEL-seedN`; writes `OUT/table.md` and `OUT/plots`.

    Args:
      points: from `sweep_points`.
      out: of the sweep.
      resume: leave out the runs that have ended, and continue the others.
      log: called with each row.
      stop: called before every round. True saves all runs and raises KeyboardInterrupt.

    Raises:
      FedLPError: bad input; nothing has been written.
    """
    out = Path(out).expanduser()
    if processes.count() > 1:
        raise FedLPError("a sweep runs in one process; start one, or fedlp run for each point.")
    if not resume and (out / RUNS).is_dir() and any((out / RUNS).iterdir()):
        raise FedLPError(
            f"{out} already holds a sweep; choose another directory with --out, or continue that "
            "sweep with --resume."
        )
    paths = _paths(points, out)
    runs = [(label, config, path) for (label, config), path in zip(points, paths, strict=True)]
    again = "Resume with the same command and --resume."
    execute_runs(runs, again, resume=resume, log=log, stop=stop)
    rows = _rows(points, paths)
    table = compare(rows)
    with replacing(out / TABLE) as file:
        file.write(f"{table}\n".encode())
    draw_sweep(out / PLOTS, rows)
    diverged = [path for path in paths if _status(path) == "diverged"]
    return SweepOutcome(out, table, paths, diverged)


def _paths(points: Sequence[tuple[str, Config]], out: Path) -> list[Path]:
    return [out / RUNS / f"{label}-seed{config.seed}" for label, config in points]


def execute_runs(
    runs: Sequence[tuple[str, Config, Path]],
    again: str,
    *,
    resume: bool = False,
    log: Log | None = None,
    stop: Callable[[], bool] | None = None,
) -> None:
    """Runs configurations into directories of their own, those of one structure side by side.

    Args:
      runs: of each its label, configuration and directory.
      again: the sentence that tells the user how to go on, if rounds were run.
      resume: leave out the runs that have ended, and continue the others.
      log: called with each row.
      stop: called before every round. True saves all runs and raises KeyboardInterrupt.

    Raises:
      FedLPError: bad input; nothing has been written.
    """
    with contextlib.ExitStack() as stack:
        known: dict[str, Any] = {}
        todo = [
            stack.enter_context(_PointRun(*run, resume, known))
            for run in runs
            if not (resume and _has_ended(*run[1:]))
        ]
        try:
            run_points([run.point(log) for run in todo], stop=stop)
            if any(not run.ended for run in todo):
                raise KeyboardInterrupt
        except BaseException as error:
            for run in todo:
                run.fail(error)
            if len(todo) < len(runs) or any(run.begun for run in todo):
                error.add_note(again)
            raise


class _PointRun:
    """One run of a sweep and its directory. A context manager, which releases the directory."""

    def __init__(self, label: str, config: Config, path: Path, resume: bool, known: dict[str, Any]):
        """Locks the directory, and builds what is run; `known` as in `build`."""
        self._label, self._config = label, config
        self._started = time.perf_counter()
        self.ended = False
        with collecting() as self._said:
            self._directory = RunDirectory(path, config.name, resume=resume)
            try:
                self._start = last_snapshot(config, path) if resume else None
                self._arguments = build(config, known)
            except BaseException:
                self._directory.close()
                raise
        rows = [] if self._start is None else list(self._start.rows)
        self._record = Record(config, self._directory, rows)

    def __enter__(self) -> _PointRun:
        return self

    def __exit__(self, *exception: object) -> None:
        self._directory.close()

    @property
    def begun(self) -> bool:
        """Whether anything has been written."""
        return self._directory.begun

    def point(self, log: Log | None) -> Point:
        """What `run_points` runs."""

        def append(row: dict[str, Any]) -> None:
            self._record.append(row)
            if log is not None:
                log(self._label, self._config.seed, row)

        return Point(
            self._label,
            self._arguments,
            append,
            run_checkpoint(self._config, self._directory.path),
            self._start,
            self._record.compiled,
            self._end,
        )

    def _end(self, result: Result, error: DivergedError | None) -> None:
        """Writes what the run leaves, unless it was interrupted."""
        if error is None and len(result.history) < self._config.rounds and result.stopped is None:
            return
        self.ended = True
        result.warnings = list(dict.fromkeys([*self._said, *result.warnings]))
        if error is not None:
            note_failure(error, self._directory, self._record.rows, result.warnings)
        else:
            self._record.compiled(result.plan)
            self._record.begin()
            save_arrays(self._directory, result, self._arguments["clients"])
            summary = summarize(self._config.name, self._arguments, result)
            summary["readings"]["total_seconds"] = time.perf_counter() - self._started
            self._directory.summarize(summary)
        self._directory.close()

    def fail(self, error: BaseException) -> None:
        """Writes the summary of a run that the end of the sweep ended."""
        if not self.ended:
            own = error if isinstance(error, KeyboardInterrupt) else RuntimeError(str(error))
            notes = list(getattr(own, "__notes__", ()))
            note_failure(own, self._directory, self._record.rows, self._said)
            own.__notes__ = notes  # which would be those of every run


def _has_ended(config: Config, path: Path) -> bool:
    """Whether a run has nothing left to do: it is finished, or it diverged.

    Raises:
      FedLPError: the directory holds another run.
    """
    return bool(finished_rounds(config, path)) or _status(path) == "diverged"


def _status(path: Path) -> str:
    try:
        return str(json.loads((path / SUMMARY).read_text("utf-8"))["status"])
    except Exception:  # malformed JSON can raise almost anything
        return "none"


def _rows(points: Sequence[tuple[str, Config]], paths: Sequence[Path]) -> dict[str, list[Any]]:
    """Label of a point -> the rows of each of its runs that did a round."""
    runs: dict[str, list[Any]] = {}
    for (label, _), path in zip(points, paths, strict=True):
        if (path / METRICS).is_file():
            runs.setdefault(label, []).append(read_metrics(path))
    return runs
