"""The front of a budget: every point is the best choice of its size, of the candidates of one compile. In artefact and command line."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import randn, seeded
from test_budget import ALL, DATA, MATRICES, WHITE, Net

import matmorph as mm
from matmorph.cli.main import main
from matmorph.errors import InputError, SpecError
from matmorph.passes.budget import decide as deciding
from matmorph.report.front import print_front
from matmorph.report.table import make_console

AXES = {"x": {0: "batch", 1: "seq"}}
ANY = {"any_of": [WHITE, "keep"]}


def spec(budget: Any, rewrite: Any = ANY, **top: Any) -> dict[str, Any]:
    return {"version": 1, "name": "t", "rules": [{"name": "r", "match": ALL, "rewrite": rewrite}], "budget": budget, **top}


def compiled(budget: Any, **more: Any) -> mm.Compiled:
    return mm.compile(seeded(Net), spec(budget, **more), {"x": randn(3, 5, 24)}, AXES, DATA)


@pytest.fixture(scope="module")
def half() -> mm.Compiled:
    return compiled({"parameters": "50%", "of": "matched"})


def test_points_rise_in_size_and_fall_in_error(half: mm.Compiled) -> None:
    front = half.pareto(6)
    totals, errors = [point.total for point in front.points], [point.error for point in front.points]
    assert totals == sorted(set(totals))
    assert errors == sorted(set(errors), reverse=True)
    assert totals[0] == 24 + 32 + 32 + 24 + 24 + 16, "rank 1 everywhere"
    assert (totals[-1], errors[-1]) == (MATRICES, 0.0), "everything as it is"
    assert all(point.total <= point.limit for point in front.points)
    assert front.base == MATRICES
    assert front.share(front.points[-1]) == 1.0


def test_a_point_is_what_compile_makes_of_its_limit(half: mm.Compiled) -> None:
    point = half.pareto(5).points[2]
    again = compiled({"parameters": point.limit, "of": "matched"})
    assert sum(row.parameters[1] for row in again.report.sites) == point.total
    mean = sum((row.output_error or 0.0) ** 2 for row in again.report.sites) / 3
    assert mean**0.5 == pytest.approx(point.error, rel=1e-3)  # factors in float32
    assert point.chosen == {row.path: f"low_rank rank {row.rank}" if row.rank else "keep" for row in again.report.sites}


def test_nothing_is_decomposed_again(half: mm.Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("decomposed")

    monkeypatch.setattr(deciding, "measured", refuse)
    monkeypatch.setattr("matmorph.passes.methods.low_rank.method.directions", refuse)
    assert len(half.pareto(4).points) == 4


def test_what_no_rule_decides_is_counted() -> None:
    front = compiled({"bytes": "50%"}).pareto(3)
    biases = 32 + 24 + 16
    assert front.points[-1].total == front.base == 4 * (MATRICES + biases)
    assert front.of == "model"


def test_a_folder_has_the_front_beside_the_model(half: mm.Compiled, tmp_path: Path) -> None:
    first, again = (half.save(tmp_path / name, pareto=4) for name in ("one", "two"))
    data = json.loads((first / "pareto.json").read_text(encoding="utf-8"))
    assert (data["resource"], data["of"], len(data["points"])) == ("parameters", "matched", 4)
    assert data["points"][-1]["share"] == 1.0
    assert set(data["points"][0]["sites"]) == {"a", "b", "c"}
    root = ElementTree.parse(first / "pareto.svg").getroot()
    assert len(root.findall("{http://www.w3.org/2000/svg}circle")) == 4
    assert {"pareto.json", "pareto.svg"} < set(json.loads((first / "manifest.json").read_text(encoding="utf-8"))["files"])
    for name in ("pareto.json", "pareto.svg"):
        assert (first / name).read_bytes() == (again / name).read_bytes()
    assert not (half.save(tmp_path / "none") / "pareto.json").exists()


@pytest.mark.parametrize(
    ("made", "points", "message"),
    [
        (spec({"parameters": "50%"}), 1, "a front needs at least 2 budgets, got 1"),
        (spec({"parameters": "50%", "bytes": "50%"}), 4, "a front sweeps one limit, and the budget has parameters, bytes"),
        ({"version": 1, "rules": [{"match": ALL, "rewrite": {"low_rank": {"rank": 2}}}]}, 4, "no rule of this spec says auto or any_of"),
    ],
)
def test_what_cannot_be_swept_is_said(made: Any, points: int, message: str) -> None:
    done = mm.compile(seeded(Net), made, {"x": randn(3, 5, 24)}, AXES, DATA)
    with pytest.raises((InputError, SpecError), match=message):
        done.pareto(points)


def test_two_budgets_are_one_too_many() -> None:
    stages = [{"name": name, "rules": spec({})["rules"], "budget": {"parameters": "90%"}} for name in ("one", "two")]
    stages[1]["rules"] = [{"name": "s", "match": {"inserted_by": "r"}, "rewrite": ANY}]
    done = mm.compile(seeded(Net), {"version": 1, "stages": stages}, {"x": randn(3, 5, 24)}, AXES, DATA)
    with pytest.raises(InputError, match="2 stages of this spec have one"):
        done.pareto(4)


FACTORY = """
import torch, matmorph

def mlp():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(24, 48), torch.nn.GELU(), torch.nn.Linear(48, 24))
    return matmorph.Model(layers, (torch.randn(4, 24),), ({0: "batch"},), calibration=[(torch.randn(16, 24),)])
"""
LINE = "rules: [{match: {op: matmul}, rewrite: {any_of: [{low_rank: {rank: auto}}, keep]}}]\nbudget: {parameters: 60%, of: matched}\n"


def line(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return int(ended.value.code or 0)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "toy_pareto.py").write_text(FACTORY, encoding="utf-8")
    (tmp_path / "auto.yaml").write_text(f"version: 1\n{LINE}", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_prints_the_front_and_writes_it(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert line("compile", "toy_pareto:mlp", "--spec", "auto.yaml", "--out", "out", "--pareto", "3") == 0
    printed = capsys.readouterr().out
    assert "pareto: parameters, % of the matched matmuls" in printed
    assert any(row.split()[:4] == ["2.30", "k", "100.0", "0.000"] for row in printed.splitlines()), printed
    assert {"pareto.json", "pareto.svg", "model.onnx"} <= {path.name for path in (workplace / "out").iterdir()}


def test_the_command_refuses_before_any_work(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert line("compile", "no_such:model", "--spec", "low-rank-60", "--out", "out", "--pareto", "3") == 2
    assert capsys.readouterr().err.startswith("a front needs something to decide")
    assert not (workplace / "out").exists()


def test_equal_choices_make_one_point() -> None:
    torch.manual_seed(0)
    front = compiled({"parameters": "50%", "of": "matched"}, rewrite={"any_of": [{"low_rank": {"rank": 2}}, "keep"]}).pareto(50)
    assert 1 < len(front.points) <= 2**3


def test_fewer_points_than_were_asked_for_are_explained(half: mm.Compiled) -> None:
    front = half.pareto(200)
    assert front.asked == 200
    assert len(front.points) < 200
    file = io.StringIO()
    print_front(make_console(file), front)
    assert f"200 budgets make {len(front.points)} points: the candidates allow no other choice between them" in file.getvalue()
