"""Learning curves of a study: a panel per split, a line per row, a band over several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedlp_jax.paper.cells import Study, read_cells
from fedlp_jax.paper.published import ROWS, SPLIT_LABELS, SPLITS
from fedlp_jax.reporting import plots

# FedAvg stands out. Homo is solid and darkens with the keep rate; Hetero is dashed and darkens with
# depth.
_STYLES = {
    "fedavg": plots.Style("#000000", "-", "o"),
    "homo-0.1": plots.Style("#9ecae1", "-", "s"),
    "homo-0.3": plots.Style("#56b4e9", "-", "^"),
    "homo-0.5": plots.Style("#0072b2", "-", "D"),
    "homo-0.7": plots.Style("#08306b", "-", "v"),
    "hetero-1": plots.Style("#fdbf6f", "--", "s"),
    "hetero-3": plots.Style("#e69f00", "--", "^"),
    "hetero-u": plots.Style("#cc79a7", "--", "P"),
    "hetero-5": plots.Style("#b03a00", "--", "D"),
}


def draw_figures(study: Study) -> list[str]:
    """Draws test accuracy against rounds and against uploads, of the finished cells.

    Returns:
      The names of the files in the study's directory; empty if no cell is done.
    """
    runs: dict[tuple[str, str], list[plots.Rows]] = {}
    for cell, run in read_cells(study).items():
        if run.status == "done":
            runs.setdefault((cell.split, cell.row), []).append(run.rows)
    panels = {
        split: {ROWS[row].label: runs[split, row] for row in ROWS if (split, row) in runs}
        for split in SPLITS
        if any(split == key[0] for key in runs)
    }
    axes = ("round", "upload_megabytes") if panels else ()
    for x in axes:
        _draw(panels, x, study.out / f"accuracy_by_{x}.png")
    return [f"accuracy_by_{x}.png" for x in axes]


def _draw(panels: Mapping[str, Mapping[str, Sequence[plots.Rows]]], x: str, path: Path) -> None:
    figure = plots.new_figure(2 + 3.4 * len(panels), 4.2)
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    styles = {ROWS[name].label: style for name, style in _STYLES.items()}
    lines: dict[str, Any] = {}
    for axes, (split, histories) in zip(row, panels.items(), strict=True):
        plots.draw_curves(axes, histories, x, styles=styles)
        axes.set_title(SPLIT_LABELS[split], fontsize="medium")
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
