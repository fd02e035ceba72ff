"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text


def show(*parts: RenderableType) -> None:
    """Prints to stdout."""
    console = Console()
    for part in parts:
        console.print(part)


def two_columns(rows: Mapping[str, Any], title: str) -> Table:
    """A table of names and values; a value that a line has no room for goes on below."""
    table = Table("", "", title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, Text(str(value), overflow="fold"))
    return table


class NumbersTable:
    """A table of a name and numbers in each row, in which no number is cut or broken.

    Columns that a line has no room for follow below, beside the names again.
    """

    def __init__(
        self,
        title: str,
        head: Sequence[str],
        rows: Iterable[Sequence[str]],
        total: Sequence[str] = (),
        words: Collection[int] = (),
    ):
        """Takes plain text, no markup.

        Args:
          title: above the table.
          head: titles of the columns; where all are empty none is shown.
          rows: a cell for each column.
          total: a last row, below a line.
          words: columns of text, which is broken between words.
        """
        self.title, self.head, self.words = title, head, words
        self.rows = [*rows, total] if total else list(rows)
        self.total = bool(total)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draws as many columns at once as the width allows."""
        for i, columns in enumerate(self._blocks(options.max_width)):
            yield self._table(self.title if i == 0 else None, columns, options.max_width)

    def fits(self, width: int) -> bool:
        """Whether all columns stand beside each other without a break in a cell."""
        return self._width(range(len(self.head)), self._whole) <= width

    def _blocks(self, width: int) -> list[list[int]]:
        """Columns that are drawn beside each other, the names first."""
        blocks = [[0]]
        for column in range(1, len(self.head)):
            if len(blocks[-1]) > 1 and self._width([*blocks[-1], column], self._least) > width:
                blocks.append([0])
            blocks[-1].append(column)
        return blocks

    def _table(self, title: str | None, columns: Sequence[int], width: int) -> Table:
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.show_header = any(self.head)
        broken = self._width(columns, self._whole) > width
        for i in columns:
            numbers = i > 0 and i not in self.words
            table.add_column(
                Text(self.head[i]),
                justify="right" if numbers else "left",
                width=self._least(i) if broken and numbers else None,
                overflow="fold",
            )
        for row in self.rows:
            if self.total and row is self.rows[-1]:
                table.add_section()
            table.add_row(*(Text(row[i]) for i in columns))
        return table

    def _width(self, columns: Collection[int], of: Callable[[int], int]) -> int:
        """Characters of a line, the margins and those between columns included."""
        return sum(map(of, columns)) + 3 * (len(columns) - 1) + 2

    def _whole(self, column: int) -> int:
        return max(cell_len(row[column]) for row in [self.head, *self.rows])

    def _least(self, column: int) -> int:
        """Of a column whose title is broken between words, and its cells if they are text."""
        texts = [self.head[column].split()]
        for row in self.rows:
            texts.append(row[column].split() if column in self.words else [row[column]])
        return max((cell_len(word) for words in texts for word in words), default=0)


def note(text: str) -> Text:
    """A remark on the table above it."""
    return Text(text, style="italic")
