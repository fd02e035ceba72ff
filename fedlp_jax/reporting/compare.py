"""compare: runs next to each other in one table, seeds of one experiment as a mean."""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML

from fedlp_jax.errors import FedLPError, nearest, shown
from fedlp_jax.reporting.metrics import headline_of, smaller_is_better
from fedlp_jax.reporting.run_directory import CONFIG, METRICS, read_metrics

Rows = Sequence[Mapping[str, Any]]
Run = Any  # a `Result`, its history, rows as in metrics.jsonl, or the path of a run directory
_INCIDENTAL = ("name", "seed", "plan", "checkpoint")  # sections in which seeds of one run differ
_DIFFERENCES = 3  # settings named in a label, at most


class Cell(NamedTuple):
    """One number of an experiment, over its runs that have it."""

    mean: float
    deviation: float | None  # sample standard deviation; None for a single run
    runs: int


class Column(NamedTuple):
    """One column of the table."""

    title: str
    unit: str
    digits: int | None  # decimals; None = three digits that count
    of: Callable[[Rows], float | None]  # the rows of a run -> its number; None = it has none


class Comparison:
    """A table with a line for each experiment.

    Attributes:
      columns: of the table.
      cells: label -> a cell for each column; None where no run has the number.
      runs: label -> how many runs.
      notes: sentences about missing numbers.
    """

    def __init__(
        self,
        experiments: Mapping[str, Sequence[Rows]],
        columns: Sequence[Column],
        notes: Sequence[str] = (),
    ):
        self.columns, self.notes = list(columns), list(notes)
        self.runs = {label: len(runs) for label, runs in experiments.items()}
        self.cells = {
            label: [_cell([column.of(rows) for rows in runs]) for column in columns]
            for label, runs in experiments.items()
        }

    @property
    def header(self) -> list[str]:
        """Titles with units."""
        return ["run", "runs", *(f"{c.title}{c.unit and f' [{c.unit}]'}" for c in self.columns)]

    def lines(self, plus_minus: str = "±", missing: str = "–") -> list[list[str]]:
        """The table as text.

        A number that only some runs have, such as the rounds to a target, says how many have it.
        """
        return [
            [label, str(self.runs[label])]
            + [
                _text(cell, column.digits, self.runs[label], plus_minus) if cell else missing
                for column, cell in zip(self.columns, cells, strict=True)
            ]
            for label, cells in self.cells.items()
        ]

    def to_markdown(self) -> str:
        """A table of GitHub's Markdown."""
        head, *rest = [self.header, *self.lines()]
        rule = ["---", *["---:"] * (len(head) - 1)]
        rows = ([cell.replace("|", "\\|") for cell in line] for line in (head, rule, *rest))
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def to_latex(self) -> str:
        """A LaTeX tabular with the rules of booktabs."""
        lines = self.lines(plus_minus=r"$\pm$", missing="--")
        head, *body = [[_latex(cell) for cell in self.header]] + [
            [_latex(label), *cells] for label, *cells in lines
        ]
        return "\n".join(
            [
                rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
                r"\toprule",
                " & ".join(head) + r" \\",
                r"\midrule",
                *(" & ".join(row) + r" \\" for row in body),
                r"\bottomrule",
                r"\end{tabular}",
            ]
        )

    def to_csv(self) -> str:
        """Comma-separated values in full precision: mean, deviation and runs of each column."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        parts = ("", " deviation", " runs")
        writer.writerow(["run", "runs", *(name + p for name in self.header[2:] for p in parts)])
        for label, cells in self.cells.items():
            numbers = [x for cell in cells for x in (cell or (None, None, 0))]
            writer.writerow([label, self.runs[label], *numbers])
        return text.getvalue()

    def __str__(self) -> str:
        return "\n\n".join([self.to_markdown(), *self.notes])

    def _repr_markdown_(self) -> str:
        return str(self)


def compare(
    runs: Mapping[str, Run | Sequence[Run]] | Sequence[str | Path],
    *,
    target: float | None = None,
    metric: str | None = None,
    columns: Sequence[str] | None = None,
) -> Comparison:
    """Sets runs next to each other.

    Args:
      runs: label -> a run or several (seeds): results, histories, rows as in metrics.jsonl, or
        paths of run directories. Or paths alone, of runs, of sweeps or of directories of runs:
        those whose configurations differ only in seed, name, plan and checkpoints count as seeds
        of one experiment.
      target: a value of the metric; adds what it took to reach it: rounds, upload and time.
      metric: key of a row; None = test accuracy, of personal models where there is no other, or
        else the test loss. Smaller is better for losses and errors, greater for everything else.
      columns: titles, or how they begin, of the columns to show, in this order, such as
        `("final", "upload", "rounds to")`; None = all.

    Returns:
      The table; print it, or see `to_markdown`, `to_latex` and `to_csv`. Traffic, MACs (of
      runs with a profile of devices) and simulated time are modelled, seconds are measured; all are
      sums over the rounds.

    Raises:
      FedLPError: a path holds no run, no run has the metric, a column is unknown, or there is
        nothing to compare.
    """
    if not runs:
        raise FedLPError("there is nothing to compare; give at least one run.")
    grouped = (
        {label: _all_rows(run) for label, run in runs.items()}
        if isinstance(runs, Mapping)
        else by_configuration(runs)
    )
    rows = [row for seeds in grouped.values() for run in seeds for row in run]
    keys = sorted({key for row in rows for key in row})
    metric = metric or headline_of(rows)
    if metric not in keys:
        raise FedLPError(
            f"no run has {metric!r}{nearest(metric, keys) or '.'} They have {', '.join(keys)}."
        )
    every = _columns(metric, target, set(keys))
    chosen = every if columns is None else _chosen(every, columns)
    return Comparison(grouped, chosen, _notes(grouped, metric))


def by_configuration(paths: Iterable[str | Path]) -> dict[str, list[Rows]]:
    """Groups run directories into experiments, and labels each by its name and what differs.

    Raises:
      FedLPError: a path holds no run.
    """
    return {
        label: [read_metrics(path) for path, _ in members]
        for label, members in experiments(paths).items()
    }


def experiments(paths: Iterable[str | Path]) -> dict[str, list[tuple[Path, dict[str, Any]]]]:
    """As `by_configuration`: label -> path and configuration of each run.

    Raises:
      FedLPError: a path holds no run.
    """
    groups: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    settings: dict[str, dict[str, Any]] = {}
    names: dict[str, str] = {}
    for path in (run for given in paths for run in _runs_at(Path(given))):
        config = YAML(typ="safe", pure=True).load(path / CONFIG)
        flat = {k: v for k, v in _flatten(config).items() if k.split(".")[0] not in _INCIDENTAL}
        flat.pop("partition.seed", None)
        key = repr(sorted(flat.items(), key=lambda item: item[0]))
        groups.setdefault(key, []).append((path, config))
        settings[key], names[key] = flat, str(config.get("name", path.name))
    fields = dict.fromkeys(field for flat in settings.values() for field in flat)
    differing = [f for f in fields if len({shown(flat.get(f)) for flat in settings.values()}) > 1]
    labels = {key: _label(names[key], settings[key], differing) for key in groups}
    if len(set(labels.values())) < len(labels):
        labels = {key: str(members[0][0]) for key, members in groups.items()}
    elif len(set(names.values())) == len(names):
        labels = names
    return {labels[key]: members for key, members in groups.items()}


def _runs_at(path: Path) -> list[Path]:
    """The run at a path, or the runs of a sweep or of a directory of runs, in order of name.

    Raises:
      FedLPError: there is none.
    """
    for among in ([path], path.glob("runs/*"), path.glob("*")):
        runs = [p for p in among if (p / CONFIG).is_file() and (p / METRICS).is_file()]
        if runs:
            return sorted(runs, key=_by_numbers)
    raise FedLPError(
        f"{path} holds no run: there is no {CONFIG} with {METRICS}; give directories that "
        "`fedlp run` or `fedlp sweep` has written."
    )


def check_run(path: Path) -> Path:
    """Returns the path of ONE run.

    Raises:
      FedLPError: it holds none, or it is of a sweep, whose runs are not seeds of one experiment.
    """
    if _runs_at(path) != [path]:
        raise FedLPError(f"{path} holds several runs; pass it without a label, in a list of paths.")
    return path


def _by_numbers(path: Path) -> list[tuple[float, str]]:
    """Sort key that puts keep=0.05 before keep=0.1, and seed9 before seed10."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", path.name)
    return [(float(p), "") if i % 2 else (math.inf, p) for i, p in enumerate(parts)]


