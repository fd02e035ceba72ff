"""Finished cells -> table.md, table.csv, table.json, and tables for a terminal.

Accuracies are of the test set, in percent. A cell that was not run has no number.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
from rich.console import RenderableType

from fedlp_jax.config.sweep import Log
from fedlp_jax.data.files import replacing
from fedlp_jax.errors import FedLPError, why
from fedlp_jax.paper.cells import (
    CellRun,
    Estimate,
    Study,
    check_file,
    read_runs,
    run_cells,
    run_cells_together,
    unfinished,
)
from fedlp_jax.paper.costs import DIGIT_SLIP, RowCost
from fedlp_jax.paper.figures import draw_figures
from fedlp_jax.paper.published import (
    DRAWS,
    ROUNDS,
    ROWS,
    SEED,
    SOURCE,
    SPLIT_LABELS,
    SPLITS,
    Cell,
    Draws,
)
from fedlp_jax.reporting.environment import origin
from fedlp_jax.reporting.progress import duration
from fedlp_jax.reporting.run_directory import plain
from fedlp_jax.reporting.tables import NumbersTable, note

LAST = 10  # rounds to average over, if there are as many
_MEANS = ("last_ten_mean", "final", "best", "last_ten_sd", "upload_megabytes", "seconds")
_COLUMNS = (
    "row", "id", "split", "draws", "status", "rounds", "seeds", *_MEANS,
    "seed_sd", "published", "difference", "agreement",
)  # fmt: skip
_DECIMALS = 4  # in table.json and table.csv
_SMOKE = "Scale smoke trains on digits: its accuracies are comparable to nothing."
_TITLES: dict[Draws, str] = {
    "reference": "The published runs again: partition, depths, cohorts and masks are those that "
    f"the authors' code draws from seed {SEED}.",
    "own": "The method, with random draws of our own.",
}


class Table(NamedTuple):
    """The tables of one study: an entry for each row, split and choice of draws, run or not.

    An entry has `row`, `id`, `split`, `draws`, `status` ("done", "diverged", "unfinished", "not
    run"); `seeds`, those of the runs of most rounds, and `rounds`, how many these have done; their
    means `last_ten_mean` (over the last 10 rounds), `final`, `best` [%], `last_ten_sd` (standard
    deviation of the last 10 rounds), `upload_megabytes` (all clients, all rounds) and measured
    `seconds`; `seed_sd`, the standard deviation of `last_ten_mean` over several seeds; `published`;
    `difference` of `last_ten_mean` from it; `agreement`, what that difference means; and `runs`,
    the same for each directory, with commit, versions and device. A missing number is None.
    """

    scale: str
    rounds: int
    published_source: str
    published_rounds: int
    cells: list[dict[str, Any]]


def run_study(
    study: Study,
    cells: Sequence[Cell],
    *,
    todo: Sequence[Cell] | None = None,
    progress: bool | None = None,
    say: Callable[[str], None] = lambda line: None,
    stop: Callable[[], bool] | None = None,
    log: Log | None = None,
) -> tuple[Table, list[str]]:
    """Runs the unfinished cells, writes the table, and draws the figures at the end.

    With `log` the cells run together, and the table is written at the end; else it is written after
    each. Takes the arguments of `run_cells` and of `run_cells_together`.

    Returns:
      The table of all cells in the directory, and the names of its figures.

    Raises:
      FedLPError: as `run_cells`, and no cell has begun then; or a file of other examples; or the
        table cannot be written, and all cells are kept.
    """
    if todo is None:
        todo = unfinished(study, cells)  # which refuses the directory of another study
    if todo:
        check_file(study)
    try:
        if log is None:
            for _ in run_cells(study, cells, todo=todo, progress=progress, say=say, stop=stop):
                write_table(make_table(study), study.out)
        else:
            run_cells_together(study, cells, todo=todo, log=log, stop=stop)
    except BaseException as error:
        try:
            _write(study)
        except Exception as other:  # must not hide the first, which says how to go on
            error.add_note(f"The table is not of the latest cells: {other}")
        raise
    return _write(study)


def _write(study: Study) -> tuple[Table, list[str]]:
    """Writes the table of a directory that has cells, then its figures."""
    table = make_table(study)
    if any(entry["status"] != "not run" for entry in table.cells):
        write_table(table, study.out)
    return table, draw_figures(study)


def make_table(study: Study) -> Table:
    """Reads all cells of a study's directory into a table.

    Raises:
      FedLPError: the directory holds cells of another configuration.
    """
    runs = read_runs(study)
    entries = [
        _entry(row, split, draws, runs, study)
        for draws in DRAWS
        for row in ROWS
        for split in SPLITS
    ]
    return Table(study.scale, study.config(Cell("fedavg", "iid")).rounds, SOURCE, ROUNDS, entries)


def write_table(table: Table, out: Path) -> None:
    """Writes table.json, table.csv and table.md, each in one step.

    Raises:
      FedLPError: they cannot be written.
    """
    text = json.dumps(plain(table._asdict()), indent=2, allow_nan=False)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in (
            ("json", f"{text}\n"), ("csv", as_csv(table)), ("md", markdown(table))
        ):  # fmt: skip
            with replacing(out / f"table.{name}") as file:
                file.write(content.encode())
    except OSError as error:
        raise FedLPError(
            f"the table cannot be written to {out}: {why(error)}. All cells are kept; once files "
            "can be written there, the same command writes it."
        ) from error


def as_csv(table: Table) -> str:
    """The entries, one per line; a missing number is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for entry in table.cells:
        writer.writerow(entry | {"seeds": " ".join(map(str, entry["seeds"]))})
    return text.getvalue()


def markdown(table: Table) -> str:
    """The accuracies next to the published ones, then every number of the cells that were run."""
    lines = [
        f"{_title(table)}. Published: {table.published_source}, {table.published_rounds} rounds.",
        f"A number in brackets counts the rounds of a cell that has fewer than {table.rounds}.",
        *[_SMOKE] * (table.scale == "smoke"),
    ]
    for draws, entries in _parts(table).items():
        seeds = max(len(entry["seeds"]) for entry in entries)
        over = f" Mean and standard deviation of up to {seeds} seeds." * (seeds > 1)
        lines += ["", _TITLES[draws] + over, ""]
        lines += _markdown_head(["scheme", *_accuracy_titles("published")])
        lines += [_markdown_line(words) for words in _accuracies(entries, table.rounds)]
    ran = [entry for entry in table.cells if entry["seeds"]]
    if ran:
        origins = list(dict.fromkeys(where for entry in ran for where in _origins(entry)))
        titles = "last 10,final,published,difference,sd of last 10,rounds,uploaded MB,seconds,run"
        lines += ["", *_markdown_head(["scheme", "split", "draws", *titles.split(",")])]
        lines += [_markdown_line(_details(entry, origins)) for entry in ran]
        lines += ["", *(f"{i}. {where}" for i, where in enumerate(origins, 1))]
    compared = [entry for entry in ran if entry["agreement"]]
    if compared:
        lines += ["", *_markdown_head(["scheme", "split", "draws", "against the published value"])]
        lines += [_markdown_line([*_names(entry), entry["agreement"]]) for entry in compared]
    return "\n".join(lines) + "\n"


def result_tables(table: Table, out: Path, figures: Sequence[str]) -> list[RenderableType]:
    """The accuracies next to the published ones, for a terminal."""
    views = [
        NumbersTable(
            f"{_title(table)},\nand the paper's after {ROUNDS}; draws: {draws}",
            ("", *_accuracy_titles("paper")),
            (
                (label.removeprefix("FedLP-"), *words)
                for label, *words in _accuracies(entries, table.rounds)
            ),
        )
        for draws, entries in _parts(table).items()
    ]
    files = ", ".join(("table.md", "table.csv", "table.json", *figures))
    smoke = [note(_SMOKE)] * (table.scale == "smoke")
    return [*views, *smoke, note(f"Written to {out}: {files}")]


def cost_tables(costs: Sequence[RowCost]) -> list[RenderableType]:
    """Comm. and Comp. next to the published ones, and what the paper leaves out."""
    labels = [cost.row.removeprefix("FedLP-") for cost in costs]
    paper = (
        (
            cost.comm_kparams, cost.comm_published, cost.comm_difference,
            cost.comp_mmacs, cost.comp_published, cost.comp_difference,
            cost.comp_as_published_convention, cost.comp_difference_as_published_convention,
        )
        for cost in costs
    )  # fmt: skip
    more = (
        (
            f"{cost.download_bytes / 1e6:.3f}",
            f"{cost.upload_bytes / 1e6:.3f}",
            f"{np.dot(cost.depth_share, cost.local_params) / 1e3:.1f}",
            f"{cost.comp_mmacs:.2f}",
            f"{cost.backward_mmacs:.2f}",
        )
        for cost in costs
    )
    whole = max(costs, key=lambda cost: len(cost.local_params))
    depths = zip(
        whole.shared_params, whole.local_params, whole.forward_macs, whole.backward_macs,
        strict=True,
    )  # fmt: skip
    return [
        NumbersTable(
            "Comm.: thousand parameters that a client downloads and uploads in a round\n"
            "Comp.: million multiply-accumulates of one image's forward pass",
            ("", "Comm.", "paper", "diff.", "Comp.", "paper", "diff.", "with 36.36", "diff."),
            (
                (label, *(f"{number:.2f}" for number in numbers))
                for label, numbers in zip(labels, paper, strict=True)
            ),
        ),
        note(DIGIT_SLIP),
        "",
        NumbersTable(
            "Not in the paper: MB per client and round, with batch statistics and the\n"
            "bits of the mask; thousand parameters that a client holds; million\n"
            "multiply-accumulates",
            ("", "MB down", "MB up", "held, mean", "forward MACs", "backward MACs"),
            ((label, *words) for label, words in zip(labels, more, strict=True)),
        ),
        "",
        NumbersTable(
            "By depth",
            ("depth", "exchanged params", "held params", "forward MACs", "backward MACs"),
            (
                (str(depth), *(f"{number:,}" for number in numbers))
                for depth, numbers in enumerate(depths, start=1)
            ),
        ),
    ]


def estimate_tables(estimates: Mapping[Cell, Estimate]) -> list[RenderableType]:
    """Expected traffic, computation and time of unfinished cells, by row."""
    if not estimates:
        return [note("All cells are done.")]

    def line(label: str, cells: Sequence[Estimate]) -> tuple[str, ...]:
        upload, macs, seconds = map(sum, zip(*cells, strict=True))
        numbers = f"{upload:,.1f}", f"{macs / 1e9:,.0f}", duration(seconds)
        return label, str(len(cells)), *numbers

    rows = dict.fromkeys(cell.row for cell in estimates)
    return [
        NumbersTable(
            "Expected for the unfinished cells",
            ("", "cells", "MB up", "10^9 MACs", "time"),
            (
                line(ROWS[row].label, [own for cell, own in estimates.items() if cell.row == row])
                for row in rows
            ),
            line("all", list(estimates.values())),
        ),
        note(
            "Time is that of a few local steps of FedAvg, measured now and scaled by modelled "
            "multiply-accumulates, without compilation. Shallow submodels take longer."
        ),
    ]


def _entry(
    row: str, split: str, draws: Draws, runs: Mapping[Cell, Sequence[CellRun]], study: Study
) -> dict[str, Any]:
    own = [
        _numbers(cell, run)
        for cell, several in runs.items()
        if (cell.row, cell.split, cell.draws) == (row, split, draws)
        for run in several
    ]
    usable = [run for run in own if run["final"] is not None]
    rounds = max((run["rounds"] for run in usable or own), default=0)
    # Of two runs of one seed the first is averaged; they differ by rounding alone.
    averaged = list({run["seed"]: run for run in usable[::-1] if run["rounds"] == rounds}.values())
    statuses = {run["status"] for run in own} | {"not run"}
    published = Cell(row, split).published
    entry: dict[str, Any] = {
        "row": ROWS[row].label,
        "id": row,
        "split": split,
        "draws": draws,
        "status": next(s for s in ("done", "diverged", "unfinished", "not run") if s in statuses),
        "rounds": rounds,
        "seeds": sorted(run["seed"] for run in averaged),
    }
    for name in _MEANS:
        values = [run[name] for run in averaged]
        entry[name] = round(fmean(values), _DECIMALS) if values else None
    last = [run["last_ten_mean"] for run in averaged]
    entry["seed_sd"] = round(stdev(last), _DECIMALS) if len(last) > 1 else None
    entry["published"] = published
    entry["difference"] = entry["agreement"] = None
    if averaged and study.scale != "smoke":
        entry["difference"] = round(entry["last_ten_mean"] - published, _DECIMALS)
        entry["agreement"] = _agreement(entry)
    return entry | {"runs": [run | {"averaged": run in averaged} for run in own]}


def _numbers(cell: Cell, run: CellRun) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "directory": run.path.name, "seed": cell.seed, "status": run.status, "rounds": run.rounds
    }  # fmt: skip
    numbers |= dict.fromkeys(_MEANS)
    if run.rows and run.status != "diverged":
        accuracy = [100 * row["test_accuracy"] for row in run.rows]
        means = (
            fmean(accuracy[-LAST:]),
            accuracy[-1],
            max(accuracy),
            stdev(accuracy[-LAST:]) if len(accuracy) > 1 else 0.0,
            sum(row["upload_bytes"] for row in run.rows) / 1e6,
            sum(row["seconds"] for row in run.rows),
        )
        numbers |= {k: round(v, _DECIMALS) for k, v in zip(_MEANS, means, strict=True)}
    return numbers | {key: run.summary.get(key) for key in ("commit", "versions", "device", "note")}


