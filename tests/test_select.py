"""Which rule owns which site, and the errors of rules that own nothing or the wrong number."""

from __future__ import annotations

import pytest
from handmade import EMPTY, GATED, SITES, gated_mlp, graph_of, later_stage, rules, site, sites_of, stage_of

from matmorph.errors import SpecError
from matmorph.passes.selection.select import select
from matmorph.passes.selection.survey import Survey


def message(error: pytest.ExceptionInfo[SpecError], tmp_path) -> list[str]:
    """The lines of an error, without the folder."""
    return str(error.value).replace(f"{tmp_path}/", "").splitlines()


def owned(selection, name: str) -> list[str]:
    return [claim.site.path for claim in selection.claims if claim.rule and claim.rule.name == name]


def test_the_first_rule_that_matches_owns_the_site(tmp_path) -> None:
    stage = stage_of(
        rules('name: last, match: {layer: last 1, role: "mlp.*"}', "name: mlp, match: {role: mlp.*}", "name: rest, match: {op: matmul}"),
        tmp_path,
    )
    selection = select(stage, Survey.of(EMPTY, SITES))
    assert [claim.site for claim in selection.claims] == list(SITES)
    assert owned(selection, "last") == ["encoder.layer.2.mlp.intermediate", "encoder.layer.2.mlp.output"]
    assert owned(selection, "mlp") == [f"encoder.layer.{k}.mlp.{name}" for k in (0, 1) for name in ("intermediate", "output")]
    assert owned(selection, "rest") == [f"encoder.layer.{k}.attention.query" for k in range(3)] + ["head"]
    last = selection.claims[-1]
    assert (last.rule, last.why, last.occurrences) == (None, "no rule matches", ())
    assert selection.claims[0].why == "matched by rule rest"
    assert selection.of(stage.rules[1]) == tuple(claim for claim in selection.claims if claim.rule is stage.rules[1])


def test_a_blocked_site_keeps_its_claim(tmp_path) -> None:
    blocked = site("in_proj", blocked="overlapping slices")
    assert select(stage_of(rules("name: a, match: {op: matmul}"), tmp_path), Survey.of(EMPTY, [blocked])).claims[0].rule is not None


def test_inserted_matmuls_need_inserted_by(tmp_path) -> None:
    sites = [site("fc.low_rank.down", form="mm", rule="first"), site("fc.low_rank.up", form="mm", rule="second"), site("fc2")]
    stage = later_stage(rules("name: all, match: {op: matmul}", "name: again, match: {inserted_by: first}"), tmp_path)
    selection = select(stage, Survey.of(EMPTY, sites))
    assert (owned(selection, "all"), owned(selection, "again")) == (["fc2"], ["fc.low_rank.down"])
    assert selection.claims[1].why == "inserted by rule second, and no rule matches it with inserted_by"


def test_patterns_claim_with_their_occurrences(tmp_path) -> None:
    graph = graph_of(gated_mlp(2))
    sites = sites_of(graph)
    text = "\n".join(f"        {line}" for line in GATED.strip().splitlines())
    stage = stage_of(
        f"  - name: gated\n    expect: 4\n    match:\n      pattern: |\n{text}\n      claim: [g, u]\n    rewrite: keep\n", tmp_path
    )
    claims = select(stage, Survey.of(graph, sites)).claims
    assert [claim.site.path for claim in claims if claim.rule] == [f"layers.{k}.{name}" for k in (0, 1) for name in ("gate", "up")]
    first = claims[0].occurrences[0].captures
    assert (first["g"], first["u"], first["h"].name) == (sites[0], sites[1], "h0")
    assert claims[1].occurrences == claims[0].occurrences


# ------------------------------------------------------------------------------------------------------------------ errors


def test_a_rule_that_matches_nothing(tmp_path) -> None:
    with pytest.raises(SpecError) as error:
        select(
            stage_of(rules('name: mlp, match: {path: "encoder.layers.*.mlp.output", role: "mlp.*", layer: 0..1}'), tmp_path),
            Survey.of(EMPTY, SITES),
        )
    assert message(error, tmp_path) == [
        "s.yaml:3:24: rules[0].match: rule mlp matches no matmul",
        "  path: encoder.layers.*.mlp.output: excludes 11 of 11 sites; "
        "nearest paths: encoder.layer.0.mlp.output, encoder.layer.1.mlp.output, encoder.layer.2.mlp.output",
        "  role: mlp.*: excludes 5 of 11 sites; roles here: attention.q, mlp.fc1, mlp.down, head, embedding",
        "  layer: 0..1: excludes 5 of 11 sites; layers here: 0..2",
        "  op: matmul (implied: no op is named): excludes 1 of 11 sites",
    ]


