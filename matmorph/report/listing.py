"""Rows that each begin with a path, for the terminal: a path is never broken, so that it can be marked and pasted into `--node`.

Where a line with path and figures is too long for the terminal, the path has a line of its own and the figures stand below it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO

from rich.console import Console
from rich.table import Table

_WIDE = 10_000
NAME_WIDTH = 20
"""Longest name of a rule in a table; report.json has it whole."""


@dataclass(frozen=True, slots=True)
class Column:
    """`numeric`: to the right. `narrow`: columns that its heading may take on a terminal, None = as it is."""

    name: str
    numeric: bool = False
    narrow: int | None = None


def cut(name: str) -> str:
    """At most NAME_WIDTH characters, the end replaced by an ellipsis where it is longer."""
    return name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 1]}…"


def plain_table(console: Console) -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 2), collapse_padding=True, header_style="bold" if console.is_terminal else "")


def print_listing(console: Console, columns: Sequence[Column], rows: Iterable[tuple[str, Sequence[str]]]) -> None:
    """`rows`: (path, cells), one cell per column."""
    held = list(rows)
    whole = _table(console, [Column("path"), *columns], [(path, *cells) for path, cells in held])
    if not console.is_terminal or _width(console, whole) <= console.width:
        console.print(whole)
        return
    lines = _lines(console, _table(console, columns, [tuple(cells) for _, cells in held]))
    head = len(lines) - len(held)
    for line in lines[:head]:
        console.print(f"  {line}", style="bold", soft_wrap=True)
    for (path, _), line in zip(held, lines[head:], strict=True):
        console.print(path, soft_wrap=True)
        console.print(f"  {line}", soft_wrap=True)


def print_rows(console: Console, columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> None:
    """Rows without a path."""
    console.print(_table(console, columns, rows))


def _table(console: Console, columns: Iterable[Column], rows: Iterable[Sequence[str]]) -> Table:
    table = plain_table(console)
    for column in columns:
        narrow = column.narrow if console.is_terminal else None
        table.add_column(
            column.name, justify="right" if column.numeric else "left", overflow="fold", no_wrap=narrow is None, max_width=narrow
        )
    for row in rows:
        table.add_row(*row)
    return table


def _width(console: Console, table: Table) -> int:
    return console.measure(table, options=console.options.update(max_width=_WIDE)).maximum


def _lines(console: Console, table: Table) -> list[str]:
    """The table as text, a line per row behind those of the headings."""
    wide = type(console)(file=StringIO(), width=_WIDE, highlight=False, markup=False, no_color=True)
    with wide.capture() as captured:
        wide.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]
