"""Tables of a report for the terminal: rich on a terminal, plain unwrapped columns in a pipe.

A model with many sites is summarised by role (one line for all sites that were treated alike); `every=True` lists each site.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import IO, Any

from rich.console import Console
from rich.text import Text

from matmorph.report.listing import Column, cut, print_listing, print_rows
from matmorph.report.model import Pair, Parity, Report, SiteRow
from matmorph.runtime.format.printable import printable

LONG = 24
"""A report with more sites than this is summarised unless every row is asked for."""

_PIPE_WIDTH = 10_000  # no wrapping in a pipe: a line there is a record


class PlainConsole(Console):
    """Shows names as they are: a terminal obeys the control characters in them, and this one does not hand them on."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def make_console(file: IO[str] | None = None) -> Console:
    """A console that wraps and colours on a terminal only. `file` None = the standard output at the time of the call."""
    console = PlainConsole(file=file or sys.stdout, highlight=False, markup=False)
    if not console.is_terminal:
        console = PlainConsole(file=file or sys.stdout, highlight=False, markup=False, no_color=True, width=_PIPE_WIDTH)
    return console


# ---- numbers


def count(number: float) -> str:
    """`1234567` -> "1.23 M" (decimal units, three digits)."""
    return _scaled(number, (("G", 1e9), ("M", 1e6), ("k", 1e3)), "")


def size(number: float) -> str:
    """Bytes in decimal units: `90868376` -> "90.9 MB"."""
    return _scaled(number, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "B")


def _scaled(number: float, units: Sequence[tuple[str, float]], base: str) -> str:
    for unit, factor in units:
        if abs(number) >= factor:
            scaled = number / factor
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {unit}"
    return f"{number:.0f} {base}".strip()


def percent(pair: Pair) -> str:
    before, after = pair
    return f"{100 * after / before:.1f} %" if before else "-"


def change(pair: Pair, unit: Callable[[float], str]) -> str:
    """ "14.2 -> 8.49 MB", or a single figure where nothing changed; a unit that both share is written once."""
    before, after = (unit(value) for value in pair)
    if pair[0] == pair[1]:
        return before
    number, _, name = before.partition(" ")
    return f"{number if after.endswith(f' {name}') else before} -> {after}"


def shape_text(shape: Iterable[int]) -> str:
    return "x".join(str(dim) for dim in shape)


