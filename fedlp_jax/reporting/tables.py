"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text


def show(*parts: RenderableType) -> None:
    """Prints to stdout."""
    console = Console()
    for part in parts:
        console.print(part)


def two_columns(rows: Mapping[str, Any], title: str) -> Table:
    """A table of names and values."""
    table = Table("", "", title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, escape(str(value)))
    return table


def numbers_table(
    title: str, head: Sequence[str], rows: Iterable[Sequence[str]], total: Sequence[str] = ()
) -> Table:
    """A table of a name and numbers in each row, and in `total` below a line."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(head):
        table.add_column(column, justify="right" if i else "left", no_wrap=not i)
    for row in rows:
        table.add_row(*row)
    if total:
        table.add_section()
        table.add_row(*total)
    return table


def note(text: str) -> Text:
    """A remark on the table above it."""
    return Text(text, style="italic")
