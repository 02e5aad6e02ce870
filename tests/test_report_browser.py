"""report.html and the comparison in headless Chromium: they sort, filter, dress in light and dark, fit a narrow window, and log no error.

`test_speed_is_printed` measures; no time is asserted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import chromium
import pytest
from reports import HOSTILE, make_context, make_large_report, make_report

from matmorph.report.comparing import ComparedModel, comparison_page
from matmorph.report.html import html_page
from matmorph.report.table import outcome

pytestmark = pytest.mark.skipif(chromium.BINARY is None, reason="needs a Chromium (Debian: apt-get install chromium)")

LARGE = make_large_report()
ROWS = "[...document.querySelectorAll('#table tbody tr')]"
SHOWN = f"{ROWS}.filter(row => row.offsetHeight > 0)"


def head(name: str) -> str:
    return f"[...document.querySelectorAll('#table thead th')].find(th => th.textContent.trim() === '{name}')"


def column(name: str, rows: str = SHOWN) -> str:
    value = "cell.dataset.v ?? (cell.querySelector('.path') ?? cell).textContent.trim()"
    return f"(i => {rows}.map(row => row.cells[i]).map(cell => {value}))({head(name)}.cellIndex)"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Tab]:
    with chromium.chromium(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture
def page(tab: chromium.Tab, tmp_path: Path) -> Iterator[chromium.Tab]:
    """The large report, freshly loaded; whatever a test does, the page must log nothing."""
    file = tmp_path / "report.html"
    file.write_text(html_page(LARGE, make_context()), encoding="utf-8")
    tab.problems.clear()
    tab.view(1280, 900)
    tab.open(file)
    yield tab
    assert tab.problems == []


def test_a_header_sorts_up_down_and_back(page: chromium.Tab) -> None:
    original = page.run(column("Matmul"))
    assert original == [row.path for row in LARGE.sites]
    button = f"{head('Output error')}.querySelector('button')"
    known = sorted(row.output_error for row in LARGE.sites if row.output_error is not None)
    for direction, expected in (("ascending", known), ("descending", known[::-1])):
        page.run(f"{button}.click()")
        assert page.run(f"{head('Output error')}.getAttribute('aria-sort')") == direction
        found = page.run(column("Output error"))
        assert [float(value) for value in found[: len(known)]] == expected
        assert set(found[len(known) :]) == {""}, "what was not measured stays last"
    page.run(f"{button}.click()")
    assert page.run(f"{head('Output error')}.getAttribute('aria-sort')") == "none"
    assert page.run(column("Matmul")) == original


def test_words_sort_with_their_numbers_and_one_column_at_a_time(page: chromium.Tab) -> None:
    page.run(f"{head('Rank')}.querySelector('button').click()")
    page.run(f"{head('Matmul')}.querySelector('button').click()")
    found = [path for path in page.run(column("Matmul")) if path.startswith("model.layers.")]
    layers = [int(path.split(".")[2]) for path in found]
    assert layers == sorted(layers), "layer 10 comes after layer 9"
    assert page.run("document.querySelectorAll('th[aria-sort=ascending], th[aria-sort=descending]').length") == 1


def test_the_keyboard_reaches_and_works_the_header(page: chromium.Tab) -> None:
    page.run("document.querySelector('#table thead button').focus()")
    page.press("Tab", 9)
    assert page.run("document.activeElement.textContent") == "Role"
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press("Enter", 13, "\r")
    assert page.run(f"{head('Role')}.getAttribute('aria-sort')") == "ascending"
    roles = page.run(column("Role"))
    assert roles == sorted(roles)


def filtered(page: chromium.Tab, text: str = "", method: str = "", status: str = "") -> list[str]:
    page.run(
        f"(form => {{ form.elements.text.value = {text!r}; form.elements.method.value = {method!r};"
        f"form.elements.status.value = {status!r};"
        "form.dispatchEvent(new Event('input', {bubbles: true})); })(document.querySelector('form.filters'))"
    )
    found: list[str] = page.run(column("Matmul"))
    assert page.run("document.querySelector('output').textContent") == f"{len(found)} of {len(LARGE.sites)} shown"
    return found


def test_filters_take_words_method_and_status_together(page: chromium.Tab) -> None:
    assert filtered(page, text="q_proj") == [row.path for row in LARGE.sites if "q_proj" in row.path]
    assert filtered(page, text="Q_PROJ layers.3.") == ["model.layers.3.self_attn.q_proj"]
    assert filtered(page, method="loftq") == [row.path for row in LARGE.sites if outcome(row) == "loftq"]
    both = filtered(page, method="low_rank", status="rewritten", text="rule-1")
    assert both == [row.path for row in LARGE.sites if outcome(row) == "low_rank" and row.rule == "rule-1"]
    assert both
    assert filtered(page, text="no such thing") == []
    assert page.run("document.getElementById('table-none').offsetHeight > 0")
    page.run("document.querySelector('form.filters button[type=reset]').click()")
    page.run("new Promise(done => setTimeout(done, 50))")
    assert page.run(f"{SHOWN}.length") == len(LARGE.sites)


def test_a_square_of_the_map_leads_to_its_row_even_where_that_is_filtered_out(page: chromium.Tab) -> None:
    filtered(page, text="no such thing")
    page.run("document.querySelector('.cell[href=\"#site-30\"]').click()")
    page.run("new Promise(done => setTimeout(done, 200))")
    assert page.run("document.querySelector('tr:target .path').textContent") == LARGE.sites[30].path
    assert page.run("document.querySelector('tr:target').offsetHeight > 0")


def test_errors_have_tabs(page: chromium.Tab) -> None:
    figures = "[...document.querySelectorAll('[id^=figure-]')].map(figure => figure.offsetHeight > 0)"
    assert page.run(figures) == [True, False]
    page.run("document.querySelectorAll('.tabs button')[1].click()")
    assert page.run(figures) == [False, True]
    assert page.run("[...document.querySelectorAll('.tabs button')].map(button => button.getAttribute('aria-pressed'))") == [
        "false",
        "true",
    ]


def test_the_theme_follows_the_system_until_it_is_chosen(page: chromium.Tab) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.run(paper)
    page.view(1280, 900, "dark")
    dark = page.run(paper)
    assert light != dark
    page.run("document.getElementById('theme').click()")
    assert (page.run("document.getElementById('theme').textContent"), page.run(paper)) == ("Theme: light", light)
    page.run("document.getElementById('theme').click()")
    page.view(1280, 900, "light")
    assert (page.run("document.getElementById('theme').textContent"), page.run(paper)) == ("Theme: dark", dark)
    page.run("document.getElementById('theme').click()")
    assert (page.run("document.getElementById('theme').textContent"), page.run(paper)) == ("Theme: auto", light)


@pytest.mark.parametrize("width", [400, 768, 1280])
def test_nothing_is_wider_than_the_window(page: chromium.Tab, width: int) -> None:
    page.view(width, 900)
    assert page.run("document.documentElement.scrollWidth") <= width


def test_contrast_of_text(page: chromium.Tab) -> None:
    """WCAG 2 AA: 4.5 between text and its ground, in both themes."""
    script = """(() => {
      const channel = v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
      const weights = [.2126, .7152, .0722], numbers = css => css.match(/[\\d.]+/g).slice(0, 3).map(Number);
      const light = css => numbers(css).map(channel).reduce((sum, value, k) => sum + value * weights[k], 0);
      const style = getComputedStyle(document.documentElement), probe = document.body.appendChild(document.createElement('i'));
      const of = name => { probe.style.color = `var(--${name})`; return light(getComputedStyle(probe).color); };
      const ratio = (a, b) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
      return ['ink', 'soft', 'accent'].flatMap(text => ['paper', 'panel'].map(ground => ratio(of(text), of(ground))));
    })()"""
    for scheme in ("light", "dark"):
        page.view(1280, 900, scheme)
        assert min(page.run(script)) >= 4.5, scheme


def test_without_its_script_the_page_shows_everything(page: chromium.Tab, tmp_path: Path) -> None:
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    page.open(tmp_path / "report.html")
    page.call("Emulation.setScriptExecutionDisabled", value=False)
    assert page.run(f"{SHOWN}.length") == len(LARGE.sites)
    assert page.run("[...document.querySelectorAll('[id^=figure-]')].every(figure => figure.offsetHeight > 0)")
    assert page.run("[...document.querySelectorAll('.filters, .tabs, #theme')].every(control => control.offsetHeight === 0)")


def test_the_printed_page_has_every_row_and_no_controls(page: chromium.Tab) -> None:
    page.view(1000, 900, "dark", media="print")
    assert page.run("document.querySelector('.tall').clientHeight >= document.querySelector('#table').offsetHeight")
    assert page.run("[...document.querySelectorAll('.filters, .tabs, .sections, #theme')].every(control => control.offsetHeight === 0)")


def test_hostile_names_stay_text(page: chromium.Tab) -> None:
    assert page.run("document.querySelectorAll('main img').length") == 0
    assert page.run("window.alerted") is None
    assert any(HOSTILE in path for path in page.run(column("Matmul")))


def test_the_comparison_sorts_and_filters_too(tab: chromium.Tab, tmp_path: Path) -> None:
    context = make_context()
    left, right = ComparedModel("a/one", make_report(), context), ComparedModel("b/<two>", make_report(layers=5, rewritten=False), context)
    file = tmp_path / "compare.html"
    file.write_text(comparison_page(left, right), encoding="utf-8")
    tab.problems.clear()
    tab.view(400, 900)
    tab.open(file)
    assert tab.run("document.documentElement.scrollWidth") <= 400
    assert tab.run(f"{ROWS}.length") == 37
    tab.run(f"{head('Bytes B')}.querySelector('button').click()")
    figures = [float(value) for value in tab.run(column("Bytes B")) if value]
    assert figures == sorted(figures)
    tab.run(
        "(form => { form.elements.method.value = 'low_rank'; form.dispatchEvent(new Event('input', {bubbles: true})); })"
        "(document.querySelector('form.filters'))"
    )
    assert tab.run(f"{SHOWN}.length") == 36, "the method of either side counts"
    assert tab.problems == []


def test_speed_is_printed(page: chromium.Tab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not judged: machines differ. The goals are 6 MB, 2 s and 100 ms."""
    opening = page.run("performance.timing.loadEventEnd - performance.timing.navigationStart")
    sorting = page.run(
        f"(() => {{ const button = {head('Output error')}.querySelector('button'), start = performance.now(); button.click();"
        "document.body.offsetHeight; return performance.now() - start; })()"
    )
    size = (tmp_path / "report.html").stat().st_size
    with capsys.disabled():
        print(f"\n{len(LARGE.sites)} matmuls: {size / 1e6:.2f} MB, open {opening:.0f} ms, sort and layout {sorting:.0f} ms")
    assert size <= 6e6
    assert opening > 0
    assert sorting > 0