def error_text(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value >= 1e-3 or value == 0 else f"{value:.0e}"


def rank_text(rows: Sequence[SiteRow]) -> str:
    """ "64", "88..115", "<= 96" (the data decides), "-" without a rank."""
    ranks = [row.rank for row in rows if row.rank is not None]
    if not ranks:
        return "-"
    prefix = "<= " if any(row.rank_at_most for row in rows) else ""
    low, high = min(ranks), max(ranks)
    return f"{prefix}{low}" if low == high else f"{prefix}{low}..{high}"


Time = tuple[int, float, float]
"""(rows, low, high): predicted time over dense at a number of rows."""


def slowest(rows: Iterable[SiteRow]) -> tuple[SiteRow, Time] | None:
    """The row and the number of rows of x at which the worse end of the predicted time is largest; None where none is predicted."""
    return max(((row, time) for row in rows for time in row.times), key=lambda found: found[1][2], default=None)


def span(time: Time, unit: str, between: str) -> str:
    """Its range in words, one number where both ends are the same."""
    _, low, high = time
    return f"{low:g} {unit}" if low == high else f"{low:g}{between}{high:g} {unit}"


def time_text(rows: Sequence[SiteRow]) -> str:
    """ "7..16 x" at the number of rows where it is worst, "-" where no row is predicted to be slower than dense."""
    worst = slowest(rows)
    return span(worst[1], "x", "..") if worst is not None and worst[1][2] > 1 else "-"


def parity_line(parity: Parity) -> str:
    batches = "1 batch" if parity.cases == 1 else f"{parity.cases} batches"
    return f"ONNX Runtime agrees with torch to {parity.max_difference:.1e} on {batches} ({parity.provider})"


# ---- groups


@dataclass(frozen=True, slots=True)
class Group:
    """Sites that were treated alike; `rows` in report order."""

    rows: tuple[SiteRow, ...]

    @property
    def first(self) -> SiteRow:
        return self.rows[0]

    def total(self, field: str) -> Pair:
        """Sum of a (before, after) field."""
        pairs: list[Pair] = [getattr(row, field) for row in self.rows]
        return sum(before for before, _ in pairs), sum(after for _, after in pairs)

    def worst(self, field: str) -> float | None:
        """The largest of an error field over the sites that have it."""
        values = [getattr(row, field) for row in self.rows if getattr(row, field) is not None]
        return max(values) if values else None

    def layers(self) -> str:
        layers = sorted({row.layer for row in self.rows if row.layer is not None})
        if not layers:
            return "-"
        gapless = layers == list(range(layers[0], layers[-1] + 1))
        if len(layers) > 1 and gapless:
            return f"{layers[0]}..{layers[-1]}"
        return ", ".join(str(layer) for layer in layers)


def group(rows: Sequence[SiteRow], key: Callable[[SiteRow], object]) -> list[Group]:
    """Groups in order of their first row."""
    found: dict[object, list[SiteRow]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return [Group(tuple(members)) for members in found.values()]


def outcome(row: SiteRow) -> str:
    """The method where a site was rewritten, else "rejected" or "kept"."""
    if row.status == "rewritten":
        return " + ".join(part.method for part in row.parts) or row.method or "rewritten"
    return "rejected" if row.status == "rejected" else "kept"


# ---- tables


def _summarised(console: Console, report: Report, groups: int, every: bool) -> bool:
    shorter = not every and len(report.sites) > LONG and groups < len(report.sites)
    if shorter:
        console.print(f"{len(report.sites)} sites in {groups} groups (--all lists every site)")
    return shorter


def print_inspect(console: Console, report: Report, every: bool = False) -> None:
    """Every site, or one line per (role, form, shape) of a long model."""
    console.print(f"{report.name}: {count(report.totals.parameters[0])} parameters, {size(report.totals.bytes[0])}")
    groups = group(report.sites, lambda row: (row.role, row.form, row.shape))
    if _summarised(console, report, len(groups), every):
        names = ("role", "form", "shape", "sites", "layers", "parameters", "uses")
        lines = []
        for part in groups:
            row = part.first
            uses = sum(member.applications for member in part.rows)
            parameters = count(part.total("parameters")[0])
            lines.append((row.role, row.form, shape_text(row.shape), str(len(part.rows)), part.layers(), parameters, str(uses)))
        print_rows(console, [Column(name, name in ("sites", "parameters", "uses")) for name in names], lines)
    else:
        columns = [Column(name, name in ("parameters", "uses")) for name in ("role", "form", "shape", "parameters", "uses")]
        cells = [(row.role, row.form, shape_text(row.shape), count(row.parameters[0]), str(row.applications)) for row in report.sites]
        print_listing(console, columns, zip((row.path for row in report.sites), cells, strict=True))
    _print_blocked(console, report)
    _print_notes(console, report)


_FIGURES = ("rank", "weight error", "output error", "size", "time")
_ERROR_WIDTH = 6
_ROLE_BESIDE_PATH = 100
"""Columns that a terminal needs before a table of sites shows the role beside the path."""


def print_plan(console: Console, report: Report, every: bool = False) -> None:
    """What was done (or would be, for a plan): every site, or one line per (role, rule, outcome) of a long model; then totals and notes."""
    groups = group(report.sites, lambda row: (row.role, row.rule, outcome(row)))
    summary = _summarised(console, report, len(groups), every)
    rules = ("rule",) if len({row.rule for row in report.sites if row.rule is not None}) > 1 else ()
    slow = time_text(report.sites) != "-"
    figures = [name for name in _FIGURES if not (report.is_plan and name.endswith("error")) and (slow or name != "time")]
    roomy = console.width >= _ROLE_BESIDE_PATH
    columns = [
        *(Column(name) for name in (("role",) if summary or roomy else ())),
        *(Column(name, numeric=True) for name in (("sites",) if summary else ())),
        *(Column(name) for name in (*rules, "method")),
        *(Column(name, numeric=True, narrow=_ERROR_WIDTH if name.endswith("error") else None) for name in figures),
    ]
    lines: list[tuple[str, list[str]]] = []
    for part in groups if summary else [Group((row,)) for row in report.sites]:
        row = part.first
        figure = {
            "rank": rank_text(part.rows),
            "weight error": error_text(part.worst("weight_error")),
            "output error": error_text(part.worst("output_error")),
            "size": change(part.total("bytes"), size),
            "time": time_text(part.rows),
        }
        names = [row.role] if summary or roomy else []
        names += [str(len(part.rows))] if summary else []
        lines.append((row.path, [*names, *([cut(row.rule or "-")] if rules else []), outcome(row), *(figure[name] for name in figures)]))
    if summary:
        print_rows(console, columns, [cells for _, cells in lines])
    else:
        print_listing(console, columns, lines)
    if slow:
        console.print("time: predicted, over dense, at the worst number of rows (export.tokens)")
    if summary and not report.is_plan:
        console.print("errors: the worst of each group, relative to the original")
    _print_reasons(console, report)
    _print_notes(console, report)
    print_totals(console, report)
    for title in report.unplaced:
        console.print(f"which nodes {title} hands back to the CPU is known of a file alone: compile says which")


def print_totals(console: Console, report: Report) -> None:
    """Parameters, bytes and MACs of the whole model, before and after."""
    totals = report.totals
    done = sum(row.status == "rewritten" for row in report.sites)
    left = sum(row.open for row in report.sites)
    more = f", {left} more {'is' if left == 1 else 'are'} left to the budget, which decides when the model is compiled" if left else ""
    console.print(f"{'would rewrite' if report.is_plan else 'rewrote'} {done} of {len(report.sites)} sites{more}")
    figures = [("parameters", totals.parameters, count), ("bytes", totals.bytes, size), ("MACs per token", totals.macs, count)]
    if totals.cache is not None:
        figures.append(("cache per token", totals.cache, size))
    width = max(len(change(pair, unit)) for _, pair, unit in figures)
    for name, pair, unit in figures:
        console.print(f"  {name:<15} {change(pair, unit):<{width}}  {percent(pair):>7}")


def _print_reasons(console: Console, report: Report) -> None:
    """Why sites were rejected, each reason once with its number of sites."""
    reasons = Counter(row.reason for row in report.sites if row.status == "rejected" and row.reason)
    for reason, sites in reasons.items():
        console.print(f"rejected ({sites} site{'s' if sites > 1 else ''}): {reason}")


def _print_blocked(console: Console, report: Report) -> None:
    """What no method takes, each reason once with its number of sites."""
    for part in group([row for row in report.sites if row.reason and row.status == "unclaimed"], lambda row: (row.form, row.reason)):
        console.print(f"no method takes {len(part.rows)} of form {part.first.form}: {part.first.reason}")


def _print_notes(console: Console, report: Report) -> None:
    for note in report.notes:
        console.print(f"note: {note}")
