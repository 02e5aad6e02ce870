"""report.html as text: well formed, complete, escaped, the same for the same report, and what it says agrees with the report."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from math import log10
from pathlib import Path

import pytest
from reports import HOSTILE, make_context, make_large_report, make_report

from matmorph.errors import InputError
from matmorph.ir.site import Bound, Spectrum
from matmorph.report import charts, figures
from matmorph.report.html import LINE, fitted, html_page
from matmorph.report.model import PartRow, Report, SiteRow, Totals
from matmorph.report.palette import COLOURS, palette
from matmorph.report.reading import Context, read_folder, read_report
from matmorph.report.table import outcome

VOID = {"meta", "input", "wbr", "br"}


class Page(HTMLParser):
    """Tags must close in order. Collects addresses, ids, ARIA references, text, and rows of the table of sites."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.rows = 0
        self.scripts = 0
        self.unnamed: list[str] = []
        self.handlers: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        assert len(given) == len(attrs), f"an attribute twice in {tag}"
        self.addresses += [given[name] for name in ("src", "href", "action") if name in given]
        self.ids += [given["id"]] if "id" in given else []
        self.references += [given[name] for name in ("aria-controls", "aria-labelledby") if name in given]
        self.handlers += [name for name in given if name.startswith("on")]
        self.scripts += tag == "script"
        self.rows += tag == "tr" and "data-status" in given
        if tag == "svg" and "aria-label" not in given and "aria-hidden" not in given:
            self.unnamed.append(str(given))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" not in self.open and "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))


REPORTS = {
    "encoder": make_report(),
    "plan": make_report(is_plan=True),
    "dense": make_report(rewritten=False),
    "large": make_large_report(),
    "empty": Report("Nothing", "", (), Totals((0, 0), (0, 0), (0, 0))),
}


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("context", [Context(), make_context()], ids=["bare", "full"])
def test_page_is_well_formed_self_contained_and_complete(name: str, context: Context) -> None:
    report = REPORTS[name]
    text = html_page(report, context)
    page = Page(text)
    assert page.open == []
    assert [address for address in page.addresses if not address.startswith("#")] == []
    assert {address[1:] for address in page.addresses} <= set(page.ids), "a link to nowhere"
    assert set(page.references) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert page.rows == len(report.sites)
    assert page.unnamed == []
    assert page.handlers == [], "no code in attributes"
    assert page.scripts == 1
    assert re.findall(r"https?:|@import|url\(", text) == []
    assert all(row.path in page.text for row in report.sites)
    assert html_page(report, context) == text


def test_page_says_what_the_report_says() -> None:
    report, context = make_report(), make_context()
    text = html_page(report, context)
    words = Page(text).text
    assert "36 of 37 matmuls rewritten · 1 rejected" in words
    assert "0.100median 0.075; largest at encoder.layer.5.attention.self.query" in words, "0.05 + layer / 100 over layers 0 .. 5"
    assert "2.4e-07" in words
    assert "1e-04 allowed; 3 batches, CPUExecutionProvider" in words
    assert "dense takes 589,824 <b>" in words
    assert "version: 1" in words
    assert "torch2.13.0" in words
    assert all(record in words for record, _ in context.files.values())
    assert context.source_sha256 in words
    assert "train mode switched to eval for the trace" in words


def test_names_are_escaped_wherever_they_stand() -> None:
    """A path, role, rule, reason, note, spec and budget that would break out of text, attribute or script."""
    row = replace(
        make_report().sites[0], path=HOSTILE, role=HOSTILE, rule=HOSTILE, reason=HOSTILE, notes=(HOSTILE,), requested_rank=HOSTILE
    )
    row = replace(row, parts=(PartRow(HOSTILE),), bound=Bound(HOSTILE, "output_error", 0.01), spectrum=Spectrum("W", 4, (1, 2), (2.0, 1.0)))
    report = replace(make_report(), name=HOSTILE, spec_name=HOSTILE, sites=(row,), notes=(HOSTILE,), versions={HOSTILE: HOSTILE})
    front = {"resource": HOSTILE, "points": [{"budget": HOSTILE, "total": size, "error": 0.1} for size in (1, 2)]}
    text = html_page(report, Context(HOSTILE, HOSTILE, {HOSTILE: (HOSTILE, 1)}, {HOSTILE: HOSTILE}, front))
    page = Page(text)
    assert page.scripts == 1
    assert page.handlers == []
    assert page.open == []
    assert "<img" not in text
    assert page.words.count(HOSTILE) >= 8


