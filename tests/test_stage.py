"""One stage as four values, each looked at by itself, and what the stages come to together."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from exporting import mlp_graph, randn
from pruning import batches, traced

import matmorph as mm
from matmorph.errors import SpecError
from matmorph.ir.core import Graph
from matmorph.ir.sites.matmuls import find_sites
from matmorph.passes import pipeline
from matmorph.passes.methods import method_table
from matmorph.passes.pipeline import SoFar, compile_graph, plan_graph
from matmorph.passes.pruning import find_blocks
from matmorph.passes.rewriting.block_pass import PruningSoFar
from matmorph.passes.selection.survey import Survey
from matmorph.passes.stage import Decided, Measured, Run, Selected, built, decided, measured, planned, selected

METHODS = {name: method() for name, method in method_table().items()}
X = randn(3, 5, 8)
DATA = [{"x": X}]
HALF = {"low_rank": {"rank": {"ratio": 0.5}, "whiten": False}}
AUTO = {"low_rank": {"rank": "auto", "whiten": False}}
PRUNE = {"transact": {"width": "50%", "multiple_of": 2}}


@pytest.fixture(scope="module")
def graph() -> Graph:
    """fc1 [16, 8] and fc2 [4, 16], 128 and 64 parameters."""
    return mlp_graph()


def spec_of(*stages: list[dict[str, Any]], **top: Any) -> mm.Spec:
    named = [{"name": f"stage {number}", "rules": rules} for number, rules in enumerate(stages)]
    return mm.load_spec({"version": 1, "name": "t", "stages": named, **top})


def rule(name: str, match: Any, rewrite: Any = "keep", **more: Any) -> dict[str, Any]:
    return {"name": name, "match": match, "rewrite": rewrite, **more}


def run_of(graph: Graph, spec: mm.Spec, data: Any = None, **more: Any) -> Run:
    return Run(graph, spec, METHODS, data, data, **more)


def first(run: Run) -> Selected:
    return selected(run.shots[0], Survey.of(run.source), run)


def second(run: Run) -> Measured:
    return measured(first(run), run)


def third(run: Run) -> Decided:
    return decided(second(run), 0, run)


# ---- the four values


def test_selected_says_who_owns_what(graph: Graph) -> None:
    found = first(run_of(graph, spec_of([rule("a", {"path": "fc1"}, HALF), rule("b", {"path": "fc2"})])))
    assert [(claim.site.path, claim.rule and claim.rule.name) for claim in found.selection.claims] == [("fc1", "a"), ("fc2", "b")]
    assert [(site.path, owner.name) for site, owner in found.divided.claims] == [("fc1", "a")], "what is kept is nobody's work"
    assert [site.path for site in found.survey.sites] == ["fc1", "fc2"]
    assert found.survey.graph is graph


def test_measured_holds_the_moments_of_what_is_rewritten(graph: Graph) -> None:
    run = run_of(graph, spec_of([rule("a", {"path": "fc1"}, HALF)]), DATA)
    found = second(run)
    ((site, stats),) = found.stats.items()
    rows = X.reshape(-1, 8).double()
    assert site.path == "fc1"
    assert torch.allclose(stats.second_moment, rows.T @ rows, rtol=1e-5), "products of one batch are summed in float32"
    assert found.felt is None
    assert second(run_of(graph, run.spec)).stats == {}, "a plain low rank needs none"


def test_measured_asks_for_the_data_that_a_method_needs(graph: Graph) -> None:
    white = {"low_rank": {"rank": 2, "whiten": True}}
    with pytest.raises(SpecError, match="rule a: low_rank needs calibration data"):
        second(run_of(graph, spec_of([rule("a", {"path": "fc1"}, white)])))


def test_decided_leaves_nothing_open(graph: Graph) -> None:
    budget = {"parameters": "60%", "of": "matched"}
    run = run_of(graph, spec_of([rule("a", {"op": "matmul"}, AUTO)], budget=budget))
    before, found = second(run), third(run)
    assert all(owner.is_open for _, owner in before.selected.divided.claims)
    assert found.decision is not None
    assert found.selection is found.decision.selection
    assert all(claim.rule is not None and not claim.rule.is_open for claim in found.selection.claims)
    assert not any(owner.is_open for _, owner in found.divided.claims)


def test_decided_changes_nothing_where_nothing_is_open(graph: Graph) -> None:
    run = run_of(graph, spec_of([rule("a", {"path": "fc1"}, HALF)]))
    before = second(run)
    found = decided(before, 0, run)
    assert found.decision is None
    assert found.selection is before.selected.selection
    assert found.divided is before.selected.divided


def test_built_is_a_new_graph_and_the_old_one_is_as_it_was(graph: Graph) -> None:
    run = run_of(graph, spec_of([rule("a", {"path": "fc1"}, HALF)]))
    text = str(graph)
    found = built(third(run), PruningSoFar(), run)
    assert str(graph) == text
    assert [site.path for site in find_sites(found.graph)] == ["fc1.low_rank.down", "fc1.low_rank.up", "fc2"]
    assert [(row.path, row.status) for row in found.rows] == [("fc1", "rewritten"), ("fc2", "unclaimed")]
    assert [site.path for site in found.replaced] == ["fc1"]
    assert found.decision is None


def test_the_values_are_frozen(graph: Graph) -> None:
    run = run_of(graph, spec_of([rule("a", {"path": "fc1"}, HALF)]))
    choice = third(run)
    for value, name in (
        (run, "seed"),
        (choice.measured.selected, "stage"),
        (choice.measured, "stats"),
        (choice, "decision"),
        (built(choice, PruningSoFar(), run), "graph"),
        (SoFar(graph, ()), "rows"),
        (PruningSoFar(), "aside"),
    ):
        with pytest.raises(FrozenInstanceError):
            setattr(value, name, None)


def test_a_step_can_be_taken_twice(graph: Graph) -> None:
    run = run_of(graph, spec_of([rule("a", {"op": "matmul"}, HALF)]), DATA)
    choice = third(run)
    one, other = (built(choice, PruningSoFar(), run) for _ in range(2))
    assert str(one.graph) == str(other.graph)
    assert one.rows == other.rows


# ---- plan and compile


def test_plan_and_compile_share_what_is_selected(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Selected] = []

    def watched(*given: Any) -> Selected:
        found.append(selected(*given))
        return found[-1]

    monkeypatch.setattr(pipeline, "selected", watched)
    spec = spec_of([rule("a", {"path": "fc1"}, HALF), rule("b", {"path": "fc2"})])
    plan_graph(graph, spec, METHODS, "t")
    compile_graph(graph, spec, METHODS, "t")
    plan, compiled = ([(claim.site.path, claim.rule, claim.why) for claim in each.selection.claims] for each in found)
    assert plan == compiled


def test_planned_is_built_from_shapes_alone(graph: Graph) -> None:
    run = run_of(graph, spec_of([rule("a", {"path": "fc1"}, HALF)]))
    plan, done = planned(first(run), PruningSoFar(), run), built(third(run), PruningSoFar(), run)
    assert plan.graph is graph
    assert all(outcome.nodes is None and outcome.weight_error is None for outcome in plan.outcomes)
    assert [site.path for site in plan.replaced] == [site.path for site in done.replaced] == ["fc1"]
    assert [(row.path, row.status, row.parameters) for row in plan.rows] == [(row.path, row.status, row.parameters) for row in done.rows]


# ---- blocks


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Graph, int]]:
    """(graph, how many of its sites may be claimed) of each search for blocks."""
    seen: list[tuple[Graph, int]] = []

    def search(graph: Graph, sites: Any) -> Any:
        seen.append((graph, len(sites)))
        return find_blocks.find_blocks(graph, sites)

    monkeypatch.setattr("matmorph.passes.selection.survey.find_blocks", search)
    return seen


def test_blocks_are_searched_for_once_per_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A condition asks for them, and both divisions of the claims, before the budget has decided and after it."""
    _, inputs, graph = traced("bert")
    auto = {"transact": {"width": "auto", "multiple_of": 2}}
    budget = {"parameters": "70%", "of": "matched"}
    spec = spec_of([rule("mlp", {"block": "mlp"}, auto)], [rule("again", {"block": "attention"}, PRUNE)], budget=budget)
    seen = counted(monkeypatch)
    plan_graph(graph, spec, METHODS, "t")
    assert seen == [(graph, len(find_sites(graph)))], "nothing left the survey between the stages of the plan"
    seen.clear()
    done = compile_graph(graph, spec, METHODS, "t", calibration=[inputs])
    assert len(done.decisions) == 1
    assert len(seen) == 2 == len({id(each) for each, _ in seen})
    assert seen[0][0] is graph