def _agreement(entry: Mapping[str, Any]) -> str:
    """What the difference to the published value means."""
    if entry["rounds"] != ROUNDS:
        return f"No comparison: {entry['rounds']} rounds, and published is the value after {ROUNDS}"
    several, sd = entry["seed_sd"] is not None, entry["seed_sd"] or entry["last_ten_sd"]
    ratio = abs(entry["difference"]) / sd if sd else float("inf")
    count = f"{entry['difference']:+.2f} points are {ratio:.1f} standard deviations"
    if several:
        verdict = "Agrees" if ratio <= 2 else "Differs"
        return f"{verdict}: {count} over {len(entry['seeds'])} seeds ({sd:.2f})"
    near = f"{count} of its last ten rounds ({sd:.2f})"
    return (
        f"Agrees: {near}" if ratio <= 2 else f"Open: {near}, but the spread over seeds is unknown"
    )


def _title(table: Table) -> str:
    last = min(LAST, table.rounds)
    return f"Test accuracy in percent, mean of the last {last} of {table.rounds} rounds"


def _parts(table: Table) -> dict[Draws, list[dict[str, Any]]]:
    """The entries by draws, of those draws of which any cell was begun; the authors' otherwise."""
    parts = {d: [entry for entry in table.cells if entry["draws"] == d] for d in DRAWS}
    begun = {d: part for d, part in parts.items() if any(entry["runs"] for entry in part)}
    return begun or {DRAWS[0]: parts[DRAWS[0]]}


