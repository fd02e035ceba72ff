"""Learning curves of a study: a panel for each split, a line for each row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from fedlp_jax.paper.cells import Study, survey
from fedlp_jax.paper.published import ROWS, SPLIT_LABELS, SPLITS
from fedlp_jax.reporting import plots

Rows = Sequence[Mapping[str, Any]]

# FedAvg stands out; Homo is solid and grows darker with what is kept, Hetero is dashed and grows
# darker with depth.
_STYLES = {
    "fedavg": ("#000000", "-"),
    "homo-0.1": ("#9ecae1", "-"),
    "homo-0.3": ("#56b4e9", "-"),
    "homo-0.5": ("#0072b2", "-"),
    "homo-0.7": ("#08306b", "-"),
    "hetero-1": ("#fdbf6f", "--"),
    "hetero-3": ("#e69f00", "--"),
    "hetero-u": ("#cc79a7", "--"),
    "hetero-5": ("#b03a00", "--"),
}


def draw_figures(study: Study) -> list[str]:
    """Draws accuracy against rounds and against uploads, of the cells that are done.

    Returns:
      The names of the files in the study's directory; none if no cell is done.
    """
    panels = _panels(study)
    if not panels:
        return []
    names = []
    for x in ("round", "upload_megabytes"):
        names.append(f"accuracy_by_{x}.png")
        _draw(panels, x, study.out / names[-1])
    return names


def _draw(panels: Mapping[str, Mapping[str, Rows]], x: str, path: Any) -> None:
    from matplotlib.figure import Figure

    size = (2 + 3.4 * len(panels), 4.2)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    lines: dict[str, Any] = {}
    for axes, (split, histories) in zip(row, panels.items(), strict=True):
        styles = {ROWS[name].label: style for name, style in _STYLES.items()}
        plots.draw_curves(axes, histories, x, styles=styles)
        axes.set_title(SPLIT_LABELS[split], fontsize="medium")
        lines |= {line.get_label(): line for line in axes.get_lines()}
    for axes in row[1:]:
        axes.set_ylabel("")
    labels = [row.label for row in ROWS.values() if row.label in lines]
    figure.legend(
        [lines[label] for label in labels], labels, loc="outside right center", fontsize="small",
        frameon=False,
    )  # fmt: skip
    plots.written(figure, path)


def _panels(study: Study) -> dict[str, dict[str, Rows]]:
    """Split -> row -> history, a mean over seeds."""
    runs: dict[tuple[str, str], list[Rows]] = {}
    for cell, found in survey(study).items():
        if found.status == "done":
            runs.setdefault((cell.split, cell.row), []).append(found.rows)
    panels: dict[str, dict[str, Rows]] = {
        split: {ROWS[row].label: _mean(runs[split, row]) for row in ROWS if (split, row) in runs}
        for split in SPLITS
    }
    return {split: histories for split, histories in panels.items() if histories}


def _mean(runs: Iterable[Rows]) -> list[dict[str, Any]]:
    return [
        {"round": rows[0]["round"]}
        | {key: fmean(row[key] for row in rows) for key in ("test_accuracy", "upload_bytes")}
        for rows in zip(*runs, strict=True)
    ]