def test_a_plan_leaves_out_what_it_lacks() -> None:
    words = Page(html_page(make_report(is_plan=True))).text
    for absent in ("Parity", "Weight error", "Resolved spec", "Error by layer", "Singular values", "Pareto", "SHA-256"):
        assert absent not in words, absent
    assert "would be rewritten" in words


def test_times_are_those_of_the_run_and_only_there() -> None:
    report = make_report()
    assert "matmorph report DIR adds the times" in Page(html_page(report)).text
    seconds = Context(run={"seconds": {"trace": 1.25, "compile": 2.0}, "machine": "x86_64"})
    assert "3.2 s" in Page(html_page(report, seconds)).text
    demo = Context(run={"demo": {"batch": 16, "dense_s": 0.2, "rewritten_s": 0.1, "provider": "CPUExecutionProvider"}})
    assert f"0.50 {charts.TIMES}200 → 100 ms, batch of 16, CPUExecutionProvider" in Page(html_page(report, demo)).text
    for damaged in ({"seconds": 3, "demo": "x"}, {"demo": {"dense_s": None}}, {"seconds": {"trace": "?"}}):
        assert "adds the times" in Page(html_page(report, Context(run=damaged))).text


def test_what_was_measured_afterwards_has_a_card() -> None:
    text = {
        "text": "texts/valid.txt",
        "window": 256,
        "perplexity": 27.51,
        "counted": 4080,
        "beside": {"ratio": 1.0391, "folder": "out-dense"},
    }
    data = {"data": "rows.npz", "loss": "cross_entropy", "value": 0.25, "counted": 64}
    page = Page(html_page(make_report(), Context(run={"evaluations": [text, data]}))).text
    assert f"Perplexity27.51valid.txt, 4.08 k tokens in windows of 256; 1.039 {charts.TIMES} that of out-dense" in page
    assert "Cross entropy0.25rows.npz, 64 labels" in page
    for damaged in ({"evaluations": "x"}, {"evaluations": [3, {"text": 1}, {"data": "x", "value": "y", "counted": 1}]}):
        assert "Perplexity" not in Page(html_page(make_report(), Context(run=damaged))).text


# ---- figures


def spectrum_row(rank: int, values: list[float], layer: int = 0, of: str = "W") -> SiteRow:
    first = make_report().sites[0]
    at = tuple(range(1, len(values) + 1))
    return replace(first, path=f"layers.{layer}.q", layer=layer, rank=rank, spectrum=Spectrum(of, len(values), at, tuple(values)))  # type: ignore[arg-type]


def test_spectra_are_drawn_where_their_values_lie() -> None:
    """The dot of rank 3 of 5 at the third value: a frame of the same limits gives its place."""
    values = [8.0, 4.0, 2.0, 0.5, 0.05]
    (panel,) = figures.spectrum_panels(replace(make_report(), sites=(spectrum_row(3, values),)))
    frame = charts.Frame(318, 150, x0=1, x1=5, y0=-3, y1=0)  # 0.05 / 8 = 10^-2.2, so three decades
    assert f'<circle class="chosen-dot" cx="{frame.x(3):.1f}" cy="{frame.y(log10(2 / 8)):.1f}"' in panel.chart
    points = " ".join(f"{frame.x(k + 1):.1f},{frame.y(log10(value / 8)):.1f}" for k, value in enumerate(values))
    assert f'points="{points}"' in panel.chart
    assert "rank 3 of 5" in panel.below


def test_spectra_share_a_panel_by_role_matrix_and_what_they_are_of() -> None:
    rows = [spectrum_row(2, [2.0, 1.0], 0), spectrum_row(1, [2.0, 1.0], 1), spectrum_row(1, [2.0, 1.0], 2, "W L")]
    panels = figures.spectrum_panels(replace(make_report(), sites=tuple(rows)))
    assert [panel.below for panel in panels] == ["ranks 1 to 2 of 2, values of W", "rank 1 of 2, values of W L"]
    assert [panel.chart.count("<polyline") for panel in panels] == [2, 1]
    assert panels[0].chart.count("chosen-dot") == 2


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, 0.0], [1.0, 1e-30]])
def test_a_spectrum_of_zeros_is_no_error(values: list[float]) -> None:
    report = replace(make_report(), sites=(spectrum_row(1, values),))
    assert "nan" not in html_page(report).lower().replace("nano", "")


