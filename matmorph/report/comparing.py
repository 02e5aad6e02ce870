"""Two reports side by side: totals, and each matmul under both. Tables for the terminal and a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console

from matmorph.report.html import render
from matmorph.report.listing import Column, plain_table, print_listing, print_rows
from matmorph.report.model import Report, SiteRow
from matmorph.report.palette import palette
from matmorph.report.reading import Context
from matmorph.report.table import LONG, Group, count, error_text, group, outcome, rank_text, size


@dataclass(frozen=True, slots=True)
class ComparedModel:
    """One of the two: what it is called here, its report and what stands beside it."""

    name: str
    report: Report
    context: Context


@dataclass(frozen=True, slots=True)
class ComparedFigure:
    """One figure of both as text, `ratio` = right over left where that says something; `left` and `right` as numbers, None = not known."""

    name: str
    left: float | None
    right: float | None
    unit: Callable[[float], str]

    def text(self, value: float | None) -> str:
        return "-" if value is None else self.unit(value)

    @property
    def ratio(self) -> str:
        return f"{self.right / self.left:.2f} x" if self.left and self.right is not None else "-"


def figures(left: ComparedModel, right: ComparedModel) -> list[ComparedFigure]:
    """Totals after the rewrite, errors, parity and times."""

    def of(name: str, read: Callable[[ComparedModel], float | None], unit: Callable[[float], str]) -> ComparedFigure:
        return ComparedFigure(name, read(left), read(right), unit)

    return [
        of("size of weights", lambda side: side.report.totals.bytes[1], size),
        of("parameters", lambda side: side.report.totals.parameters[1], count),
        of("MACs per token", lambda side: side.report.totals.macs[1], count),
        of("matmuls rewritten", lambda side: sum(row.status == "rewritten" for row in side.report.sites), lambda number: f"{number:.0f}"),
        of("trainable", lambda side: side.report.totals.trainable, count),
        of("largest output error", lambda side: _worst(side.report, "output_error"), error_text),
        of("largest weight error", lambda side: _worst(side.report, "weight_error"), error_text),
        of("difference from torch", lambda side: side.report.parity.max_difference if side.report.parity else None, _short),
        of("seconds to compile", _seconds, lambda number: f"{number:.1f} s"),
        of("ms of a batch (demo)", _batch, lambda number: f"{1e3 * number:.0f} ms"),
    ]


def _short(number: float) -> str:
    return f"{number:.1e}"


def _worst(report: Report, metric: str) -> float | None:
    return max((float(value) for row in report.sites if (value := getattr(row, metric)) is not None), default=None)


def _seconds(side: ComparedModel) -> float | None:
    found = side.context.run.get("seconds")
    figures = [value for value in found.values() if isinstance(value, int | float)] if isinstance(found, Mapping) else []
    return float(sum(figures)) if figures else None


def _batch(side: ComparedModel) -> float | None:
    demo = side.context.run.get("demo")
    value = demo.get("rewritten_s") if isinstance(demo, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


# ---- sites


@dataclass(frozen=True, slots=True)
class RowPair:
    """A matmul by its path under both; None where one model does not have it."""

    path: str
    left: SiteRow | None
    right: SiteRow | None

    @property
    def either(self) -> SiteRow:
        row = self.left or self.right
        if row is None:
            raise ValueError(f"{self.path}: in neither report")
        return row

    @property
    def differs(self) -> bool:
        """In what was done, or in what it costs; errors alone do not count, they differ by rounding."""
        if self.left is None or self.right is None:
            return True
        return _done(self.left) != _done(self.right) or self.left.bytes != self.right.bytes


def _done(row: SiteRow) -> tuple[object, ...]:
    return outcome(row), row.rank, row.parameters


def matches(left: Report, right: Report) -> list[RowPair]:
    """Every path of either, in the order of the left one, what only the right one has behind it."""
    first, second = ({row.path: row for row in report.sites} for report in (left, right))
    return [RowPair(path, first.get(path), second.get(path)) for path in dict.fromkeys((*first, *second))]


def comparison(left: ComparedModel, right: ComparedModel) -> dict[str, Any]:
    """The comparison as plain data."""

    def of(row: SiteRow | None) -> dict[str, Any] | None:
        if row is None:
            return None
        plain = asdict(row)
        return {name: plain[name] for name in ("status", "method", "rank", "bytes", "parameters", "macs", "weight_error", "output_error")}

    return {
        "left": left.name,
        "right": right.name,
        "figures": [{"name": figure.name, "left": figure.left, "right": figure.right} for figure in figures(left, right)],
        "sites": [
            {"path": match.path, "role": match.either.role, "differs": match.differs, "left": of(match.left), "right": of(match.right)}
            for match in matches(left.report, right.report)
        ],
    }


# ---- terminal


def print_comparison(console: Console, left: ComparedModel, right: ComparedModel, every: bool = False) -> None:
    """Totals of both, then the matmuls that differ, or one line per role and pair of outcomes where there are many."""
    _print_figures(console, left, right)
    found = matches(left.report, right.report)
    shown = found if every else [match for match in found if match.differs]
    if not shown:
        console.print(f"all {len(found)} matmuls are treated alike")
        return
    parts = _grouped(shown) if len(shown) > LONG and not every else [[match] for match in shown]
    hint = " (--all lists every one)" if len(parts) < len(shown) else ""
    if not every:
        console.print(f"{len(shown)} of {len(found)} matmuls differ{hint}")
    _print_matches(console, parts, summary=bool(hint))


def _print_figures(console: Console, left: ComparedModel, right: ComparedModel) -> None:
    table = plain_table(console)
    table.add_column("")
    for name in (left.name, right.name, "ratio"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_row("spec", left.report.spec_name or "-", right.report.spec_name or "-", "")
    for figure in figures(left, right):
        if figure.left is not None or figure.right is not None:
            table.add_row(figure.name, figure.text(figure.left), figure.text(figure.right), figure.ratio)
    console.print(table)


def _grouped(found: Sequence[RowPair]) -> list[list[RowPair]]:
    parts: dict[object, list[RowPair]] = {}
    for match in found:
        parts.setdefault((match.either.role, *(row and outcome(row) for row in (match.left, match.right))), []).append(match)
    return list(parts.values())


def _print_matches(console: Console, parts: Sequence[Sequence[RowPair]], summary: bool) -> None:
    columns = [Column(name, numeric=name != "method") for name in ("method", "", "rank", "", "size", "", "output error", "")]
    rows = [[cell(side) for cell in _CELLS for side in _sides(part)] for part in parts]
    if summary:
        heads = [[part[0].either.role, str(len(part))] for part in parts]
        lines = [[*head, *cells] for head, cells in zip(heads, rows, strict=True)]
        print_rows(console, [Column("role"), Column("sites", numeric=True), *columns], lines)
    else:
        print_listing(console, columns, zip((part[0].path for part in parts), rows, strict=True))


def _sides(part: Sequence[RowPair]) -> Iterator[list[SiteRow]]:
    yield [match.left for match in part if match.left is not None]
    yield [match.right for match in part if match.right is not None]


_CELLS: tuple[Callable[[list[SiteRow]], str], ...] = (
    lambda rows: outcome(rows[0]) if rows else "absent",
    lambda rows: rank_text(rows),
    lambda rows: size(sum(row.bytes[1] for row in rows)) if rows else "-",
    lambda rows: error_text(Group(tuple(rows)).worst("output_error")) if rows else "-",
)


# ---- page


@dataclass(frozen=True, slots=True)
class ComparedBar:
    """Bytes of one layer under both, as shares (percent) of the longest."""

    name: str
    left: float
    right: float
    words: str


def comparison_page(left: ComparedModel, right: ComparedModel) -> str:
    """Both as one self-contained page. Equal arguments give equal text."""
    found = matches(left.report, right.report)
    return render(
        "compare.html.j2",
        title=f"{left.name} and {right.name}",
        left=left,
        right=right,
        figures=[figure for figure in figures(left, right) if figure.left is not None or figure.right is not None],
        matches=found,
        differing=sum(match.differs for match in found),
        bars=_bars(left.report, right.report),
        palette=palette([*left.report.sites, *right.report.sites]),
        methods=list(dict.fromkeys(outcome(row) for match in found for row in (match.left, match.right) if row is not None)),
    )


def _bars(left: Report, right: Report) -> list[ComparedBar]:
    sums: dict[str, list[int]] = {}
    for side, report in enumerate((left, right)):
        for part in group(report.sites, lambda row: row.role if row.layer is None else row.layer):
            name = part.first.role if part.first.layer is None else f"layer {part.first.layer}"
            sums.setdefault(name, [0, 0])[side] = part.total("bytes")[1]
    longest = max((max(pair) for pair in sums.values()), default=0) or 1
    return [ComparedBar(name, 100 * a / longest, 100 * b / longest, f"{size(a)} and {size(b)}") for name, (a, b) in sums.items()]