def _accuracy_titles(published: str) -> list[str]:
    return [word for label in SPLIT_LABELS.values() for word in (label, published)]


def _accuracies(entries: Sequence[Mapping[str, Any]], rounds: int) -> list[list[str]]:
    """Label of each row, then accuracy and published accuracy of each split."""
    lines: dict[str, list[str]] = {}
    for entry in entries:
        words = lines.setdefault(entry["id"], [entry["row"]])
        words += [_accuracy(entry, rounds), f"{entry['published']:.2f}"]
    return list(lines.values())


def _accuracy(entry: Mapping[str, Any], rounds: int) -> str:
    """An entry's accuracy with its rounds if it is short of some, or why it has none.

    The mean of seeds is of those that did not diverge, so the others are counted beside it.
    """
    if entry["last_ten_mean"] is None:
        return str(entry["status"])
    spread = "" if entry["seed_sd"] is None else f" ± {entry['seed_sd']:.2f}"
    short = f" ({entry['rounds']})" * (entry["rounds"] < rounds)
    diverged = {run["seed"] for run in entry["runs"] if run["status"] == "diverged"}
    lost = len(diverged.difference(entry["seeds"]))
    return f"{entry['last_ten_mean']:.2f}{spread}{short}" + f", {lost} diverged" * (lost > 0)


