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

from fedlp_jax.paper.cells import CellRun, Estimate, Study, read_cells, run_cells
from fedlp_jax.paper.costs import DIGIT_SLIP, RowCost
from fedlp_jax.paper.figures import draw_figures
from fedlp_jax.paper.published import ROUNDS, ROWS, SOURCE, SPLIT_LABELS, SPLITS, Cell
from fedlp_jax.reporting.environment import origin
from fedlp_jax.reporting.progress import duration
from fedlp_jax.reporting.run_directory import plain
from fedlp_jax.reporting.tables import note, numbers_table

LAST = 10  # rounds to average over, if there are as many
_MEANS = ("accuracy_last10", "accuracy_final", "accuracy_best", "upload_megabytes", "seconds")
_COLUMNS = (
    "row", "id", "split", "status", "rounds", "seeds", *_MEANS,
    "seed_spread", "published", "difference",
)  # fmt: skip
_DECIMALS = 4  # in table.json and table.csv


class Table(NamedTuple):
    """The table of one study: an entry for each row and split, run or not.

    An entry has `row`, `id`, `split`, `status` ("done", "diverged", "unfinished", "not run"),
    `rounds`, `seeds` of its finished runs, their means `accuracy_last10` (over the last 10 rounds),
    `accuracy_final`, `accuracy_best` [%], `upload_megabytes` (all clients, all rounds) and measured
    `seconds`; `seed_spread`, the standard deviation of `accuracy_last10` over several seeds;
    `published`; `difference` of `accuracy_last10` from it; and `runs`, the same for each seed, with
    commit, versions and device. A missing number is None.
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
    progress: bool | None = None,
    say: Callable[[str], None] = lambda line: None,
    stop: Callable[[], bool] | None = None,
) -> tuple[Table, list[str]]:
    """Runs the unfinished cells, writes the table after each, and draws the figures at the end.

    Takes the arguments of `run_cells`.

    Returns:
      The table of all cells in the directory, and the names of its figures.

    Raises:
      FedLPError: as `run_cells`; nothing has been written then.
    """
    make_table(study)  # refuses the directory of another study
    try:
        for _ in run_cells(study, cells, progress=progress, say=say, stop=stop):
            write_table(make_table(study), study.out)
    finally:
        figures = draw_figures(study)
    table = make_table(study)
    write_table(table, study.out)
    return table, figures


def make_table(study: Study) -> Table:
    """Reads all cells of a study's directory into a table.

    Raises:
      FedLPError: the directory holds cells of another configuration.
    """
    runs = read_cells(study)
    entries = [_entry(row, split, runs, study) for row in ROWS for split in SPLITS]
    return Table(study.scale, study.config(Cell("fedavg", "iid")).rounds, SOURCE, ROUNDS, entries)


def write_table(table: Table, out: Path) -> None:
    """Writes table.json, table.csv and table.md."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(table._asdict()), indent=2, allow_nan=False)
    for name, content in (("json", text + "\n"), ("csv", as_csv(table)), ("md", markdown(table))):
        (out / f"table.{name}").write_text(content, encoding="utf-8")


