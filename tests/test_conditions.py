"""A condition is one file and its line in the table: one that this file defines is read, described, selects and is explained."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from handmade import EMPTY, SITES, rules, stage_of

import matmorph
from matmorph.errors import SpecError
from matmorph.ir.site import Site
from matmorph.passes.selection.explain import explain
from matmorph.passes.selection.select import select
from matmorph.passes.selection.survey import Survey
from matmorph.specs.conditions.base import Condition, SelectionContext
from matmorph.specs.conditions.table import CONDITIONS
from matmorph.specs.conditions.values import COMPARISONS
from matmorph.specs.json_schema import json_schema
from matmorph.specs.kinds import Kind
from matmorph.specs.numbers import Comparison
from matmorph.specs.reference import reference_page

PACKAGE = Path(matmorph.__file__).parent


@dataclass(frozen=True, slots=True, eq=False)
class AspectCondition(Condition):
    key: ClassVar[str] = "aspect"
    doc: ClassVar[str] = "output width over input width"
    kind: ClassVar[Kind] = COMPARISONS
    about: ClassVar[str] = "An `aspect` of 1 is a square."
    notation: ClassVar[str] = "Comparisons"

    value: tuple[Comparison, ...]

    def test(self, site: Site, context: SelectionContext) -> bool:
        return all(comparison.holds(site.out_features / site.in_features) for comparison in self.value)

    def found(self, site: Site, context: SelectionContext) -> str:
        return f"{site.out_features}:{site.in_features}"

    def nearby(self, sites: Sequence[Site], context: SelectionContext) -> str:
        return f"aspects here: {', '.join(dict.fromkeys(self.found(site, context) for site in sites))}"


@pytest.fixture(autouse=True)
def aspect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONDITIONS, "aspect", AspectCondition)


def spec(match: dict) -> dict:
    return {"version": 1, "rules": [{"match": match, "rewrite": "keep"}]}


def test_it_is_in_the_schema() -> None:
    schema = json_schema({})
    assert schema["$defs"]["match"]["properties"]["aspect"]["description"] == "output width over input width"
    judge = pytest.importorskip("jsonschema").Draft202012Validator(schema)
    assert judge.is_valid(spec({"aspect": "< 1"}))
    assert judge.is_valid(spec({"not": {"aspect": [0.5, "> 2"]}}))
    assert not judge.is_valid(spec({"aspect": True}))
    assert not judge.is_valid(spec({"aspekt": "< 1"}))


def test_it_is_on_the_reference_page() -> None:
    page = reference_page({})
    assert "| `aspect` | text or number, or a list | output width over input width |" in page
    assert "\n\nAn `aspect` of 1 is a square.\n\n" in page
    assert "**Comparisons** (`in_features`, `out_features`, `params`, `effective_rank`, `outlier_ratio`, `aspect`)." in page


def test_it_selects(tmp_path: Path) -> None:
    stage = stage_of(rules('name: wide, match: {aspect: "< 0.5"}', "name: rest, match: {any: [{aspect: 0.5}, {role: head}]}"), tmp_path)
    owners = {claim.site.path: claim.rule and claim.rule.name for claim in select(stage, Survey.of(EMPTY, SITES)).claims}
    assert {path for path, owner in owners.items() if owner == "wide"} == {f"encoder.layer.{k}.mlp.output" for k in range(3)}
    assert {owner for path, owner in owners.items() if not path.endswith("mlp.output")} == {"rest", None}


def test_it_is_explained(tmp_path: Path) -> None:
    stage = stage_of(rules('name: wide, match: {not: {aspect: "< 0.5"}}'), tmp_path)
    lines = explain(stage, EMPTY, SITES, "encoder.layer.1.mlp.output").lines()
    assert lines[-2:] == ("  no  not: {aspect: < 0.5}", "  yes   aspect: < 0.5  [4:16]")


def test_its_errors_say_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"unknown key; did you mean aspect\?"):
        stage_of(rules("name: a, match: {aspekt: 1}"), tmp_path)
    with pytest.raises(SpecError, match=r"rules\[0\].match.aspect: expected 768, .* got 'square'"):
        stage_of(rules("name: a, match: {aspect: square}"), tmp_path)
    with pytest.raises(SpecError) as error:
        select(stage_of(rules("name: a, match: {aspect: 1}"), tmp_path), Survey.of(EMPTY, SITES))
    assert error.value.details[0] == "aspect: 1: excludes 11 of 11 sites; aspects here: 4:8, 4:16"


# ------------------------------------------------------------------------------------------------------------------ who knows a condition


def sources(*folders: str) -> dict[str, ast.Module]:
    """The modules of folders of the package by path."""
    paths = [path for folder in folders for path in sorted((PACKAGE / folder).rglob("*.py"))]
    return {str(path.relative_to(PACKAGE)): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def single_conditions() -> list[type[Condition]]:
    return [entry for entry in CONDITIONS.values() if issubclass(entry, Condition) and entry is not AspectCondition]


def test_a_condition_is_known_to_two_files() -> None:
    knowing: dict[str, set[str]] = {condition.__name__: set() for condition in single_conditions()}
    assert len(knowing) == 14
    for path, tree in sources(".").items():
        for node in ast.walk(tree):
            for name in {getattr(node, field, "") for field in ("id", "attr", "name")} & knowing.keys():
                knowing[name].add(path)
    for condition in single_conditions():
        own = str(Path(inspect.getfile(condition)).relative_to(PACKAGE))
        assert knowing[condition.__name__] == {own, "specs/conditions/table.py"}


def test_no_key_of_a_condition_is_spelled_outside_its_file() -> None:
    """In the rooms that read, describe and use conditions."""
    other_meanings = {
        ("specs/document.py", "block"),  # a kind of method
        ("specs/reference.py", "block"),
        ("specs/notations.py", "pattern"),  # of JSON Schema
        ("specs/numbers.py", "op"),  # a group of a regular expression
    }
    keys = {name for entry in single_conditions() for name in (entry.key, *entry.beside)}
    own = {str(Path(inspect.getfile(condition)).relative_to(PACKAGE)) for condition in single_conditions()}
    spelled = {
        (path, node.value)
        for path, tree in sources("specs", "passes/selection").items()
        if path not in own
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in keys
    }
    assert spelled == other_meanings
