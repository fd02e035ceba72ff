"""Finished cells -> the table: table.json, table.csv, table.md, and back from the first.

Accuracies are of the test set, in percent. A cell that was not run has no number.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from fedlp_jax.errors import FedLPError
from fedlp_jax.paper.cells import Found, Study, survey
from fedlp_jax.paper.published import (
    ROWS,
    SEED,
    SOURCE,
    SPLIT_LABELS,
    SPLITS,
    Cell,
)
from fedlp_jax.reporting.run_directory import plain

LAST = 10  # rounds that are averaged, where there are so many
_MEANS = (
    "accuracy_last10",
    "accuracy_final",
    "accuracy_best",
    "upload_megabytes",
    "seconds",
)
_COLUMNS = (
    "row", "id", "split", "status", "rounds", "seeds", *_MEANS,
    "seed_spread", "published", "difference",
)  # fmt: skip
_PLACES = 4  # decimals that are kept


class Table(NamedTuple):
    """The table of one study: an entry for each row and split, run or not.

    An entry has `row`, `id`, `split`, `status` ("done", "diverged", "unfinished", "not run"),
    `rounds`, `seeds` of its finished runs, their means `accuracy_last10` (over the last 10 rounds),
    `accuracy_final`, `accuracy_best` [%], `upload_megabytes` (all clients, all rounds) and measured
    `seconds`; `seed_spread`, the standard deviation of `accuracy_last10` over several seeds;
    `published`; `difference` of `accuracy_last10` to it; and `runs`, the same of each seed, with
    the commit, versions and device. What there is not is None.
    """

    scale: str
    rounds: int
    published_source: str
    published_rounds: int
    cells: list[dict[str, Any]]


def make_table(study: Study) -> Table:
    """Reads all cells of a study's directory.

    Raises:
      FedLPError: the directory holds cells of another configuration.
    """
    found = survey(study)
    entries = [_entry(row, split, found, study) for row in ROWS for split in SPLITS]
    rounds = study.config(Cell("fedavg", "iid")).rounds
    return Table(study.scale, rounds, SOURCE, 200, entries)


def write_table(table: Table, out: Path) -> None:
    """Writes table.json, table.csv and table.md."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(table._asdict()), indent=2, allow_nan=False)
    for name, content in (("json", text + "\n"), ("csv", as_csv(table)), ("md", markdown(table))):
        (out / f"table.{name}").write_text(content, encoding="utf-8")


def read_table(path: str | Path) -> Table:
    """The table of a table.json.

    Raises:
      FedLPError: the file cannot be read, or is none.
    """
    try:
        raw = json.loads(Path(path).read_text("utf-8"))
        return Table(**raw)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise FedLPError(
            f"{path} is not the table.json of `fedlp reproduce paper`: {error}."
        ) from None


def as_csv(table: Table) -> str:
    """The entries, one a line; empty where there is nothing."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for entry in table.cells:
        writer.writerow(entry | {"seeds": " ".join(map(str, entry["seeds"]))})
    return text.getvalue()


def markdown(table: Table) -> str:
    """The table as Markdown: measured beside published, then every number of the cells run."""
    seeds = max(len(entry["seeds"]) for entry in table.cells)
    over = f", mean and standard deviation of up to {seeds} seeds" * (seeds > 1)
    averaged = min(LAST, table.rounds)
    lines = [
        f"Test accuracy in percent, mean of the last {averaged} of {table.rounds} rounds{over}. "
        f"Published: {table.published_source}, {table.published_rounds} rounds.",
        *["Scale `smoke` trains on digits: its accuracies compare with nothing."] * _tiny(table),
        "",
        *_lines(["scheme", *(w for s in SPLIT_LABELS.values() for w in (s, "published"))]),
    ]
    by_row = {row: [e for e in table.cells if e["id"] == row] for row in ROWS}
    for row, entries in by_row.items():
        words = [w for e in entries for w in (measured(e), f"{e['published']:.2f}")]
        lines.append(_line([ROWS[row].label, *words]))
    ran = [entry for entry in table.cells if entry["seeds"]]
    if ran:
        titles = "last 10,final,best,published,difference,rounds,uploaded MB,measured seconds"
        lines += ["", *_lines(["scheme", "split", *titles.split(",")])]
        lines += [_line(_details(entry)) for entry in ran]
        lines += ["", *(f"Run on {where}." for where in _origins(ran))]
    return "\n".join(lines) + "\n"


def measured(entry: Mapping[str, Any]) -> str:
    """An entry's accuracy as text, or why it has none."""
    if entry["accuracy_last10"] is None:
        return str(entry["status"])
    spread = entry["seed_spread"]
    return f"{entry['accuracy_last10']:.2f}" + ("" if spread is None else f" ± {spread:.2f}")


