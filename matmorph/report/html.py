"""The report as one self-contained page: no script, no network, light or dark as the reader's system is."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from matmorph.report.model import Pair, Report, SiteRow
from matmorph.report.table import change, count, error_text, outcome, parity_line, percent, rank_text, shape_text, size

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5b6470; --line: #d8dde3; --paper: #ffffff; --card: #f4f6f8; --bar: #2f6fb2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #9aa4af; --line: #343b43; --paper: #15181c; --card: #1e2328; --bar: #6aa5e0; }
}
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 2rem auto; max-width: 84rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; } p { margin: .3rem 0; color: var(--soft); }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin-top: 1.2rem; }
.card { background: var(--card); border-radius: .5rem; padding: .7rem 1rem; min-width: 10rem; }
.card b { display: block; font-size: 1.25rem; } .card span { color: var(--soft); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .87rem; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { position: sticky; top: 0; background: var(--paper); white-space: nowrap; } .n { text-align: right; white-space: nowrap; }
td small { color: var(--soft); display: block; } .kept { color: var(--soft); }
.bar { background: var(--line); height: .35rem; border-radius: .2rem; min-width: 5rem; margin-top: .25rem; }
.bar i { display: block; background: var(--bar); height: 100%; border-radius: .2rem; }
pre { background: var(--card); padding: .8rem 1rem; border-radius: .5rem; overflow-x: auto; font-size: .85rem; }
"""

_HEAD = (
    "site",
    "role",
    "layer",
    "shape",
    "rule",
    "outcome",
    "rank",
    "weight error",
    "output error",
    "bound",
    "parameters",
    "bytes",
    "MACs",
)
_NUMERIC = {"layer", "rank", "weight error", "output error", "bound", "parameters", "bytes", "MACs"}


def html_page(report: Report, spec_text: str = "") -> str:
    """`report.html`. `spec_text`: the resolved spec as YAML, shown as it is. Equal arguments give equal text."""
    title = f"{report.name} by {report.spec_name}" if report.spec_name else report.name
    sections = [
        f"<h1>{escape(title)}</h1>",
        *([f"<p>{escape(parity_line(report.parity))}</p>"] if report.parity else []),
        f'<div class="cards">{"".join(_cards(report))}</div>',
        _section("Sites", f'<div class="scroll"><table>{_head()}{"".join(map(_row, report.sites))}</table></div>'),
        _section("Notes", _list(report.notes)) if report.notes else "",
        _section("Resolved spec", f"<pre>{escape(spec_text)}</pre>") if spec_text else "",
        _section("Versions", _list(f"{name} {version}" for name, version in report.versions.items())) if report.versions else "",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n" + "\n".join(filter(None, sections)) + "\n</body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{body}"


def _list(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _cards(report: Report) -> Iterable[str]:
    totals = report.totals
    done = sum(row.status == "rewritten" for row in report.sites)
    yield _card("sites rewritten", f"{done} of {len(report.sites)}", "")
    yield _card("parameters", change(totals.parameters, count), percent(totals.parameters))
    yield _card("bytes", change(totals.bytes, size), percent(totals.bytes))
    yield _card("MACs per token", change(totals.macs, count), percent(totals.macs))
    for name, field in (("largest weight error", "weight_error"), ("largest output error", "output_error")):
        worst = max((row for row in report.sites if getattr(row, field) is not None), key=lambda row: getattr(row, field), default=None)
        if worst is not None:
            yield _card(name, error_text(getattr(worst, field)), worst.path)


def _card(name: str, value: str, below: str) -> str:
    return f'<div class="card"><span>{escape(name)}</span><b>{escape(value)}</b><span>{escape(below)}</span></div>'


def _head() -> str:
    cells = "".join(f'<th class="n">{name}</th>' if name in _NUMERIC else f"<th>{name}</th>" for name in _HEAD)
    return f"<thead><tr>{cells}</tr></thead>"


def _row(row: SiteRow) -> str:
    remarks = [*([row.reason] if row.reason else []), *row.notes]
    below = "".join(f"<small>{escape(remark)}</small>" for remark in remarks)
    bound = (
        f"{error_text(row.bound.value)}<small>{escape(row.bound.name)} on {row.bound.on.replace('_', ' ')}</small>" if row.bound else "-"
    )
    requested = f"<small>asked: {escape(row.requested_rank)}</small>" if row.requested_rank else ""
    cells = (
        f"{escape(row.path)}{below}",
        escape(row.role),
        "-" if row.layer is None else str(row.layer),
        f"{shape_text(row.shape)}<small>{escape(row.form)}</small>",
        escape(row.rule or "-"),
        escape(outcome(row)),
        f"{escape(rank_text([row]))}{requested}",
        error_text(row.weight_error),
        error_text(row.output_error),
        bound,
        change(row.parameters, count),
        f"{change(row.bytes, size)}{_bar(row.bytes)}",
        change(row.macs, count),
    )
    kept = ' class="kept"' if row.status != "rewritten" else ""
    tagged = (f'<td class="n">{cell}</td>' if name in _NUMERIC else f"<td>{cell}</td>" for name, cell in zip(_HEAD, cells, strict=True))
    return f"<tr{kept}>{''.join(tagged)}</tr>\n"


def _bar(pair: Pair) -> str:
    """Bytes after as a part of bytes before."""
    before, after = pair
    share = min(100.0, 100 * after / before) if before else 0.0
    return f'<div class="bar"><i style="width:{share:.1f}%"></i></div>'
