"""Figures of docs/paper.md and docs/theory.md, for `benchmarks.paper`.

Lines differ in colour, dash and marker, and darken with what a client sends, so that they can be
told apart in grey.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fedlp_jax.paper.cells import CellRun
from fedlp_jax.paper.figures import STYLES
from fedlp_jax.paper.published import ROWS, Cell
from fedlp_jax.reporting import plots

_LOWEST = 0.3  # accuracy from which on time is drawn

Runs = Mapping[str, tuple[Cell, CellRun]]
Times = Mapping[str, Mapping[str, np.ndarray]]  # run -> profile -> seconds until each round's end


def draw(folder: Path, runs: Runs, found: Mapping[str, Any], times: Times) -> None:
    """Writes the four figures.

    Args:
      folder: where they go.
      runs: name of its directory -> each run.
      found: results of `benchmarks.paper`.
      times: of the runs to draw, by row.
    """
    plots.save(accuracy(runs, list(times)), folder / "paper_accuracy.png")
    plots.save(clocks(runs, times), folder / "paper_time.png")
    plots.save(draws(runs, found["deepest"]), folder / "paper_draws.png")
    plots.save(predictions(found["exchange"]), folder / "theory_runs.png")


def accuracy(runs: Runs, names: Sequence[str]) -> Figure:
    """Test accuracy against rounds and against uploads."""
    figure = plots.new_figure(9.5, 4)
    panels = figure.subplots(1, 2, sharey=True)
    for name in names:
        rows = runs[name][1].rows
        sent = np.cumsum([row["upload_bytes"] for row in rows]) / 1e6
        for axes, x in zip(panels, (np.arange(1, len(rows) + 1), sent), strict=True):
            _line(axes, x, runs[name])
    panels[0].set(xlabel="round", ylabel="test accuracy, iid")
    panels[1].set(xlabel="uploaded by all clients so far [MB]")
    _finish(figure, panels)
    return figure


def clocks(runs: Runs, times: Times) -> Figure:
    """Test accuracy against modelled time, a panel for each profile."""
    profiles = list(next(iter(times.values())))
    figure = plots.new_figure(11, 4)
    panels = figure.subplots(1, len(profiles), sharey=True)
    for axes, profile in zip(panels, profiles, strict=True):
        starts = []
        for name, clock in times.items():
            _line(axes, clock[profile] / 60, runs[name])
            seen = np.array([row["test_accuracy"] for row in runs[name][1].rows]) > _LOWEST
            starts.append(clock[profile][seen].min(initial=np.inf) / 60)
        axes.set_xlim(left=0.7 * min(starts))
        axes.set(xlabel="modelled time so far [min]")
        axes.set_title(profile, fontsize="small")
    panels[0].set(ylabel="test accuracy, iid")
    _finish(figure, panels, _LOWEST)
    return figure


def draws(runs: Runs, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """FedLP-Hetero(1) with our draws and the authors': accuracy, and clients of depth 5."""
    figure = plots.new_figure(8, 5)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    looks = {
        "hetero-1-iid-own-seed25": ("our draws, CPU", "#0072b2", "--", "s"),
        "hetero-1-iid-own-seed25@h200": ("our draws, H200", "#56b4e9", ":", "^"),
        "hetero-1-iid-reference-seed25": ("the authors' draws, CPU", "#000000", "--", "o"),
        "hetero-1-iid-reference-seed25@h200": ("the authors' draws, H200", "#e69f00", "-", "v"),
    }
    for row in rows:
        label, colour, dash, marker = looks[row["directory"]]
        accuracy = [one["test_accuracy"] for one in runs[row["directory"]][1].rows]
        x = np.arange(1, len(accuracy) + 1)
        style = {"color": colour, "linestyle": dash, "marker": marker, "markersize": 4}
        style["markevery"] = 4
        above.plot(x, accuracy, label=label, **style)
        if row["directory"].endswith("@h200"):  # those on the CPU have the same draws
            name = label.split(",")[0]
            below.plot(
                x, np.cumsum(row["deep_by_round"]), label=name, drawstyle="steps-post", **style
            )
    above.set(ylabel="test accuracy, iid")
    above.yaxis.set_major_formatter(PercentFormatter(1.0))
    below.set(xlabel="round", ylabel="uploads of depth 5 so far")
    for axes in (above, below):
        axes.legend(
            frameon=False, fontsize="small", loc="lower right" if axes is above else "upper left"
        )
        _plain(axes)
    return figure


def predictions(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Predicted and measured uploads and inactive layers of every run, one line a run."""
    figure = plots.new_figure(10, 1 + 0.24 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    place = np.arange(len(rows))[::-1]
    for axes, name in ((left, "megabytes"), (right, "inactive")):
        measured, error = ([row[f"{name}_{k}"] for row in rows] for k in ("measured", "error"))
        axes.errorbar(
            measured, place, xerr=2 * np.array(error), fmt="o", color="#000000", markersize=4,
            capsize=3, label="measured, with two standard errors",
        )  # fmt: skip
        axes.plot(
            [row[f"{name}_predicted"] for row in rows], place, "D", color="#d55e00", markersize=9,
            fillstyle="none", label="predicted",
        )  # fmt: skip
        _plain(axes)
        axes.set_xlim(left=-0.3)
    labels = [f"{row['row']}, {row['split']}, {_machine(row)}" for row in rows]
    left.set_yticks(place, labels, fontsize="small")
    left.set(xlabel="sent by the cohort in a round [MB]")
    right.set(xlabel="layers (of 40) that nobody sends in a round")
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False
    )
    return figure


def _machine(row: Mapping[str, Any]) -> str:
    where = "H200" if "@" in row["directory"] else "CPU"
    authors = ", authors' draws" * (row["draws"] == "reference")
    return f"{row['rounds']} rounds, {where}{authors}"


def _line(axes: Axes, x: np.ndarray, run: tuple[Cell, CellRun]) -> None:
    style = STYLES[run[0].row]
    axes.plot(
        x,
        [row["test_accuracy"] for row in run[1].rows],
        color=style.colour,
        linestyle=style.dash,
        marker=style.marker,
        markersize=4.5,
        markevery=0.12,
        linewidth=1.3,
        label=ROWS[run[0].row].label,
    )


def _finish(figure: Figure, panels: Sequence[Axes], lowest: float = 0.05) -> None:
    """A common logarithmic style, and one legend."""
    for axes in panels:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,.10g}")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_ylim(lowest, 0.82)
        _plain(axes)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="small", frameon=False)


def _plain(axes: Axes) -> None:
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