def _label(name: str, settings: Mapping[str, Any], differing: Sequence[str]) -> str:
    words = [f"{f.split('.')[-1]}={shown(settings[f])}" for f in differing if f in settings]
    return f"{name} ({', '.join(words[:_DIFFERENCES])})" if words else name


def _flatten(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {path: tree}
    parts = (_flatten(value, f"{path}.{key}" if path else str(key)) for key, value in tree.items())
    return {key: value for part in parts for key, value in part.items()}


def _all_rows(runs: Run | Sequence[Run]) -> list[Rows]:
    if isinstance(runs, list | tuple) and not (runs and isinstance(runs[0], Mapping)):
        return [_rows(run) for run in runs]
    return [_rows(runs)]


def _rows(run: Run) -> Rows:
    if isinstance(run, str | Path):
        return read_metrics(check_run(Path(run)))
    rows: Rows = list(run.history if hasattr(run, "history") else run)
    return rows


def _columns(metric: str, target: float | None, keys: set[str]) -> list[Column]:
    lower, name = smaller_is_better(metric), metric.replace("_", " ")
    choose = min if lower else max

    def best(rows: Rows) -> float | None:
        return choose((x for x in _values(rows, metric) if not math.isnan(x)), default=None)

    columns = [
        Column("rounds", "", 0, lambda rows: rows[-1]["round"] if rows else None),
        Column(f"final {name}", "", 4, lambda rows: next(reversed(_values(rows, metric)), None)),
        Column(f"best {name}", "", 4, best),
    ]
    sums = [
        ("upload", "MB", "upload_bytes", 1e-6),
        ("download", "MB", "download_bytes", 1e-6),
        ("training", "GMAC", "train_macs", 1e-9),
        ("simulated time", "s", "simulated_time", 1.0),
        ("measured time", "s", "seconds", 1.0),
    ]
    sums = [column for column in sums if column[2] in keys]
    for title, unit, key, factor in sums:
        columns.append(Column(title, unit, None, _sum_of(key, factor, lambda rows: rows)))
    if target is None:
        return columns

    def reached(rows: Rows) -> Rows | None:
        """The rounds up to the first that reaches the target."""
        for i, row in enumerate(rows):
            value = row.get(metric)
            if value is not None and (value <= target if lower else value >= target):
                return rows[: i + 1]
        return None

    def rounds(rows: Rows) -> float | None:
        until = reached(rows)
        return None if until is None else float(until[-1]["round"])

    columns.append(Column(f"rounds to {target:g}", "", 0, rounds))
    for title, unit, key, factor in sums:
        title = f"{title} to {target:g}"
        columns.append(Column(title, unit, None, _sum_of(key, factor, reached)))
    return columns


def _notes(experiments: Mapping[str, Sequence[Rows]], metric: str) -> list[str]:
    """Says which experiments lack the metric, and which test metric they have instead."""
    lacking: dict[str, list[str]] = {}  # the other metric -> experiments
    for label, runs in experiments.items():
        if not any(_values(rows, metric) for rows in runs):
            rows = (row for run in runs for row in run) if metric.startswith("test_") else ()
            lacking.setdefault(headline_of(rows, default=""), []).append(label)
    notes = []
    for other, labels in lacking.items():
        why = ""
        if other == f"{metric}_personal":
            why = " Their clients keep layers of their own, so there is no model for everybody."
        instead = other and f" Compare them by the metric {other}."
        notes.append(f"{', '.join(labels)}: no {metric}.{why}{instead}")
    return notes


def _chosen(columns: Sequence[Column], titles: Sequence[str]) -> list[Column]:
    """The columns of these titles, or that begin so where none has the whole title."""
    chosen: list[Column] = []
    for title in titles:
        same = [column for column in columns if column.title == title]
        found = same or [column for column in columns if column.title.startswith(title)]
        if not found:
            raise FedLPError(
                f"the table has no column {shown(title)}; there are: "
                f"{', '.join(column.title for column in columns)}."
            )
        chosen += [column for column in found if column not in chosen]
    return chosen


def _values(rows: Rows, key: str) -> list[float]:
    return [float(row[key]) for row in rows if row.get(key) is not None]


def _sum_of(
    key: str, factor: float, until: Callable[[Rows], Rows | None]
) -> Callable[[Rows], float | None]:
    def total(rows: Rows) -> float | None:
        chosen = until(rows)
        values = _values(chosen, key) if chosen else []
        return factor * sum(values) if values else None

    return total


def _cell(values: Sequence[float | None]) -> Cell | None:
    known = [float(value) for value in values if value is not None]
    if not known:
        return None
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return Cell(statistics.fmean(known), deviation, len(known))


def _text(cell: Cell, digits: int | None, runs: int, plus_minus: str) -> str:
    if digits is None:
        digits = max(2 - math.floor(math.log10(abs(cell.mean) or 1)), 0)
    text = f"{cell.mean:.{digits}f}"
    if cell.deviation:
        text += f" {plus_minus} {cell.deviation:.{digits}f}"
    return text if cell.runs == runs else f"{text} ({cell.runs} of {runs})"


def _latex(text: str) -> str:
    for character in "&%$#_{}":
        text = text.replace(character, f"\\{character}")
    return text