def _entry(row: str, split: str, found: Mapping[Cell, Found], study: Study) -> dict[str, Any]:
    mine = [cell for cell in found if (cell.row, cell.split) == (row, split)]
    runs = [_run(cell, found[cell]) for cell in mine]
    ended = [run for run in runs if run["status"] == "done"]
    statuses = ["done", "diverged", "unfinished", "not run"]
    there = {run["status"] for run in runs} | {"not run"}
    published = Cell(row, split, SEED).published
    entry: dict[str, Any] = {
        "row": ROWS[row].label,
        "id": row,
        "split": split,
        "status": next(status for status in statuses if status in there),
        "rounds": max((run["rounds"] for run in ended or runs), default=0),
        "seeds": [run["seed"] for run in ended],
    }
    for name in _MEANS:
        entry[name] = round(fmean(r[name] for r in ended), _PLACES) if ended else None
    last = [run["accuracy_last10"] for run in ended]
    entry["seed_spread"] = round(stdev(last), _PLACES) if len(last) > 1 else None
    entry["published"] = published
    compares = ended and study.scale != "smoke"
    ours = entry["accuracy_last10"]
    entry["difference"] = round(ours - published, _PLACES) if compares else None
    return entry | {"runs": runs}


def _run(cell: Cell, found: Found) -> dict[str, Any]:
    run: dict[str, Any] = {"seed": cell.seed, "status": found.status, "rounds": found.rounds}
    run |= dict.fromkeys(_MEANS)
    if found.status == "done":
        accuracy = [100 * row["test_accuracy"] for row in found.rows]
        numbers = (
            fmean(accuracy[-LAST:]),
            accuracy[-1],
            max(accuracy),
            sum(row["upload_bytes"] for row in found.rows) / 1e6,
            sum(row["seconds"] for row in found.rows),
        )
        run |= {k: round(v, _PLACES) for k, v in zip(_MEANS, numbers, strict=True)}
    return run | {key: found.summary.get(key) for key in ("commit", "versions", "device")}


def _details(entry: Mapping[str, Any]) -> list[str]:
    accuracies = [f"{entry[name]:.2f}" for name in _MEANS[:3]]
    difference = entry["difference"]
    return [
        entry["row"],
        SPLIT_LABELS[entry["split"]],
        *accuracies,
        f"{entry['published']:.2f}",
        "" if difference is None else f"{difference:+.2f}",
        str(entry["rounds"]),
        f"{entry['upload_megabytes']:.1f}",
        f"{entry['seconds']:.0f}",
    ]


def _origins(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the runs were made with, each combination once."""
    runs = [run for entry in entries for run in entry["runs"] if run["status"] == "done"]
    texts = []
    for run in runs:
        device, versions = run["device"], run["versions"]
        chip = device["kind"]
        if device["platform"] == "cpu":
            chip = device.get("processor", chip)
        with_ = ", ".join(f"{name} {versions[name]}" for name in ("jax", "flax", "optax", "python"))
        commit = run["commit"] or "unknown"
        texts.append(f"{device['count']} x {chip}, {with_}, commit {commit}")
    return list(dict.fromkeys(texts))


def _tiny(table: Table) -> bool:
    return table.scale == "smoke"


def _lines(titles: Sequence[str]) -> list[str]:
    text = sum(title in ("scheme", "split") for title in titles)
    return [_line(titles), _line(["---"] * text + ["---:"] * (len(titles) - text))]


def _line(words: Sequence[str]) -> str:
    return f"| {' | '.join(words)} |"
