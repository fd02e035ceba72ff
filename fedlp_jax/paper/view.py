"""The reproduction on a terminal: costs, forecast, result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import RenderableType
from rich.table import Table as View
from rich.text import Text

from fedlp_jax.paper.costs import DIGIT_SLIP, RowCost
from fedlp_jax.paper.forecast import HOW, Forecast, Piece
from fedlp_jax.paper.published import ROWS, SPLIT_LABELS
from fedlp_jax.paper.results import LAST, Table, measured
from fedlp_jax.reporting.progress import duration


def cost_tables(costs: Sequence[RowCost]) -> list[RenderableType]:
    """Comm. and Comp. beside what is published, and what the paper leaves out."""
    table = _table(
        "Comm.: parameters down and up of a client and round, in thousands\n"
        "Comp.: multiply-accumulates of one image forward, in millions",
        "Comm.", "paper", "diff.", "Comp.", "paper", "diff.", "with 36.36", "diff.",
    )  # fmt: skip
    for cost in costs:
        numbers = (
            cost.comm_kparams, cost.comm_published, cost.comm_difference,
            cost.comp_mmacs, cost.comp_published, cost.comp_difference,
            cost.comp_as_published_convention, cost.comp_difference_as_published_convention,
        )  # fmt: skip
        table.add_row(cost.row.removeprefix("FedLP-"), *(f"{number:.2f}" for number in numbers))
    more = _table(
        "What the table leaves out: MB of a client and round, with batch\n"
        "statistics and the bits of the mask; the parameters that a client\n"
        "holds, in thousands; the backward pass, in millions",
        "MB down", "MB up", "held, mean", "forward MACs", "backward MACs",
    )  # fmt: skip
    for cost in costs:
        held = sum(s * p for s, p in zip(cost.depth_share, cost.local_params, strict=True))
        more.add_row(
            cost.row.removeprefix("FedLP-"),
            f"{cost.download_bytes / 1e6:.3f}",
            f"{cost.upload_bytes / 1e6:.3f}",
            f"{held / 1e3:.1f}",
            f"{cost.comp_mmacs:.2f}",
            f"{cost.backward_mmacs:.2f}",
        )
    return [table, _note(DIGIT_SLIP), "", more, "", _depth_table(costs)]


def forecast_tables(forecasts: Sequence[Forecast], piece: Piece) -> list[RenderableType]:
    """Expected time and cost of the cells that are to be run, by row."""
    table = _table("Expected of the cells to be run", "cells", "MB up", "10^9 MACs", "time")
    for row in ROWS:
        mine = [f for f in forecasts if f.cell.row == row]
        if mine:
            table.add_row(ROWS[row].label, *_sums(mine))
    table.add_section()
    table.add_row("all", *_sums(forecasts))
    return [table, _note(HOW.format(**piece._asdict()))]


def result_tables(table: Table, out: Path, figures: Sequence[str]) -> list[RenderableType]:
    """Measured accuracy beside what is published."""
    last = min(LAST, table.rounds)
    view = _table(
        f"Test accuracy in %, mean of the last {last} of {table.rounds} rounds,\n"
        f"beside the paper's after {table.published_rounds}",
        *(word for label in SPLIT_LABELS.values() for word in (label, "paper")),
    )
    for row in ROWS:
        entries = [entry for entry in table.cells if entry["id"] == row]
        words = [w for e in entries for w in (measured(e), f"{e['published']:.2f}")]
        view.add_row(ROWS[row].label.removeprefix("FedLP-"), *words)
    files = ", ".join(("table.md", "table.csv", "table.json", *figures))
    return [view, _note(f"Written to {out}: {files}")]


def _depth_table(costs: Sequence[RowCost]) -> View:
    """The submodels of Hetero: what is exchanged shrinks with depth, what is held does not."""
    deepest = max(costs, key=lambda cost: len(cost.local_params))
    table = _table(
        "By depth",
        "exchanged params",
        "held params",
        "forward MACs",
        "backward MACs",
        first="depth",
    )
    columns = (
        deepest.shared_params, deepest.local_params, deepest.forward_macs, deepest.backward_macs,
    )  # fmt: skip
    for depth, numbers in enumerate(zip(*columns, strict=True), start=1):
        table.add_row(str(depth), *(f"{number:,}" for number in numbers))
    return table


def _sums(forecasts: Sequence[Forecast]) -> list[str]:
    return [
        str(len(forecasts)),
        f"{sum(f.upload_megabytes for f in forecasts):,.1f}",
        f"{sum(f.training_macs for f in forecasts) / 1e9:,.0f}",
        duration(sum(f.seconds for f in forecasts)),
    ]


def _table(title: str, *columns: str, first: str = "") -> View:
    table = View(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _note(text: str) -> Text:
    return Text(text, style="italic")
