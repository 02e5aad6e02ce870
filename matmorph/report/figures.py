"""The figures of a page as data for its template: errors against their bound, spectra, sizes by layer, the layer map, the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor, log10
from typing import Any

from markupsafe import Markup

from matmorph.report import charts
from matmorph.report.charts import Frame
from matmorph.report.model import Pair, Report, SiteRow
from matmorph.report.palette import Palette
from matmorph.report.table import Group, count, error_text, group, outcome, percent, size

METRICS = ("output_error", "weight_error")
_PANEL = (318, 150)
_SPARK = (74, 20)
_FLOOR = -6.0
"""Spectra are drawn down to this power of ten below their first value."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One small chart. `below`: a line of words under it."""

    title: str
    chart: Markup
    below: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """Panels that share their axes."""

    key: str
    title: str
    panels: tuple[Panel, ...]


# ---- errors


def error_figures(report: Report, palette: Palette) -> list[Figure]:
    """One figure per kind of error that was measured, the one with more bounds first; a panel per role."""
    found = []
    for metric in METRICS:
        rows = [row for row in report.sites if getattr(row, metric) is not None]
        rows.sort(key=_by_role(report))
        if rows:
            bounded = sum(_bound(row, metric) is not None for row in rows)
            found.append((-bounded, Figure(metric, metric.replace("_", " "), tuple(_error_panels(rows, metric, palette)))))
    return [figure for _, figure in sorted(found, key=lambda item: item[0])]


def _by_role(report: Report) -> Callable[[SiteRow], int]:
    """Panels stand in the order of the layer map, whichever of their sites were rewritten."""
    order = {role: number for number, role in enumerate(dict.fromkeys(row.role for row in report.sites))}
    return lambda row: order[row.role]


_FELT_AS = {"fitted_error": "output_error"}
_ON = {"weight_error": "", "output_error": "", "fitted_error": ", on the rows it was fitted to"}
"""Of a bound's error: the figure that shows it where it has none of its own, and what the words then say."""


def _bound(row: SiteRow, metric: str) -> float | None:
    return row.bound.value if row.bound is not None and metric in (row.bound.on, _FELT_AS.get(row.bound.on)) else None


def _error_panels(rows: Sequence[SiteRow], metric: str, palette: Palette) -> Iterable[Panel]:
    scale = charts.ticks(max(getattr(row, metric) for row in rows), 3)
    for part in group(rows, lambda row: row.role):
        places = _places(part.rows)
        frame = Frame(*_PANEL, x0=min(places) - 0.5, x1=max(places) + 0.5, y0=0, y1=scale[-1] or 1)
        marks = [charts.y_axis(frame, [(value, charts.tick_text(value)) for value in scale])]
        marks.append(charts.x_axis(frame, [(place, str(place)) for place in charts.even(sorted(set(places)), 12)]))
        points = [(frame.x(place), frame.y(getattr(row, metric))) for place, row in zip(places, part.rows, strict=True)]
        marks.append(charts.path(points, "thread"))
        for (x, y), row in zip(points, part.rows, strict=True):
            words = f"{row.path}: {error_text(getattr(row, metric))}"
            if (low := _bound(row, metric)) is not None and row.bound is not None:
                marks.append(charts.line(x - 6, frame.y(low), x + 6, frame.y(low), "bound"))
                words += f", no rewrite of this form is below {error_text(low)} ({row.bound.name}{_ON[row.bound.on]})"
            marks.append(charts.dot(x, y, 3, palette.kind(row), words))
        below = _range_text(getattr(row, metric) for row in part.rows)
        label = f"{part.first.role}: {metric.replace('_', ' ')} by layer, {below}"
        yield Panel(part.first.role, charts.svg(frame, label, *marks), below)


def _places(rows: Sequence[SiteRow]) -> list[int]:
    """Where rows stand on the axis: their layers, or 0, 1 .. where some have none."""
    layers = [row.layer for row in rows]
    return [layer for layer in layers if layer is not None] if None not in layers else list(range(len(rows)))


def _range_text(values: Iterable[float]) -> str:
    low, high = _ends(values)
    return error_text(low) if error_text(low) == error_text(high) else f"{error_text(low)} to {error_text(high)}"


def _ends(values: Iterable[float]) -> tuple[float, float]:
    found = list(values)
    return min(found), max(found)


# ---- spectra


def spectrum_panels(report: Report) -> list[Panel]:
    """A panel per role and matrix size: a curve per site, later layers stronger, the chosen rank marked on each."""
    rows = [row for row in report.sites if row.spectrum is not None and len(row.spectrum.values) > 1]
    rows.sort(key=_by_role(report))
    parts = group(rows, lambda row: (row.role, row.spectrum and (row.spectrum.of, row.spectrum.size)))
    return _told_apart([_spectrum_panel(part) for part in parts], parts)