def test_no_blocks_are_searched_for_where_nobody_asks(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counted(monkeypatch)
    spec = spec_of([rule("a", {"op": "matmul"}, HALF)])
    plan_graph(graph, spec, METHODS, "t")
    compile_graph(graph, spec, METHODS, "t")
    assert seen == []


def test_what_is_rolled_back_can_be_pruned_by_a_later_stage() -> None:
    """As if the stage that was rolled back had not been."""
    _, _, graph = traced("bert")
    early = rule("early", {"block": "mlp"}, PRUNE)
    late = rule("late", {"block": "mlp"}, {"transact": {"width": "75%", "multiple_of": 2}})
    spec = spec_of([early], [late])
    strict, loose = spec.stages
    tight = mm.load_spec({**spec_of([early]).resolved, "tolerance": {"weight_error": 1e-9, "on_exceed": "roll_back"}}).stages[0].tolerance
    both = replace(spec, stages=(replace(strict, tolerance=tight), loose))
    done = compile_graph(graph, both, METHODS, "t", calibration=batches("bert"))
    alone = compile_graph(graph, replace(spec, stages=(loose,)), METHODS, "t", calibration=batches("bert"))
    assert sum("rolled back" in note for note in done.report.notes) == 2
    assert [row.status for row in done.report.sites] == [row.status for row in alone.report.sites]
    assert [(row.path, row.weight_error, row.output_error) for row in done.report.sites] == [
        (row.path, row.weight_error, row.output_error) for row in alone.report.sites
    ]
    assert any(row.weight_error for row in done.report.sites)


def test_a_plan_prunes_again_after_a_stage_that_left_the_block_alone() -> None:
    _, inputs, graph = traced("bert")
    again = {"transact": {"width": "50%", "multiple_of": 2}}
    spec = spec_of(
        [rule("one", {"block": "mlp"}, PRUNE)], [rule("two", {"role": "attention.q"}, HALF)], [rule("three", {"block": "mlp"}, again)]
    )
    plan, done = plan_graph(graph, spec, METHODS, "t"), compile_graph(graph, spec, METHODS, "t", calibration=[inputs])
    assert [(row.path, row.status, row.rule) for row in plan.sites] == [(row.path, row.status, row.rule) for row in done.report.sites]
