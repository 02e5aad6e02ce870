"""The report as one self-contained page: no network, readable without its script, light or dark as the reader's system is or as chosen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from matmorph.report.charts import TIMES
from matmorph.report.figures import Cell, Panel, arrow, error_figures, front_figure, layer_map, size_bars, spark, spectrum_panels
from matmorph.report.model import Pair, Report, SiteRow
from matmorph.report.palette import palette
from matmorph.report.reading import Context
from matmorph.report.table import count, error_text, outcome, percent, rank_text, shape_text, size, slowest, span
from matmorph.runtime.format.evaluations import evaluations
from matmorph.runtime.format.printable import printable

LINE = 32
_NOTHING = Context()
_MEASUREMENTS = 4
"""Of a folder that are shown: the newest."""


@dataclass(frozen=True, slots=True)
class Card:
    """One figure of the summary; `pair` draws what is left as a bar."""

    name: str
    value: str
    below: str = ""
    pair: Pair | None = None


def html_page(report: Report, context: Context = _NOTHING) -> str:
    """`report.html`. Equal arguments give equal text."""
    colours = palette(report.sites)
    errors, spectra, bars = error_figures(report, colours), spectrum_panels(report), size_bars(report)
    curve = front_figure(context.pareto, report)
    shown = {
        "summary": ("Summary", True),
        "map": ("Layer map", bool(report.sites)),
        "errors": ("Errors", bool(errors)),
        "spectra": ("Singular values", bool(spectra)),
        "sizes": ("Sizes", bool(bars)),
        "pareto": ("Pareto front", curve is not None),
        "sites": ("Matmuls", True),
        "placement": ("Placement", bool(report.placements)),
        "notes": ("Notes", bool(report.notes)),
        "spec": ("Spec", bool(context.spec)),
        "made": ("Versions and hashes", bool(report.versions or context.files or context.source_sha256)),
    }
    return render(
        "report.html.j2",
        report=report,
        context=context,
        title=f"{report.name} by {report.spec_name}" if report.spec_name else report.name,
        lead=_lead(report),
        sections=[(key, name) for key, (name, there) in shown.items() if there],
        cards=list(_cards(report, context.run)),
        palette=colours,
        map=layer_map(report, colours),
        errors=errors,
        spectra=spectra,
        spectra_note=_spectra_note(report),
        bars=bars,
        front=curve,
        measured=any(row.weight_error is not None or row.output_error is not None for row in report.sites),
        methods=list(dict.fromkeys(outcome(row) for row in report.sites)),
        statuses=list(dict.fromkeys(row.status for row in report.sites)),
        run=list(_run(context.run)),
    )


def render(name: str, **values: Any) -> str:
    """A page from one of the package's templates, its style and script inside. Everything else is escaped."""
    source = files("matmorph.report") / "templates"
    own = {key: Markup((source / f"page.{key}").read_text(encoding="utf-8")) for key in ("css", "js")}
    return printable(_environment().get_template(name).render(**own, **values))


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("matmorph.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {
        "outcome": outcome,
        "error": error_text,
        "shape": shape_text,
        "size": size,
        "sizes": arrow,
        "count": count,
        "counts": lambda pair: arrow(pair, count),
        "rank": lambda row: rank_text([row]),
        "value": lambda figure: "" if figure is None else figure,
        "breakable": breakable,
        "fitted": fitted,
        "spark": spark,
    }
    made.globals |= {"square": square, "drawn": drawn}
    return made


def breakable(path: str) -> Markup:
    """A dotted path that may be broken behind its dots."""
    return Markup(str(escape(path)).replace(".", ".<wbr>"))


def fitted(path: str) -> Markup:
    """A path for a column that holds LINE characters in a line. Every place to break costs time when the table is laid out."""
    return Markup('<span class="long">{}</span>').format(breakable(path)) if len(path) > LINE else escape(path)


def square(cell: Cell) -> Markup:
    """A site on the map: a link to its row."""
    return Markup('<a class="cell {}" href="#site-{}" style="--left:{}%" title="{}" aria-label="{}">{}</a>').format(
        cell.kind, cell.number, cell.kept, cell.words, cell.words, cell.code
    )


def drawn(panel: Panel) -> Markup:
    """A panel of a figure."""
    return Markup("<figure><figcaption>{} <span>{}</span></figcaption>{}</figure>").format(panel.title, panel.below, panel.chart)


def _lead(report: Report) -> str:
    done = sum(row.status == "rewritten" for row in report.sites)
    refused = sum(row.status == "rejected" for row in report.sites)
    words = [f"{done} of {len(report.sites)} matmuls {'would be ' if report.is_plan else ''}rewritten"]
    words += [f"{refused} rejected"] if refused else []
    left = sum(row.open for row in report.sites)
    words += [f"{left} left to the budget"] if left else []
    words += [f"{count(report.totals.trainable)} trainable"] if report.totals.trainable else []
    return " · ".join(words)


