"""Rows of text as a table for a terminal; with rich where it is installed."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Collection, Sequence


def to_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[str] = ()) -> str:
    """The table, without a line end.

    Args:
        columns: Heads.
        rows: Cells, as many a row as there are columns.
        left: Columns that are aligned on the left; the others are numbers.
    """
    text = _rich(columns, rows, left) if importlib.util.find_spec("rich") else _plain(columns, rows, left)
    return text.rstrip()


def _rich(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str]) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    stream = io.StringIO()
    Console(file=stream, width=150).print(table)
    return stream.getvalue()


def _plain(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str]) -> str:
    cells = [columns, *rows]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        aligned = zip(columns, row, widths, strict=True)
        return "  ".join(cell.ljust(width) if name in left else cell.rjust(width) for name, cell, width in aligned)

    return "\n".join(line(row) for row in cells)