def test_errors_stand_over_their_bound_in_the_same_frame() -> None:
    report = make_report()
    output, weight = sorted(figures.error_figures(report, palette(report.sites)), key=lambda figure: figure.key)
    assert (output.key, weight.key) == ("output_error", "weight_error")
    assert [len(output.panels), len(weight.panels)] == [6, 6]
    frame = charts.Frame(318, 150, x0=-0.5, x1=5.5, y0=0, y1=0.3)  # weight errors 0.20 .. 0.25
    assert f'cy="{frame.y(0.23):.1f}"' in weight.panels[0].chart
    assert f'class="bound" x1="{frame.x(3) - 6:.1f}" y1="{frame.y(0.19):.1f}"' in weight.panels[0].chart
    assert weight.panels[0].chart.count('class="bound"') == 6
    assert "bound" not in output.panels[0].chart, "a bound of the other error says nothing here"
    assert figures.error_figures(report, palette(report.sites))[0].key == "weight_error", "the error with bounds comes first"


def test_sizes_add_up_to_the_model() -> None:
    report = make_report()
    bars = figures.size_bars(report)
    assert [bar.name for bar in bars] == [*(f"layer {layer}" for layer in range(6)), "other", "not in matmuls"]
    layer = [row.bytes for row in report.sites if row.layer == 2]
    assert bars[2].words == figures.arrow((sum(b for b, _ in layer), sum(a for _, a in layer)))
    assert max(bar.before for bar in bars) == 100
    assert bars[-1].words == "48.0 MB"
    assert bars[-1].same


def test_the_map_has_every_site_once() -> None:
    report = make_large_report()
    found = figures.layer_map(report, palette(report.sites))
    cells = [cell for _, row in found.rows for sites in row for cell in sites] + [cell for _, row in found.outside for cell in row]
    assert sorted(cell.number for cell in cells) == list(range(len(report.sites)))
    assert all(report.sites[cell.number].path in cell.words for cell in cells)
    assert sum(count for *_, count in found.legend) == len(report.sites)
    assert [name for name, *_ in found.legend][-1] in ("kept", "rejected")


def test_a_method_keeps_its_colour_and_no_two_share_one_while_there_are_enough() -> None:
    row = make_report().sites[0]

    def of(*names: str) -> dict[str, str]:
        rows = [replace(row, parts=tuple(PartRow(part) for part in name.split(" + "))) for name in names]
        return {outcome(row): palette(rows).kind(row) for row in rows}

    assert of("low_rank")["low_rank"] == of("quantize", "low_rank")["low_rank"]
    many = of("mine", "quantize + lora", "low_rank", "quantize", "loftq", "tt", "lora", "qlora", "tt_lora", "transact")
    assert len(set(many.values())) == len(many) == COLOURS
    assert len(of(*(f"m{k}" for k in range(12)))) == 12
    assert palette([]).legend([]) == ()


def test_the_front_is_sorted_and_marks_this_model() -> None:
    report = make_report()
    size = report.totals.bytes[1]
    points = [
        {"limit": 2 * size, "total": 2 * size, "error": 0.1, "share": 0.5},
        {"limit": 90e6, "total": size, "error": 0.3},
        {"error": 1},
        3,
    ]
    found = figures.front_figure({"resource": "bytes", "of": "model", "points": points}, report)
    assert found is not None
    assert [row[2:] for row in found.rows] == [("-", "0.300", "this model"), ("50.0 %", "0.100", "")]
    assert found.rows[0][0] == "90.0 MB"
    assert found.chart.count('class="front here"') == 1
    matched = figures.front_figure({"resource": "bytes", "of": "matched", "points": points}, report)
    assert matched is not None
    assert "front here" not in matched.chart, "bytes of a part are not those of the model"
    counted = figures.front_figure({"resource": "macs", "points": [{"total": 1e6, "error": 0.2}, {"total": 2e6, "error": 0.1}]}, report)
    assert counted is not None
    assert [row[1] for row in counted.rows] == ["1.00 M", "2.00 M"]
    short = figures.front_figure({"points": [{"budget": "40%", "bytes": [9, 4], "error": 0.2}, {"bytes": 5, "error": 0.1}]}, report)
    assert short is not None
    assert [row[:2] for row in short.rows] == [("40%", "4 B"), ("-", "5 B")]
    for nothing in ({}, {"points": 3}, {"points": points[:1]}, {"points": [{"total": None, "error": True}] * 2}):
        assert figures.front_figure(nothing, report) is None


