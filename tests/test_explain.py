"""Why a site was selected or not, condition by condition."""

from __future__ import annotations

import pytest
import torch
from handmade import EMPTY, GATED, SITES, gated_mlp, graph_of, later_stage, rules, site, sites_of, stage_of

from matmorph.errors import InputError
from matmorph.passes.selection.explain import explain

STAGE = rules(
    'name: other, match: {role: "attention.*", layer: 0..1}',
    'name: nested, match: {any: [{params: "> 40"}, {role: head, layer: 1}], not: {use: wide}}',
    "name: mlp, match: {use: wide, path: encoder.**}",
    "name: rest, match: {op: matmul}",
)


def test_every_rule_and_condition_is_shown(tmp_path) -> None:
    stage = stage_of(STAGE, tmp_path, select='select: {wide: {in_features: ">= 16", role: "mlp.*"}}\n')
    explanation = explain(stage, EMPTY, SITES, "encoder.layer.1.mlp.output")
    assert [line.replace(f"{tmp_path}/", "") for line in explanation.lines()] == [
        "encoder.layer.1.mlp.output: linear 16 -> 4, role mlp.down, layer 1",
        "owned by rule mlp",
        "rule other (s.yaml:4:5): does not match",
        "  no  role: attention.*  [mlp.down]",
        "  yes layer: 0..1  [layer 1 of 3]",
        "rule nested (s.yaml:5:5): does not match",
        "  yes any: [{params: > 40}, {role: head, layer: 1}]",
        "  yes   params: > 40  [64]",
        "  no    {role: head, layer: 1}",
        "  no      role: head  [mlp.down]",
        "  yes     layer: 1  [layer 1 of 3]",
        "  no  not: {use: wide}",
        "  yes   use: wide",
        "  yes     in_features: >= 16  [16]",
        "  yes     role: mlp.*  [mlp.down]",
        "rule mlp (s.yaml:6:5): owns it",
        "  yes use: wide",
        "  yes   in_features: >= 16  [16]",
        "  yes   role: mlp.*  [mlp.down]",
        "  yes path: encoder.**  [encoder.layer.1.mlp.output]",
        "rule rest (s.yaml:7:5): matches, but an earlier rule owns it",
        "  yes op: matmul  [linear]",
    ]


def test_a_table_meets_the_implied_condition(tmp_path) -> None:
    explanation = explain(stage_of(rules("name: a, match: {params: '> 1'}"), tmp_path), EMPTY, SITES, "embeddings.word.weight")
    assert explanation.owner is None
    row = explanation.rules[0].conditions[-1]
    assert (row.text, row.hit, row.value) == ("op: matmul (implied: no op is named)", False, "embedding")


def test_statistics_are_read_only_where_they_decide(tmp_path) -> None:
    weight = torch.eye(4)
    sites = [site("a", role="head", weight=weight), site("b", role="other", weight=weight)]
    stage = stage_of(rules("name: r, match: {effective_rank: '< 3', role: head}"), tmp_path)
    read, left = (explain(stage, EMPTY, sites, path).rules[0].conditions[0] for path in ("a", "b"))
    assert (read.hit, read.value) == (False, "4")
    assert (left.hit, left.value) == (None, "not read: a cheaper condition fails")


@pytest.mark.parametrize(
    ("path", "hit", "value"),
    [
        ("layers.1.up", True, "captured as u"),
        ("layers.1.down", False, "captured as d, which is not claimed"),
    ],
)
def test_patterns_show_what_the_site_is_captured_as(path: str, hit: bool, value: str, tmp_path) -> None:
    graph = graph_of(gated_mlp(2))
    text = "\n".join(f"        {line}" for line in GATED.strip().splitlines())
    stage = stage_of(f"  - name: gated\n    match:\n      pattern: |\n{text}\n      claim: [g, u]\n    rewrite: keep\n", tmp_path)
    row = explain(stage, graph, sites_of(graph), path).rules[0].conditions[0]
    assert (row.text, row.hit, row.value) == ("pattern: g = matmul(x) ...", hit, value)
    assert row.at.endswith("s.yaml:5:16")


def test_a_tied_weight_is_found_under_each_name(tmp_path) -> None:
    sites = [site("head", names=("head.weight", "wte.weight"), blocked="overlapping slices", uses=2)]
    stage = later_stage(rules("name: a, match: {shared: true, inserted_by: first}"), tmp_path)
    explanation = explain(stage, EMPTY, sites, "wte.weight")
    assert "no method may take it: overlapping slices" in explanation.lines()
    assert [row.value for row in explanation.rules[0].conditions] == ["2 applications, 2 names", "of the source model"]
    data = explanation.to_dict()
    assert (data["path"], data["owner"], data["rules"][0]["conditions"][0]["hit"]) == ("head", None, True)


def test_an_unknown_path_names_the_nearest(tmp_path) -> None:
    with pytest.raises(InputError) as error:
        explain(stage_of(rules("name: a, match: {op: matmul}"), tmp_path), EMPTY, SITES, "encoder.layer.1.mlp.outptu")
    assert str(error.value) == (
        "the model has no matmul 'encoder.layer.1.mlp.outptu'\n"
        "  nearest paths: encoder.layer.1.mlp.output, encoder.layer.0.mlp.output, encoder.layer.2.mlp.output"
    )