def _cards(report: Report, run: Mapping[str, Any]) -> Iterator[Card]:
    totals = report.totals
    figures = [("Size of weights", totals.bytes, size), ("Parameters", totals.parameters, count), ("MACs per token", totals.macs, count)]
    if totals.cache is not None:
        figures.append(("Cache per token", totals.cache, size))
    for name, pair, unit in figures:
        yield Card(name, arrow(pair, unit), f"{percent(pair)} of the original", pair)
    if report.is_plan:
        return
    yield _error_card(report)
    yield _parity_card(report)
    yield _time_card(report, run)
    yield from (card for one in evaluations(run)[-_MEASUREMENTS:] if (card := _evaluation_card(one)) is not None)


def _error_card(report: Report) -> Card:
    for metric, name in (("output_error", "Output error"), ("weight_error", "Weight error")):
        rows = [row for row in report.sites if getattr(row, metric) is not None]
        if rows:
            worst: SiteRow = max(rows, key=lambda row: float(getattr(row, metric)))
            middle = error_text(median(getattr(row, metric) for row in rows))
            return Card(f"{name}, largest", error_text(getattr(worst, metric)), f"median {middle}; largest at {worst.path}")
    return Card("Output error", "-", "nothing was rewritten" if not _rewritten(report) else "not measured")


def _rewritten(report: Report) -> bool:
    return any(row.status == "rewritten" for row in report.sites)


def _parity_card(report: Report) -> Card:
    parity = report.parity
    if parity is None:
        return Card("Parity with torch", "-", "not checked on this machine")
    batches = "1 batch" if parity.cases == 1 else f"{parity.cases} batches"
    return Card("Parity with torch", f"{parity.max_difference:.1e}", f"{parity.tolerance:.0e} allowed; {batches}, {parity.provider}")


def _time_card(report: Report, run: Mapping[str, Any]) -> Card:
    """Of a measured run where there is one, else of compiling. A page that is hashed holds neither: it has what is predicted."""
    demo, seconds = run.get("demo"), _seconds(run)
    if isinstance(demo, dict) and isinstance(demo.get("dense_s"), float) and isinstance(demo.get("rewritten_s"), float):
        dense, now = demo["dense_s"], demo["rewritten_s"]
        words = f"{1e3 * dense:.0f} → {1e3 * now:.0f} ms, batch of {demo.get('batch', '?')}, {demo.get('provider', '')}"
        return Card("Time", f"{now / dense:.2f} {TIMES}", words)
    if seconds:
        parts = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
        return Card("Time to compile", f"{sum(seconds.values()):.1f} s", parts)
    found = slowest(report.sites)
    if found is None:
        return Card("Time", "-", "none is predicted; matmorph report DIR adds the times of run.json")
    row, time = found
    below = f"dense, predicted at {time[0]} row{'s' * (time[0] > 1)}; at {row.path}"
    return Card("Kernel time, slowest", span(time, TIMES, " to "), below)


def _evaluation_card(figures: Mapping[str, Any]) -> Card | None:
    """What `matmorph evaluate --record` kept; None for what is damaged."""
    name, key = ("perplexity", "text") if "text" in figures else (str(figures.get("loss", "")), "data")
    value, source, counted = figures.get("perplexity" if key == "text" else "value"), figures.get(key), figures.get("counted")
    if not isinstance(value, int | float) or not isinstance(source, str) or not isinstance(counted, int):
        return None
    what = f"tokens in windows of {figures.get('window')}" if key == "text" else "labels"
    below = f"{source.rpartition('/')[2]}, {count(counted)} {what}"
    other = figures.get("beside")
    if isinstance(other, dict) and isinstance(other.get("ratio"), int | float):
        below += f"; {other['ratio']:.3f} {TIMES} that of {other.get('folder', '?')}"
    return Card(name.replace("_", " ").capitalize(), f"{value:.4g}", below)


def _seconds(run: Mapping[str, Any]) -> dict[str, float]:
    found = run.get("seconds")
    return {str(name): float(value) for name, value in found.items() if isinstance(value, int | float)} if isinstance(found, dict) else {}


def _run(run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from ((f"seconds, {name}", f"{value:.1f}") for name, value in _seconds(run).items())
    yield from ((name.replace("_", " "), str(value)) for name, value in run.items() if isinstance(value, str | int | float))


def _spectra_note(report: Report) -> str:
    missing = [row for row in report.sites if row.status == "rewritten" and row.spectrum is None]
    if not missing:
        return ""
    names = ", ".join(_unique(outcome(row) for row in missing))
    return f"None here for {names}: no singular values of the whole matrix are computed there."


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