@pytest.mark.parametrize(
    ("match", "line"),
    [
        ("{role: moe.router}", "role: moe.router: excludes 11 of 11 sites; roles here: attention.q, mlp.fc1, mlp.down, head, embedding"),
        ("{layer: 7}", "layer: 7: excludes 11 of 11 sites; layers here: 0..2"),
        ("{op: einsum}", "op: einsum: excludes 11 of 11 sites; ops here: linear, embedding"),
        ('{in_features: "> 1k"}', "in_features: > 1k: excludes 11 of 11 sites; here from 8 to 16"),
        ("{params: 33}", "params: 33: excludes 11 of 11 sites; here from 32 to 64"),
        ('{pattern: "a = matmul(relu(x))"}', "pattern: a = matmul(relu(x)): excludes 11 of 11 sites; "
         "found nowhere; the graph has 0 relu, 0 matmul"),
        ("{shared: true}", "shared: true: excludes 11 of 11 sites"),
        ("{not: {params: '> 1'}}", "not: {params: > 1}: excludes 11 of 11 sites"),
        ('{path: "re:encodr.*"}', "path: re:encodr.*: excludes 11 of 11 sites; nearest paths: encoder.layer.0.mlp.output, "
         "encoder.layer.1.mlp.output, encoder.layer.2.mlp.output"),
        ("{outlier_ratio: '> 5'}", "outlier_ratio: > 5: excludes 10 of 11 sites"),
    ],
)  # fmt: skip
def test_what_there_is_instead(match: str, line: str, tmp_path) -> None:
    with pytest.raises(SpecError) as error:
        select(stage_of(rules(f"name: a, match: {match}"), tmp_path), Survey.of(EMPTY, SITES))
    assert message(error, tmp_path)[1] == f"  {line}"


@pytest.mark.parametrize(
    ("maker", "hint"),
    [(None, "no rule has inserted a matmul so far"), ("second", "matmuls here were inserted by: second")],
)
def test_a_rule_for_inserted_matmuls_that_are_not_there(maker: str | None, hint: str, tmp_path) -> None:
    sites = [site("fc", rule=maker)]
    with pytest.raises(SpecError) as error:
        select(later_stage(rules("name: a, match: {inserted_by: first}"), tmp_path), Survey.of(EMPTY, sites))
    assert error.value.details == (f"inserted_by: first: excludes 1 of 1 site; {hint}",)


def test_conditions_that_never_meet(tmp_path) -> None:
    with pytest.raises(SpecError) as error:
        select(stage_of(rules("name: a, match: {role: head, layer: 1}"), tmp_path), Survey.of(EMPTY, SITES))
    assert message(error, tmp_path)[-1] == "  each condition holds for some site, but never all of them for the same one"


def test_a_rule_whose_sites_belong_to_earlier_rules(tmp_path) -> None:
    stage = stage_of(
        rules("name: q, match: {role: attention.q}", "name: mlp, match: {role: mlp.*}", "name: late, match: {layer: 1}, expect: 3"),
        tmp_path,
    )
    with pytest.raises(SpecError) as error:
        select(stage, Survey.of(EMPTY, SITES))
    assert message(error, tmp_path) == [
        "s.yaml:5:25: rules[2].match: rule late owns nothing (expect is 3): earlier rules own all 3 sites that it matches",
        "  rule q already owns 1 site that it matches too",
        "  rule mlp already owns 2 sites that it matches too",
    ]


def test_a_count_that_disagrees(tmp_path) -> None:
    stage = stage_of(
        rules("name: first, match: {path: encoder.layer.0.mlp.output}", "name: mlp, match: {role: mlp.*}, expect: 6"), tmp_path
    )
    with pytest.raises(SpecError) as error:
        select(stage, Survey.of(EMPTY, SITES))
    assert message(error, tmp_path) == [
        "s.yaml:4:5: rules[1].expect: rule mlp owns 5 sites, expect is 6",
        "  encoder.layer.0.mlp.intermediate",
        "  encoder.layer.1.mlp.intermediate",
        "  encoder.layer.1.mlp.output",
        "  encoder.layer.2.mlp.intermediate",
        "  encoder.layer.2.mlp.output",
        "  rule first already owns 1 site that it matches too",
    ]


def test_long_lists_are_cut(tmp_path) -> None:
    sites = [site(f"fc{k}") for k in range(30)]
    with pytest.raises(SpecError) as error:
        select(stage_of(rules("name: a, match: {op: matmul}, expect: 1"), tmp_path), Survey.of(EMPTY, sites))
    assert error.value.details[-2:] == ("fc19", "... and 10 more")


def test_optional_rules_may_own_nothing_but_not_the_wrong_number(tmp_path) -> None:
    selection = select(stage_of(rules("name: a, match: {role: moe.router}, optional: true, expect: 4"), tmp_path), Survey.of(EMPTY, SITES))
    assert all(claim.rule is None for claim in selection.claims)
    with pytest.raises(SpecError, match="rule a owns 1 site, expect is 4"):
        select(stage_of(rules("name: a, match: {role: head}, optional: true, expect: 4"), tmp_path), Survey.of(EMPTY, SITES))


def test_a_model_without_matmuls(tmp_path) -> None:
    with pytest.raises(SpecError, match="the model has no weight matmul"):
        select(stage_of(rules("name: a, match: {op: matmul}"), tmp_path), Survey.of(EMPTY, ()))


def test_path_alternatives_that_match_nothing_are_noted(tmp_path) -> None:
    text = rules(
        'name: a, match: {path: "encoder.**.{intermediate,outptu}"}',
        'name: b, match: {path: [head, "re:haed"]}',
        "name: c, match: {role: attention.*}",
    )
    notes = select(stage_of(text, tmp_path), Survey.of(EMPTY, SITES)).notes
    assert [note.replace(f"{tmp_path}/", "") for note in notes] == [
        "s.yaml:3:29: rules[0].match.path: 'encoder.**.outptu' matches no site",
        "s.yaml:4:29: rules[1].match.path: 're:haed' matches no site",
    ]