def _told_apart(panels: Sequence[Panel], parts: Sequence[Group]) -> list[Panel]:
    """Where two panels would have one title, each carries the path of its first site."""
    titles = [panel.title for panel in panels]
    return [
        replace(panel, title=f"{panel.title} ({part.first.path})") if titles.count(panel.title) > 1 else panel
        for panel, part in zip(panels, parts, strict=True)
    ]


def _spectrum_panel(part: Group) -> Panel:
    first = part.first.spectrum
    full = first.size if first is not None else 1
    curves = [_curve(row) for row in part.rows]
    low = min(min(min(y for _, y in curve) for curve in curves), -1.0)
    powers = range(0, floor(low) - 1, -1)
    frame = Frame(*_PANEL, x0=1, x1=full, y0=powers[-1], y1=0)
    marks = [
        charts.y_axis(frame, [(power, f"1e{power}" if power else "1") for power in powers]),
        charts.x_axis(frame, [(1, "1"), (full // 2, str(full // 2)), (full, str(full))]),
    ]
    ranks = sorted({row.rank for row in part.rows if row.rank is not None})
    if len(ranks) == 1:
        x = frame.x(ranks[0])
        marks.append(charts.line(x, frame.top, x, frame.height - frame.bottom, "chosen"))
    dots = []
    for number, (row, curve) in enumerate(zip(part.rows, curves, strict=True)):
        points = [(frame.x(at), frame.y(power)) for at, power in curve]
        strength = 1.0 if len(curves) == 1 else 0.25 + 0.75 * number / (len(curves) - 1)
        marks.append(charts.path(points, "curve", f"{row.path}: rank {row.rank} of {full}", f"opacity:{strength:.2f}"))
        if (chosen := _at_rank(row, curve)) is not None:
            dots.append(charts.dot(frame.x(chosen[0]), frame.y(chosen[1]), 2.6, "chosen-dot", f"{row.path}: rank {row.rank}"))
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no rank"
    of = f"of {first.of}" if first is not None else ""
    label = f"{part.first.role}: singular values {of} relative to the largest, {len(curves)} sites, {rank} of {full}"
    return Panel(part.first.role, charts.svg(frame, label, *marks, *dots), f"{rank} of {full}, values {of}")


def _curve(row: SiteRow) -> list[tuple[int, float]]:
    """(number, power of ten relative to the first value); where the values end, or are too small to draw, the curve does."""
    spectrum = row.spectrum
    if spectrum is None or spectrum.values[0] <= 0:
        return [(1, 0.0)]
    shares = [(at, value / spectrum.values[0]) for at, value in zip(spectrum.at, spectrum.values, strict=True)]
    return [(at, log10(share)) for at, share in shares if share > 10**_FLOOR]


def _at_rank(row: SiteRow, curve: Sequence[tuple[int, float]]) -> tuple[int, float] | None:
    return next(((at, power) for at, power in curve if at == row.rank), None)


def spark(row: SiteRow) -> Markup:
    """The spectrum of one site in the height of a line of text; empty where there is none."""
    if row.spectrum is None or len(row.spectrum.values) < 2:
        return Markup("")
    curve = _curve(row)
    frame = Frame(*_SPARK, x0=1, x1=row.spectrum.size, y0=min(curve[-1][1], -1.0), y1=0, left=2, right=3, top=3, bottom=2)
    points = [(frame.x(at), frame.y(power)) for at, power in curve[:: 1 + len(curve) // 25]]
    chosen = _at_rank(row, curve)
    mark = charts.dot(frame.x(chosen[0]), frame.y(chosen[1]), 2.2, "chosen-dot") if chosen is not None else Markup("")
    label = f"singular values of {row.spectrum.of}, rank {row.rank} of {row.spectrum.size}"
    return charts.svg(frame, label, charts.path(points, "curve"), mark)


# ---- sizes


@dataclass(frozen=True, slots=True)
class Bar:
    """Bytes of one layer: shares (percent) of the longest bar, and words."""

    name: str
    before: float
    after: float
    words: str
    kept: str
    same: bool


def size_bars(report: Report) -> list[Bar]:
    """A bar per layer in the model's order, embeddings and other sites outside the layers by role, and last what belongs to no site."""
    parts = group(report.sites, lambda row: row.role if row.layer is None else row.layer)
    bars = [(part.first.role if part.first.layer is None else f"layer {part.first.layer}", part.total("bytes")) for part in parts]
    rest = (
        report.totals.bytes[0] - sum(before for _, (before, _) in bars),
        report.totals.bytes[1] - sum(after for _, (_, after) in bars),
    )
    if min(rest) >= 0 and max(rest) > 0:
        bars.append(("not in matmuls", rest))
    longest = max((max(pair) for _, pair in bars), default=0) or 1
    return [_bar(name, pair, longest) for name, pair in bars]


def _bar(name: str, pair: Pair, longest: int) -> Bar:
    before, after = (100 * value / longest for value in pair)
    return Bar(name, before, after, arrow(pair), percent(pair), pair[0] == pair[1])


def arrow(pair: Pair, unit: Any = size) -> str:
    """`7.08 → 4.24 MB`; one figure where nothing changed."""
    before, after = unit(pair[0]), unit(pair[1])
    if before == after:
        return str(after)
    number, _, name = before.partition(" ")
    return f"{number if after.endswith(f' {name}') else before} → {after}"


# ---- layer map


@dataclass(frozen=True, slots=True)
class Cell:
    """One site on the map. `number`: of its row in the report; `kept`: percent of its bytes that are left."""

    number: int
    kind: str
    code: str
    kept: float
    words: str


@dataclass(frozen=True, slots=True)
class LayerMap:
    """`layers` across, `rows` (role, cells of each layer) down; `outside`: (role, cells) of sites that belong to no layer."""

    layers: tuple[int, ...]
    rows: tuple[tuple[str, tuple[tuple[Cell, ...], ...]], ...]
    outside: tuple[tuple[str, tuple[Cell, ...]], ...]
    legend: tuple[tuple[str, str, str, int], ...]


def layer_map(report: Report, palette: Palette) -> LayerMap:
    """Every site once, in the colour of what became of it."""
    numbered = list(enumerate(report.sites))
    layers = sorted({row.layer for row in report.sites if row.layer is not None})
    inside: dict[str, dict[int, list[Cell]]] = {}
    outside: dict[str, list[Cell]] = {}
    for number, row in numbered:
        cell = _cell(number, row, palette)
        if row.layer is None:
            outside.setdefault(row.role, []).append(cell)
        else:
            inside.setdefault(row.role, {}).setdefault(row.layer, []).append(cell)
    return LayerMap(
        tuple(layers),
        tuple((role, tuple(tuple(cells.get(layer, ())) for layer in layers)) for role, cells in inside.items()),
        tuple((role, tuple(cells)) for role, cells in outside.items()),
        palette.legend(report.sites),
    )


def _cell(number: int, row: SiteRow, palette: Palette) -> Cell:
    before, after = row.bytes
    kept = min(100.0, 100 * after / before) if before else 100.0
    rank = f", rank {row.rank}" if row.rank is not None else ""
    return Cell(number, palette.kind(row), palette.code(row), round(kept, 1), f"{row.path}: {outcome(row)}{rank}, {arrow(row.bytes)}")


# ---- Pareto front


@dataclass(frozen=True, slots=True)
class FrontFigure:
    """`head` and `rows`: the points as text, smallest first."""

    chart: Markup
    about: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def front_figure(data: Mapping[str, Any], report: Report) -> FrontFigure | None:
    """A front as pareto.json has it: size against error, this model's point marked. None without two points that have both."""
    resource = str(data.get("resource") or "bytes")
    whole = data.get("of") != "matched"
    points = data.get("points")
    listed = [point for point in points if isinstance(point, Mapping)] if isinstance(points, list | tuple) else []
    known = [(_number(point, resource, "total"), _number(point, "error"), point) for point in listed]
    found = sorted(((x, y, point) for x, y, point in known if x is not None and y is not None), key=lambda item: item[:2])
    if len(found) < 2:
        return None
    unit = size if resource == "bytes" else count
    current = getattr(report.totals, resource, (0, None))[1] if whole else None
    xs, ys = charts.ticks(found[-1][0], 6), charts.ticks(max(y for _, y, _ in found), 4)
    frame = Frame(560, 260, x0=0, x1=xs[-1] or 1, y0=0, y1=ys[-1] or 1, left=48, right=34, bottom=24)
    marks = [charts.y_axis(frame, [(value, charts.tick_text(value)) for value in ys])]
    marks.append(charts.x_axis(frame, [(value, unit(value)) for value in xs]))
    marks.append(charts.path([(frame.x(x), frame.y(y)) for x, y, _ in found], "thread"))
    for x, y, _ in found:
        words = f"{unit(x)}, error {error_text(y)}" + (", this model" if x == current else "")
        marks.append(charts.dot(frame.x(x), frame.y(y), 4.5, "front here" if x == current else "front", words))
    label = f"Pareto front of {len(found)} models: error against {resource}"
    rows = tuple(
        (_budget(point, unit), unit(x), _share(point), error_text(y), "this model" if x == current else "") for x, y, point in found
    )
    about = f"{resource} of the {'whole model' if whole else 'matmuls that the rules match'}"
    return FrontFigure(charts.svg(frame, label, *marks), about, ("budget", resource, "share", "error", ""), rows)


def _number(point: Mapping[str, Any], *keys: str) -> float | None:
    """The first of the keys that has a figure, or the second of a (before, after) pair."""
    for key in keys:
        value = point.get(key)
        last = value[-1] if isinstance(value, list | tuple) and value else value
        if isinstance(last, int | float) and not isinstance(last, bool):
            return float(last)
    return None


def _budget(point: Mapping[str, Any], unit: Callable[[float], str]) -> str:
    limit = _number(point, "limit")
    return unit(limit) if limit is not None else str(point.get("budget", "-"))


def _share(point: Mapping[str, Any]) -> str:
    share = _number(point, "share")
    return "-" if share is None else f"{100 * share:.1f} %"