def as_csv(table: Table) -> str:
    """The entries, one per line; a missing number is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for entry in table.cells:
        writer.writerow(entry | {"seeds": " ".join(map(str, entry["seeds"]))})
    return text.getvalue()


def markdown(table: Table) -> str:
    """The accuracies next to the published ones, then every number of the finished cells."""
    seeds = max(len(entry["seeds"]) for entry in table.cells)
    over = f", mean and standard deviation of up to {seeds} seeds" * (seeds > 1)
    lines = [
        f"{_title(table)}{over}. Published: {table.published_source}, "
        f"{table.published_rounds} rounds.",
        *["Scale `smoke` trains on digits: its accuracies are comparable to nothing."]
        * (table.scale == "smoke"),
        "",
        *_markdown_head(["scheme", *_accuracy_titles("published")]),
        *(_markdown_line(words) for words in _accuracies(table)),
    ]
    finished = [entry for entry in table.cells if entry["seeds"]]
    if finished:
        titles = "last 10,final,best,published,difference,rounds,uploaded MB,measured seconds"
        lines += ["", *_markdown_head(["scheme", "split", *titles.split(",")])]
        lines += [_markdown_line(_details(entry)) for entry in finished]
        runs = [run for entry in finished for run in entry["runs"] if run["status"] == "done"]
        lines += ["", *dict.fromkeys(f"Run on {origin(run)}." for run in runs)]
    return "\n".join(lines) + "\n"


def result_tables(table: Table, out: Path, figures: Sequence[str]) -> list[RenderableType]:
    """The accuracies next to the published ones, for a terminal."""
    view = numbers_table(
        _title(table).replace(", ", ",\n", 1) + f",\nand the paper's after {ROUNDS}",
        ("", *_accuracy_titles("paper")),
        ((label.removeprefix("FedLP-"), *words) for label, *words in _accuracies(table)),
    )
    files = ", ".join(("table.md", "table.csv", "table.json", *figures))
    return [view, note(f"Written to {out}: {files}")]


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
        numbers_table(
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
        numbers_table(
            "Not in the paper: MB per client and round, with batch statistics and the\n"
            "bits of the mask; thousand parameters that a client holds; million\n"
            "multiply-accumulates",
            ("", "MB down", "MB up", "held, mean", "forward MACs", "backward MACs"),
            ((label, *words) for label, words in zip(labels, more, strict=True)),
        ),
        "",
        numbers_table(
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
        numbers_table(
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


def _entry(row: str, split: str, runs: Mapping[Cell, CellRun], study: Study) -> dict[str, Any]:
    numbers = [
        _numbers(cell, run) for cell, run in runs.items() if (cell.row, cell.split) == (row, split)
    ]
    done = [run for run in numbers if run["status"] == "done"]
    statuses = {run["status"] for run in numbers} | {"not run"}
    published = Cell(row, split).published
    entry: dict[str, Any] = {
        "row": ROWS[row].label,
        "id": row,
        "split": split,
        "status": next(s for s in ("done", "diverged", "unfinished", "not run") if s in statuses),
        "rounds": max((run["rounds"] for run in done or numbers), default=0),
        "seeds": [run["seed"] for run in done],
    }
    for name in _MEANS:
        entry[name] = round(fmean(run[name] for run in done), _DECIMALS) if done else None
    last = [run["accuracy_last10"] for run in done]
    entry["seed_spread"] = round(stdev(last), _DECIMALS) if len(last) > 1 else None
    entry["published"] = published
    entry["difference"] = None
    if done and study.scale != "smoke":
        entry["difference"] = round(entry["accuracy_last10"] - published, _DECIMALS)
    return entry | {"runs": numbers}


def _numbers(cell: Cell, run: CellRun) -> dict[str, Any]:
    numbers: dict[str, Any] = {"seed": cell.seed, "status": run.status, "rounds": run.rounds}
    numbers |= dict.fromkeys(_MEANS)
    if run.status == "done":
        accuracy = [100 * row["test_accuracy"] for row in run.rows]
        means = (
            fmean(accuracy[-LAST:]),
            accuracy[-1],
            max(accuracy),
            sum(row["upload_bytes"] for row in run.rows) / 1e6,
            sum(row["seconds"] for row in run.rows),
        )
        numbers |= {k: round(v, _DECIMALS) for k, v in zip(_MEANS, means, strict=True)}
    return numbers | {key: run.summary.get(key) for key in ("commit", "versions", "device")}


def _title(table: Table) -> str:
    last = min(LAST, table.rounds)
    return f"Test accuracy in percent, mean of the last {last} of {table.rounds} rounds"


def _accuracy_titles(published: str) -> list[str]:
    return [word for label in SPLIT_LABELS.values() for word in (label, published)]


def _accuracies(table: Table) -> list[list[str]]:
    """Label of each row, then accuracy and published accuracy of each split."""
    lines = []
    for row in ROWS:
        words = [ROWS[row].label]
        for entry in (entry for entry in table.cells if entry["id"] == row):
            words += [_accuracy(entry), f"{entry['published']:.2f}"]
        lines.append(words)
    return lines


def _accuracy(entry: Mapping[str, Any]) -> str:
    """An entry's accuracy, or why it has none."""
    if entry["accuracy_last10"] is None:
        return str(entry["status"])
    spread = entry["seed_spread"]
    return f"{entry['accuracy_last10']:.2f}" + ("" if spread is None else f" ± {spread:.2f}")


def _details(entry: Mapping[str, Any]) -> list[str]:
    difference = entry["difference"]
    return [
        entry["row"],
        SPLIT_LABELS[entry["split"]],
        *(f"{entry[name]:.2f}" for name in _MEANS[:3]),
        f"{entry['published']:.2f}",
        "" if difference is None else f"{difference:+.2f}",
        str(entry["rounds"]),
        f"{entry['upload_megabytes']:.1f}",
        f"{entry['seconds']:.0f}",
    ]


def _markdown_head(titles: Sequence[str]) -> list[str]:
    rule = ["---" if title in ("scheme", "split") else "---:" for title in titles]
    return [_markdown_line(titles), _markdown_line(rule)]


def _markdown_line(words: Sequence[str]) -> str:
    return f"| {' | '.join(words)} |"
