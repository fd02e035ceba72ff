"""Learning curves of a study: a panel per split, a line per row, a band over several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlp_jax.paper.cells import CellRun, Study, read_cells
from fedlp_jax.paper.published import DRAWS, ROWS, SPLIT_LABELS, SPLITS
from fedlp_jax.reporting import plots

# FedAvg stands out. Homo is solid and darkens with the keep rate; Hetero is dashed and darkens with
# depth.
STYLES = {
    "fedavg": plots.Style("#000000", "-", "o"),
    "homo-0.1": plots.Style("#9ecae1", "-", "s"),
    "homo-0.3": plots.Style("#56b4e9", "-", "^"),
    "homo-0.5": plots.Style("#0072b2", "-", "D"),
    "homo-0.7": plots.Style("#08306b", "-", "v"),
    "hetero-1": plots.Style("#fdbf6f", "--", "p"),
    "hetero-3": plots.Style("#e69f00", "--", ">"),
    "hetero-u": plots.Style("#cc79a7", "--", "P"),
    "hetero-5": plots.Style("#b03a00", "--", "X"),
}


def draw_figures(study: Study) -> list[str]:
    """Draws test accuracy against rounds and against uploads, a figure for each kind of draws.

    A line is the mean of the runs that have gone furthest, a band one standard deviation.

    Returns:
      The names of the files in the study's directory; empty if no cell has ended.
    """
    runs: dict[tuple[str, str, str], list[CellRun]] = {}
    for cell, run in read_cells(study).items():
        if run.status != "diverged" and run.summary and run.rows:
            runs.setdefault((cell.draws, cell.split, cell.row), []).append(run)
    made = []
    for draws in DRAWS:
        panels = {
            split: {
                ROWS[row].label: _longest(runs[draws, split, row])
                for row in ROWS
                if (draws, split, row) in runs
            }
            for split in SPLITS
            if any((draws, split) == key[:2] for key in runs)
        }
        for x in ("round", "upload_megabytes") if panels else ():
            made.append(f"accuracy_by_{x}_{draws}.png")
            _draw(panels, x, study.out / made[-1])
    return made


def _longest(runs: Sequence[CellRun]) -> list[plots.Rows]:
    most = max(run.rounds for run in runs)
    return [run.rows for run in runs if run.rounds == most]


def _draw(panels: Mapping[str, Mapping[str, Sequence[plots.Rows]]], x: str, path: Path) -> None:
    figure = plots.new_figure(2 + 3.4 * len(panels), 4.2)
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    styles = {ROWS[name].label: style for name, style in STYLES.items()}
    lines: dict[str, Any] = {}
    for axes, (split, histories) in zip(row, panels.items(), strict=True):
        plots.draw_curves(axes, histories, x, styles=styles)
        axes.set_title(SPLIT_LABELS[split], fontsize="medium")
        lengths = [len(rows) for runs in histories.values() for rows in runs]
        if max(lengths) > 4 * min(lengths):  # short runs would be squeezed against the axis
            axes.set_xscale("log")
            axes.autoscale(axis="x")
            axes.xaxis.set_minor_formatter("")
            axes.xaxis.set_major_formatter("{x:,.10g}")
        lines |= {line.get_label(): line for line in axes.get_lines()}
    for axes in row[1:]:
        axes.set_ylabel("")
    labels = [label for label in styles if label in lines]
    figure.legend(
        [lines[label] for label in labels],
        labels,
        loc="outside right center",
        fontsize="small",
        frameon=False,
    )
    plots.save(figure, path)
