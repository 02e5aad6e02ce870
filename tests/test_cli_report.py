"""`matmorph report`, `compare` and `diff` on a folder that compile wrote."""

from __future__ import annotations

import json
import re
import shutil
import webbrowser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from exporting import Mlp, randn, seeded

import matmorph as mm
from matmorph.cli import main as cli
from matmorph.report.comparing import ComparedModel, matches
from matmorph.report.diff import difference, lines
from matmorph.report.model import Report
from matmorph.report.reading import read_folder
from matmorph.runtime.check import check

INPUTS, AXES = {"x": randn(3, 5, 8)}, {"x": {0: "batch", 1: "seq"}}


def spec(*rules: dict[str, Any]) -> dict[str, Any]:
    return {"version": 1, "name": "t", "rules": [{"name": f"r{k}", **rule} for k, rule in enumerate(rules)]}


LOW = {"match": {"path": "fc1"}, "rewrite": {"low_rank": {"rank": 2}}}
LORA = {"match": {"path": "fc2"}, "rewrite": [{"lora": {"rank": 2}}]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """fc1 in two factors; the same with an adapter beside fc2."""
    place = tmp_path_factory.mktemp("report")
    one = mm.compile(seeded(Mlp), spec(LOW), INPUTS, AXES, calibration=[INPUTS]).save(place / "one")
    two = mm.compile(seeded(Mlp), spec(LOW, LORA), INPUTS, AXES, calibration=[INPUTS]).save(place / "two")
    return one, two


@pytest.fixture
def own(folders: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(folders[0], tmp_path / "own"))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as done:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(done.value.code or 0), captured.out, captured.err


# ---- report


def test_report_draws_the_page_anew_and_the_folder_still_verifies(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = (own / "report.html").read_text()
    assert "adds the times" in saved
    (own / "report.html").write_text("damaged")
    assert not check(own).ok
    code, out, _ = run(capsys, "report", own)
    assert (code, out) == (0, f"wrote {own / 'report.html'}\n")
    page = (own / "report.html").read_text()
    assert "Time to compile" in page
    assert check(own).ok
    assert sorted(path.name for path in own.iterdir()) == sorted(
        {*json.loads((own / "manifest.json").read_text())["files"], "manifest.json", "run.json"}
    )
    run(capsys, "report", own)
    assert (own / "report.html").read_text() == page
    (own / "run.json").unlink()
    run(capsys, "report", own)
    assert (own / "report.html").read_text() == saved, "without times it is the page that compile wrote"


def test_report_elsewhere_leaves_the_folder(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    code, out, _ = run(capsys, "report", own, "--out", tmp_path / "page.html")
    assert (code, out) == (0, f"wrote {tmp_path / 'page.html'}\n")
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before
    code, _, err = run(capsys, "report", own, "--out", tmp_path)
    assert (code, err) == (2, f"{tmp_path}: is a folder, a file is wanted\n")
    (tmp_path / "page.html").write_text("mine")
    code, _, err = run(capsys, "report", own, "--out", tmp_path / "page.html")
    assert (code, err.splitlines()[0], (tmp_path / "page.html").read_text()) == (2, f"{tmp_path / 'page.html'}: the file exists", "mine")
    assert run(capsys, "report", own, "--out", tmp_path / "page.html", "--force")[0] == 0


@pytest.mark.parametrize("opens", [True, False])
def test_open_asks_the_browser(own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], opens: bool) -> None:
    asked: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: bool(asked.append(url)) or opens)
    code, out, _ = run(capsys, "report", own, "--open")
    assert code == 0
    assert asked == [(own / "report.html").resolve().as_uri()]
    assert ("no browser could be opened here" in out) is not opens


def test_what_is_no_artefact_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (("report", tmp_path), ("compare", tmp_path, tmp_path)):
        code, _, err = run(capsys, *arguments)
        assert code == 2
        assert err.startswith(f"{tmp_path}: not an artefact folder (report.json is missing)")
    code, _, err = run(capsys, "diff", tmp_path)
    assert code == 2
    assert err.startswith(f"{tmp_path / 'source.ir'}: missing")


# ---- compare


def test_compare_shows_totals_and_what_differs(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    one, two = folders
    code, out, _ = run(capsys, "compare", one, two)
    assert code == 0
    assert "1 of 2 matmuls differ" in out
    assert re.search(r"fc2 +kept +lora +- +2 ", out)
    assert "fc1" not in out.splitlines()[-1]
    _, every, _ = run(capsys, "compare", one, two, "--all")
    assert re.search(r"fc1 +low_rank +low_rank +2 +2 ", every)
    _, same, _ = run(capsys, "compare", one, one)
    assert "all 2 matmuls are treated alike" in same


def test_compare_as_json_and_as_a_page(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = folders
    page = tmp_path / "both.html"
    code, out, _ = run(capsys, "compare", one, two, "--json", "--html", page)
    assert code == 0
    data = json.loads(out)
    rows = {row["path"]: row for row in data["sites"]}
    assert [rows[path]["differs"] for path in ("fc1", "fc2")] == [False, True]
    assert rows["fc2"]["right"]["method"] == "lora"
    sizes = next(figure for figure in data["figures"] if figure["name"] == "size of weights")
    assert [sizes["left"], sizes["right"]] == [read_folder(folder)[0].totals.bytes[1] for folder in folders]
    text = page.read_text()
    assert text.count('data-status="differs"') == 1
    assert text.count('data-status="alike"') == 1
    page.write_text("mine")
    code, _, err = run(capsys, "compare", one, two, "--html", page)
    assert (code, err.splitlines()[0], page.read_text()) == (2, f"{page}: the file exists", "mine")
    run(capsys, "compare", one, two, "--html", page, "--force")
    assert page.read_text() == text
    code, _, err = run(capsys, "compare", one, two, "--open")
    assert (code, err) == (2, "--open shows the page that --html FILE writes: give --html too\n")


def test_a_matmul_that_one_model_lacks_is_listed(folders: tuple[Path, Path]) -> None:
    report, context = read_folder(folders[0])
    less = ComparedModel("less", Report(report.name, "x", report.sites[:1], report.totals), context)
    found = matches(less.report, report)
    assert [(match.path, match.left is None, match.differs) for match in found] == [("fc1", False, False), ("fc2", True, True)]


# ---- diff


def test_diff_without_a_node_counts_and_names(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "diff", folders[1])
    assert code == 0
    assert "removed: 2 linear" in out
    assert out.splitlines()[-2:] == ["fc1", "fc2"]
    _, out, _ = run(capsys, "diff", folders[0])
    assert out.splitlines()[-1] == "fc1"


def test_diff_shows_what_stands_in_place_of_a_matmul(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "diff", folders[0], "--node", "fc1", "--around", 0)
    assert code == 0
    marks = [line[0] for line in out.splitlines()]
    gone, new = ([line for line in out.splitlines() if line[0] == mark] for mark in "-+")
    assert [re.search(r"aten\.(\w+)", line).group(1) for line in gone if "aten" in line] == ["linear"]
    assert [re.search(r"aten\.(\w+)", line).group(1) for line in new if "aten" in line] == ["matmul", "matmul", "add"]
    assert any("%fc1.weight" in line and line.startswith("- parameter") for line in gone)
    assert sum(line.startswith("+ parameter %fc1.low_rank.") for line in new) == 2
    assert set(marks) == {"-", "+", " "}, "the bias stays"


def test_steps_around_a_node_add_its_neighbours(folders: tuple[Path, Path]) -> None:
    compiled = mm.compile(seeded(Mlp), spec(LOW), INPUTS, AXES)
    near = [difference(compiled.source, compiled.graph, "fc1", around) for around in range(3)]
    assert [len(found.before.nodes) for found in near] == sorted({len(found.before.nodes) for found in near})
    assert [len(found.after.changed) for found in near] == [3, 3, 3]
    unchanged = difference(compiled.source, compiled.graph, "fc2", 0)
    assert not unchanged.before.changed
    assert all(line.startswith("  ") for line in lines(unchanged))


def test_a_folder_of_a_model_with_shared_weights_and_slices_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.relu(self.fc(x)))

    rule = {"match": {"op": "matmul"}, "rewrite": {"low_rank": {"rank": 2}}}
    folder = mm.compile(seeded(Shared), spec(rule), {"x": randn(4, 8)}, {"x": {0: "n"}}).save(tmp_path / "out")
    code, out, _ = run(capsys, "diff", folder, "--node", "fc")
    assert code == 0
    assert sum("aten.linear" in line for line in out.splitlines() if line.startswith("-")) == 2
    assert sum("aten.matmul" in line for line in out.splitlines() if line.startswith("+")) == 4


def test_the_drawing_is_an_svg_with_both_sides(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "fc2.svg"
    code, out, _ = run(capsys, "diff", folders[1], "--node", "fc2", "--svg", file)
    assert code == 0
    assert out.endswith(f"wrote {file}\n")
    root = ElementTree.parse(file).getroot()
    kinds = [group.get("class") for group in root.iter("{http://www.w3.org/2000/svg}g")]
    assert kinds.count("gone") == 1
    assert kinds.count("new") == 4, "the dense matmul under another name, two factors, their sum"
    width, height = float(root.get("width", "0")), float(root.get("height", "0"))
    boxes = [box for group in root.iter("{http://www.w3.org/2000/svg}g") for box in group.iter("{http://www.w3.org/2000/svg}rect")]
    places = [tuple(float(box.get(name, "0")) for name in ("x", "y", "width", "height")) for box in boxes]
    assert all(x >= 0 and x + w <= width and y >= 0 and y + h <= height for x, y, w, h in places)
    for k, (x, y, w, h) in enumerate(places):
        assert not any(x < x2 + w2 and x2 < x + w and y < y2 + h2 and y2 < y + h for x2, y2, w2, h2 in places[:k]), "boxes overlap"
    first = file.read_text()
    file.write_text("mine")
    code, _, err = run(capsys, "diff", folders[1], "--node", "fc2", "--svg", file)
    assert (code, err.splitlines()[0], file.read_text()) == (2, f"{file}: the file exists", "mine")
    run(capsys, "diff", folders[1], "--node", "fc2", "--svg", file, "--force")
    assert file.read_text() == first


def test_wrong_words_of_diff_are_said(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "diff", own, "--node", "fc3")[::2] == (2, "no matmul or module at 'fc3'; did you mean fc2?\n")
    assert run(capsys, "diff", own, "--svg", "x.svg")[::2] == (2, "--svg draws the graph around one matmul: name it with --node PATH\n")
    (own / "graph.ir").write_text("graph device=cpu\nnonsense\n")
    code, _, err = run(capsys, "diff", own)
    assert code == 2
    assert err.startswith(f"{own / 'graph.ir'}: was changed: it has 26 bytes")
    code, _, err = run(capsys, "diff", own, "--no-verify")
    assert code == 2
    assert err.startswith(f"not checked (--no-verify): sizes and hashes in {own}\n{own / 'graph.ir'}: cannot be read: ")
