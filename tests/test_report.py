"""The tables that are drawn from a report."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from reports import make_report
from rich.console import Console

from matmorph.report.model import Parity, Report
from matmorph.report.table import (
    Group,
    change,
    count,
    error_text,
    group,
    make_console,
    outcome,
    parity_line,
    percent,
    print_inspect,
    print_plan,
    rank_text,
    size,
)

Draw = Callable[[Console, Report, bool], None]


def drawn(draw: Draw, report: Report, every: bool = False, width: int | None = None) -> str:
    """What a pipe gets, or a terminal of `width` columns."""
    file = io.StringIO()
    terminal = width and Console(file=file, width=width, force_terminal=True, color_system=None, highlight=False, markup=False)
    draw(terminal or make_console(file), report, every)
    return file.getvalue()


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (1000, "1.00 k"), (147456, "147 k"), (22713216, "22.7 M"), (6738415616, "6.74 G")]
)
def test_counts_have_three_digits(number: int, text: str) -> None:
    assert count(number) == text


def test_sizes_and_changes() -> None:
    assert size(90868376) == "90.9 MB"
    assert size(12) == "12 B"
    assert change((90868376, 74_400_000), size) == "90.9 -> 74.4 MB"
    assert change((2_000_000, 999_000), size) == "2.00 MB -> 999 kB", "units that differ are both written"
    assert change((5, 5), count) == "5"
    assert change((12, 6), count) == "12 -> 6"
    assert percent((200, 150)) == "75.0 %"
    assert percent((0, 0)) == "-"


def test_errors_and_ranks() -> None:
    assert [error_text(value) for value in (None, 0.0, 0.25, 2.4e-7)] == ["-", "0.000", "0.250", "2e-07"]
    rows = make_report().sites
    assert rank_text(rows[:1]) == "115"
    assert rank_text([rows[0], rows[6]]) == "115..116"
    assert rank_text([rows[-1]]) == "-"


def test_parity_line() -> None:
    assert parity_line(Parity(2.4e-7, 1e-4, 3, "CPUExecutionProvider")) == (
        "ONNX Runtime agrees with torch to 2.4e-07 on 3 batches (CPUExecutionProvider)"
    )
    assert "1 batch (" in parity_line(Parity(0.0, 1e-4, 1, "CPUExecutionProvider"))


def test_groups_keep_every_row_once() -> None:
    rows = make_report().sites
    groups = group(rows, lambda row: row.role)
    assert sorted(row.path for part in groups for row in part.rows) == sorted(row.path for row in rows)
    assert groups[0].total("bytes") == (6 * 4 * 384 * 384, sum(row.bytes[1] for row in rows if row.role == "attention.q"))
    assert groups[0].worst("weight_error") == 0.25
    assert groups[0].layers() == "0..5"
    assert Group((rows[0], rows[12])).layers() == "0, 2"
    assert groups[-1].layers() == "-"
    assert [outcome(part.first) for part in groups] == ["low_rank"] * 6 + ["rejected"]


def test_a_long_model_is_summarised_unless_all_is_asked_for() -> None:
    report = make_report()
    summary = drawn(print_plan, report)
    assert "37 sites in 7 groups (--all lists every site)" in summary
    assert "encoder.layer.3.output.dense" not in summary
    every = drawn(print_plan, report, every=True)
    assert all(row.path in every for row in report.sites)
    assert "--all" not in every


def test_a_plan_has_no_error_columns_and_says_would() -> None:
    text = drawn(print_plan, make_report(is_plan=True))
    assert "error" not in text
    assert "would rewrite 36 of 37 sites" in text


def test_reasons_notes_and_totals_are_printed_as_they_are() -> None:
    report = make_report()
    text = drawn(print_plan, report)
    assert "rejected (1 site): rank 300 takes 921,600 bytes, dense takes 589,824 <b>" in text
    assert "note: train mode switched to eval for the trace" in text
    before, after = report.totals.parameters
    assert re.search(rf"parameters +{count(before).split()[0]} -> {re.escape(count(after))} +{100 * after / before:.1f} %", text)


def test_inspect_lists_paths_or_groups() -> None:
    short = drawn(print_inspect, make_report(layers=1, rewritten=False))
    assert re.search(r"encoder\.layer\.0\.intermediate\.dense +mlp\.fc1 +linear +1536x384 +590 k +1", short)
    long = drawn(print_inspect, make_report(rewritten=False))
    assert re.search(r"mlp\.fc1 +linear +1536x384 +6 +0\.\.5 +3\.54 M +6", long)


@pytest.mark.parametrize("draw", [print_plan, print_inspect])
@pytest.mark.parametrize("layers", [1, 6])
def test_eighty_columns_hold_every_figure(draw: Draw, layers: int) -> None:
    text = drawn(draw, make_report(layers=layers), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text, "a figure or a path was cut"
    for word in ("low_rank", "115") if draw is print_plan else ("attention.q", "1536x384"):
        assert re.search(rf"\b{word}\b", text), f"{word} was broken over lines"


def test_a_pipe_gets_unwrapped_lines_without_escapes() -> None:
    text = drawn(print_plan, make_report(), every=True)
    assert "\x1b" not in text
    assert sum(row.path in text for row in make_report().sites) == 37


@pytest.mark.parametrize("draw", [print_plan, print_inspect])
@pytest.mark.parametrize("width", [40, 60, 80])
def test_a_path_is_whole_on_a_line_of_any_terminal(draw: Draw, width: int) -> None:
    report = make_report(layers=1)
    lines = drawn(draw, report, every=True, width=width).splitlines()
    for row in report.sites:
        [line] = [line for line in lines if row.path in line]
        assert line.startswith(row.path)


def test_a_path_has_a_line_of_its_own_only_where_it_must() -> None:
    report = make_report(layers=1)
    wide, narrow = (drawn(print_inspect, report, every=True, width=width).splitlines() for width in (120, 60))
    assert len(narrow) == len(wide) + len(report.sites)
    paths = [line for line in narrow if line in {row.path for row in report.sites}]
    assert paths == [row.path for row in report.sites]
    assert narrow[narrow.index("encoder.layer.0.attention.self.query") + 1].split() == ["attention.q", "linear", "384x384", "147", "k", "1"]


def test_names_of_rules_are_cut() -> None:
    report = make_report(layers=1)
    named = [replace(row, rule="a-very-long-name-of-a-rule" if number % 2 else "b") for number, row in enumerate(report.sites)]
    text = drawn(print_plan, replace(report, sites=tuple(named)), every=True)
    assert "a-very-long-name-of…" in text
    assert "a-very-long-name-of-a" not in text


def test_time_is_a_column_where_a_kernel_is_slower_than_dense() -> None:
    report = make_report(layers=1)
    assert "time" not in drawn(print_plan, report).splitlines()[0]
    fast = [replace(row, times=((1, 0.1, 0.3), (16, 0.5, 0.9))) for row in report.sites]
    assert "time" not in drawn(print_plan, replace(report, sites=tuple(fast))).splitlines()[0]
    slow = [replace(fast[0], times=((1, 7.0, 16.0), (16, 5.0, 12.0))), *fast[1:]]
    lines = drawn(print_plan, replace(report, sites=tuple(slow))).splitlines()
    assert lines[0].split()[-1] == "time"
    assert lines[1].endswith("7..16 x")
    assert lines[2].endswith(" -")


def test_what_a_budget_decides_is_said() -> None:
    report = make_report(layers=1, rewritten=False, is_plan=True)
    left = [replace(row, open=number < 3) for number, row in enumerate(report.sites)]
    text = drawn(print_plan, replace(report, sites=tuple(left)))
    assert f"would rewrite 0 of {len(left)} sites, 3 more are left to the budget, which decides when the model is compiled" in text