@pytest.mark.parametrize(
    ("high", "expected"),
    [(0, [0]), (1, [0, 0.5, 1]), (0.23, [0, 0.1, 0.2, 0.3]), (4, [0, 1, 2, 3, 4]), (4.1, [0, 2, 4, 6]), (999, [0, 500, 1000])],
)
def test_ticks_are_round_and_reach(high: float, expected: list[float]) -> None:
    assert charts.ticks(high) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("count", "most"), [(1, 5), (5, 5), (6, 5), (32, 12), (33, 12), (80, 12), (2, 2)])
def test_labels_are_few_and_reach_both_ends(count: int, most: int) -> None:
    found = charts.even(list(range(count)), most)
    steps = [b - a for a, b in pairwise(found)]
    assert found[0] == 0
    assert found[-1] == count - 1
    assert len(found) <= most
    assert not steps or min(steps) == steps[0], "the last two are no closer than the others"


# ---- reading back


def test_a_report_is_read_back_as_it_was(tmp_path: Path) -> None:
    for name, report in REPORTS.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({**report.to_dict(), "of_a_later_version": 1}))
        again = read_report(path)
        assert again == replace(report, versions=dict(report.versions))
        assert html_page(again, make_context()) == html_page(report, make_context())


WRONG_REPORTS = {
    "empty": "",
    "a list": "[]",
    "no sites": "{}",
    "an empty row": '{"name": "m", "spec_name": "s", "sites": [{}]}',
    "a number of sites": '{"name": "m", "spec_name": "s", "sites": 3, "totals": {}}',
    "notes": json.dumps({**make_report().to_dict(), "notes": 5}),
    "one number of two": json.dumps({**make_report().to_dict(), "totals": {"parameters": [1], "bytes": [1, 2], "macs": [1, 2]}}),
    "a status": json.dumps(make_report().to_dict()).replace('"status": "rewritten"', '"status": "lost"'),
    "a huge number": json.dumps(make_report().to_dict()).replace('"trainable": 0', '"trainable": ' + "9" * 400),
    "no number": json.dumps(make_report().to_dict()).replace('"trainable": 0', '"trainable": NaN'),
    "deep": "[" * 200_000,
    "no text": "\udcff",
}


@pytest.mark.parametrize("text", WRONG_REPORTS.values(), ids=WRONG_REPORTS)
def test_what_is_no_report_is_an_input_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"report\.json: cannot be read"):
        read_report(path)
    with pytest.raises(InputError, match=r"missing\.json: missing"):
        read_report(tmp_path / "missing.json")


def test_a_folder_is_read_leniently_but_needs_its_report(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        read_folder(tmp_path / "none")
    with pytest.raises(InputError, match=r"not an artefact folder \(report\.json is missing\)"):
        read_folder(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(make_report().to_dict()))
    report, context = read_folder(tmp_path)
    assert report.sites == make_report().sites
    assert context == Context()
    for name, text in (("manifest.json", "]"), ("run.json", "3"), ("pareto.json", '{"points": [1, {"bytes": 2}]}')):
        (tmp_path / name).write_text(text)
    _, context = read_folder(tmp_path)
    assert context == Context(pareto={"points": [1, {"bytes": 2}]})
    files = {"a.bin": {"sha256": "ab", "bytes": 3}, "report.html": {"sha256": "no", "bytes": 1}}
    (tmp_path / "manifest.json").write_text(json.dumps({"source": {"weights_sha256": "cd"}, "files": files}))
    assert read_folder(tmp_path)[1].files == {"a.bin": ("ab", 3)}
    assert read_folder(tmp_path)[1].source_sha256 == "cd"
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {"report.json": {"sha256": "ab", "bytes": 3}}}))
    with pytest.raises(InputError, match=r"report\.json: was changed: it has \d+ bytes, manifest\.json says 3"):
        read_folder(tmp_path)
    assert read_folder(tmp_path, verify=False)[0].sites == make_report().sites


def test_only_long_paths_may_break() -> None:
    short, long = "model.layers.0.self_attn.k_proj", "encoder.layer.11.attention.output.dense"
    assert len(short) <= LINE < len(long)
    assert fitted(short) == short
    assert fitted(long) == '<span class="long">encoder.<wbr>layer.<wbr>11.<wbr>attention.<wbr>output.<wbr>dense</span>'
    assert "<script>" not in fitted("<script>" * 9)


def test_names_bring_no_control_characters_onto_the_page() -> None:
    report = make_report()
    odd = replace(report, sites=tuple(replace(row, path=f"{row.path}\x1b[31m") for row in report.sites))
    page = html_page(odd)
    assert "\x1b" not in page
    assert "\\x1b[31m" in page