def _names(entry: Mapping[str, Any]) -> list[str]:
    return [entry["row"], SPLIT_LABELS[entry["split"]], entry["draws"]]


def _origins(entry: Mapping[str, Any]) -> list[str]:
    """Where the runs of an entry ran; a run that goes on has no summary yet."""
    return [
        (origin(run) if run["versions"] else "The run has not ended")
        + (f" ({run['note']})" if run["note"] else "")
        for run in entry["runs"]
        if run["averaged"]
    ]


def _details(entry: Mapping[str, Any], origins: Sequence[str]) -> list[str]:
    difference = entry["difference"]
    return [
        *_names(entry),
        *(f"{entry[name]:.2f}" for name in _MEANS[:2]),
        f"{entry['published']:.2f}",
        "" if difference is None else f"{difference:+.2f}",
        f"{entry['last_ten_sd']:.2f}",
        str(entry["rounds"]),
        f"{entry['upload_megabytes']:.1f}",
        f"{entry['seconds']:.0f}",
        ", ".join(str(origins.index(where) + 1) for where in dict.fromkeys(_origins(entry))),
    ]


def _markdown_head(titles: Sequence[str]) -> list[str]:
    rule = [
        "---" if title in ("scheme", "split", "draws") or "against" in title else "---:"
        for title in titles
    ]
    return [_markdown_line(titles), _markdown_line(rule)]


def _markdown_line(words: Sequence[str]) -> str:
    return f"| {' | '.join(words)} |"
