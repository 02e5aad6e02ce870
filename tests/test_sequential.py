"""`calibration: {order: sequential}`. Oracles: numpy's least squares on rows written out; the outputs of both whole graphs, run at the end,
which know nothing of steps, streams or moments."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from pruning import batches as zoo_batches
from pruning import traced
from rewriting import graph_of

import matmorph as mm
from matmorph.errors import SpecError
from matmorph.ir.core import Graph
from matmorph.ir.evaluate import evaluate
from matmorph.ir.sites.matmuls import find_sites
from matmorph.passes.linalg.target import KEPT, STRENGTHS, CrossMoments, Directions, target
from matmorph.passes.methods import method_table
from matmorph.passes.pipeline import Compilation, compile_graph, plan_graph
from matmorph.passes.statistics.calibrate import bound_batch
from matmorph.report.model import SiteRow

METHODS = {name: method() for name, method in method_table().items()}

NET = """graph device=cpu
range b 1..
input %x: float32[b, 16] "x"
parameter %q: float32[16, 16] "q.weight"
parameter %k: float32[16, 16] "k.weight"
parameter %k.bias: float32[16] "k.bias"
parameter %o: float32[16, 16] "o.weight"
parameter %up: float32[32, 16] "up.weight"
parameter %down: float32[16, 32] "down.weight"
%1: float32[b, 16] = aten.linear.default(%x, %q)
%2: float32[b, 16] = aten.linear.default(%x, %k, %k.bias)
%3: float32[b, 16] = aten.tanh.default(%1)
%4: float32[b, 16] = aten.mul.Tensor(%3, %2)
%5: float32[b, 16] = aten.linear.default(%4, %o)
%6: float32[b, 16] = aten.add.Tensor(%x, %5)
%7: float32[b, 32] = aten.linear.default(%6, %up)
%8: float32[b, 32] = aten.relu.default(%7)
%9: float32[b, 16] = aten.linear.default(%8, %down)
%10: float32[b, 16] = aten.add.Tensor(%6, %9)
output %10 "y"
"""
TWICE = NET.replace("aten.linear.default(%4, %o)", "aten.linear.default(%4, %q)").replace('parameter %o: float32[16, 16] "o.weight"\n', "")
LOW = {"low_rank": {"rank": 4, "whiten": True}}
REWRITES = {
    "low_rank": LOW,
    "tt": {"tt": {"rank": 3}},
    "loftq": {"loftq": {"quantizer": "uniform", "bits": 2, "block_size": 16, "rank": 2, "whiten": True}},
    "gptq": {"quantize": {"quantizer": "uniform", "bits": 2, "block_size": 16, "rounding": "gptq"}},
    "nearest": {"quantize": {"quantizer": "uniform", "bits": 2, "block_size": 16}},
}


def data(count: int = 10, rows: int = 24) -> list[tuple[torch.Tensor]]:
    g = torch.Generator().manual_seed(1)
    mix = torch.randn(16, 16, generator=g) * torch.linspace(0.05, 1, 16)
    return [(torch.randn(rows, 16, generator=g) @ mix,) for _ in range(count)]


def spec(rewrite: Any, order: str = "sequential", *, match: Any = None, more: Any = None, **calibration: Any) -> mm.Spec:
    rules = [{"name": "all", "match": match or {"op": "matmul"}, "rewrite": rewrite, "force": True}]
    return mm.load_spec({"version": 1, "name": "t", "rules": rules, "calibration": {"order": order, **calibration}, **(more or {})})


def compiled(graph: Graph, wanted: mm.Spec, batches: Any) -> Compilation:
    return compile_graph(graph, wanted, METHODS, "t", calibration=batches)


def rows_of(done: Compilation) -> dict[str, SiteRow]:
    return {row.path: row for row in done.report.sites if row.status == "rewritten"}


def outputs(graph: Graph, names: set[str], batch: Any) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    values = {value for node in graph.nodes for value in node.outputs if value.name in names}
    with torch.no_grad():
        evaluate(graph, batch, {value: lambda tensor, name=value.name: seen.__setitem__(name, tensor.double()) for value in values})
    return seen


def held_out_errors(done: Compilation, batches: Any) -> dict[str, float]:
    """By path: how far the outputs of each matmul are from those of the source on every fifth batch, its bias left out."""
    places = {site.path: [one for one in site.applications] for site in find_sites(done.source)}
    names = {one.output.name for ones in places.values() for one in ones}
    wrong, size = dict.fromkeys(places, 0.0), dict.fromkeys(places, 0.0)
    for batch in batches[4::5]:
        before, after = outputs(done.source, names, batch), outputs(done.graph, names, batch)
        for path, ones in places.items():
            for one in ones:
                bias = 0.0 if one.bias is None else one.bias.load().detach().double()  # type: ignore[attr-defined]
                wrong[path] += float((after[one.output.name] - before[one.output.name]).square().sum())
                size[path] += float((before[one.output.name] - bias).square().sum())
    return {path: (wrong[path] / size[path]) ** 0.5 for path in places}


# the target


def pair(seed: int, rows: int, n: int = 8, change: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Rows x of the original and y of the rewritten model."""
    g = np.random.default_rng(seed)
    x = g.standard_normal((rows, n)) * np.geomspace(1, 0.1, n)
    return x, x @ (np.eye(n) + change * np.random.default_rng(0).standard_normal((n, n))) + change * g.standard_normal((rows, n))


def moments(x: np.ndarray, y: np.ndarray) -> CrossMoments:
    return CrossMoments(*(torch.from_numpy(a.T @ b) for a, b in ((x, x), (x, y), (y, y))), len(x))


def by_rows(w: np.ndarray, x: np.ndarray, y: np.ndarray, strength: float) -> np.ndarray:
    """T of min |x W^T - y T^T|^2 + d |T - W|^2 as one least squares problem over rows, d = strength * mean square of a feature of y."""
    if strength == float("inf"):
        return w
    root = np.sqrt(strength * np.square(y).sum() / y.shape[1])
    left, right = np.vstack([y, root * np.eye(y.shape[1])]), np.vstack([x @ w.T, root * w.T])
    return np.linalg.lstsq(left, right, rcond=None)[0].T


@pytest.mark.parametrize("rows", [6, 12, 40, 4000])
def test_the_target_is_that_of_least_squares_over_rows(rows: int) -> None:
    """The strength too: the strongest that keeps `KEPT` of the best gain on the rows held out."""
    w = np.random.default_rng(7).standard_normal((5, 8))
    (x, y), (a, b) = pair(1, rows), pair(2, 200)
    found = target(torch.from_numpy(w), Directions.of(moments(x, y), moments(a, b)))
    errors = {strength: np.square(a @ w.T - b @ by_rows(w, x, y, strength).T).sum() for strength in STRENGTHS}
    plain = errors[float("inf")]
    enough = plain - KEPT * (plain - min(errors.values()))
    assert found.strength == max(strength for strength, error in errors.items() if error <= enough * (1 + 1e-12))
    # strengths above 1e-8: normal equations lose half of the digits of float64
    np.testing.assert_allclose(found.weight.numpy(), by_rows(w, x, y, found.strength), atol=1e-7)


def test_many_rows_make_a_better_target_than_the_weight_and_few_rows_no_worse() -> None:
    w = np.random.default_rng(7).standard_normal((5, 8))

    def error(matrix: Any, change: float) -> float:
        a, b = pair(3, 5000, change=change)
        return float(np.square(a @ w.T - b @ np.asarray(matrix).T).sum())

    many = target(torch.from_numpy(w), Directions.of(moments(*pair(1, 4000)), moments(*pair(2, 1000))))
    assert error(many.weight, 0.3) < 0.7 * error(w, 0.3)
    (x, y), held = pair(4, 6, change=0.05), pair(5, 200, change=0.05)
    few = target(torch.from_numpy(w), Directions.of(moments(x, y), moments(*held)))
    free = error(by_rows(w, x, y, 0.0), 0.05)
    assert error(few.weight, 0.05) <= error(w, 0.05) < free, "the free fit to six rows is worse than none"


def test_the_error_is_that_of_the_rows_and_without_a_change_in_front_the_target_is_the_weight() -> None:
    w, v = (np.random.default_rng(seed).standard_normal((5, 8)) for seed in (1, 2))
    x, y = pair(1, 30)
    wanted = np.linalg.norm(x @ w.T - y @ v.T) / np.linalg.norm(x @ w.T)
    assert moments(x, y).relative_error(torch.from_numpy(w), torch.from_numpy(v)) == pytest.approx(wanted, rel=1e-10)
    same = target(torch.from_numpy(w), Directions.of(moments(x, x), moments(x, x)))
    np.testing.assert_allclose(same.weight.numpy(), w, atol=1e-12)


def test_an_input_that_is_always_zero_keeps_the_weight() -> None:
    zero = np.zeros((9, 8))
    w = torch.ones(5, 8, dtype=torch.float64)
    assert torch.equal(target(w, Directions.of(moments(zero, zero), moments(zero, zero))).weight, w)


# stages


@pytest.mark.parametrize("method", REWRITES)
def test_reported_errors_are_those_of_the_outputs_behind_what_was_rewritten(method: str) -> None:
    """Every method by one change of what it is given: the errors add up over the model, and sequential order makes the last one smaller."""
    graph, batches = graph_of(NET), data()
    done = compiled(graph, spec(REWRITES[method]), batches)
    wanted, rows = held_out_errors(done, batches), rows_of(done)
    assert set(rows) == {"q", "k", "o", "up", "down"}
    for path, row in rows.items():
        assert row.output_error == pytest.approx(wanted[path], rel=1e-4), path  # float32 sums of products and codes
        assert (
            (row.sample.fitted, row.sample.judged) == (8 * 24, 2 * 24)
            if method not in ("tt", "nearest") or path not in "qk"
            else row.sample
        )
    assert any("target: least squares" in note for note in rows["down"].notes)
    assert not any("target" in note for note in rows["q"].notes), "nothing was rewritten in front of it"
    assert any(note.startswith("calibrated in sequence") for note in done.report.notes)
    parallel = held_out_errors(compiled(graph, spec(REWRITES[method], "parallel"), batches), batches)
    assert wanted["down"] < parallel["down"]


def test_what_reads_one_value_is_a_step_and_the_first_step_is_as_in_parallel() -> None:
    graph, batches = graph_of(NET), data()
    steps: list[tuple[str, int, int | None]] = []
    done = compile_graph(graph, spec(LOW), METHODS, "t", calibration=batches, progress=lambda *step: steps.append(step))
    assert [step for step in steps if step[0] == "rewriting"] == [("rewriting", k, 4) for k in (1, 2, 3, 4)]  # q and k; o; up; down
    plain = compiled(graph, spec(LOW, "parallel"), batches)
    for path in ("q.low_rank.down", "k.low_rank.up"):
        one, other = (next(const.load() for const in each.graph.state if const.path == path) for each in (done, plain))
        assert torch.equal(one, other)
    assert rows_of(done)["q"].bound is not None
    assert rows_of(done)["o"].bound is None, "one for the target says nothing of the weight"


def test_a_weight_with_two_applications_is_measured_over_both() -> None:
    graph, batches = graph_of(TWICE), data()
    done = compiled(graph, spec(LOW), batches)
    # q reads x and, behind itself, what it is multiplied into: at its step that is still dense, so errors are those of one step only
    wanted, rows = held_out_errors(done, batches), rows_of(done)
    assert rows["down"].output_error == pytest.approx(wanted["down"], rel=1e-4)  # float32 sums
    assert rows["q"].sample is not None
    assert rows["q"].sample.fitted == 2 * 8 * 24


@pytest.mark.parametrize("batches", [1, 3])
def test_few_batches_hold_out_samples(batches: int) -> None:
    done = compiled(graph_of(NET), spec(LOW), data(batches, 20))
    row = rows_of(done)["down"]
    assert row.sample is not None
    assert (row.sample.fitted, row.sample.judged) == (batches * 16, batches * 4)
    assert row.output_error is not None


def test_what_is_rolled_back_is_dense_for_what_comes_behind_it() -> None:
    graph, batches = graph_of(NET), data()
    free = {path: row.output_error or 0.0 for path, row in rows_of(compiled(graph, spec(LOW), batches)).items()}
    limit = {"tolerance": {"output_error": max(free["q"], free["k"]) - 1e-3, "on_exceed": "roll_back"}}
    done = compiled(graph, spec(LOW, more=limit), batches)
    wanted, rows = held_out_errors(done, batches), rows_of(done)
    assert 0 < len(rows) < 5
    for path, row in rows.items():
        assert row.output_error == pytest.approx(wanted[path], rel=1e-4, abs=1e-6)  # float32 sums
    assert any("rolled back" in note for note in done.report.notes)


@pytest.mark.parametrize("unit", ["heads", "head_dims"])
def test_pruned_blocks_go_on_as_narrow_as_they_are(unit: str) -> None:
    """Behind a pruned attention the second stream must be that of the narrower graph, queries and keys too: errors of what is rewritten
    behind it are those of its outputs."""
    _, _, graph = traced("llama")
    g = torch.Generator().manual_seed(2)
    first = next(iter(zoo_batches("llama")))
    batches = [{**first, "input_ids": torch.randint(0, 60, first["input_ids"].shape, generator=g)} for _ in range(5)]
    prune = {"name": "prune", "match": {"block": "attention"}, "rewrite": {"transact": {"width": "50%", "unit": unit, "multiple_of": 2}}}
    factors = {"name": "factors", "match": {"role": "mlp.*"}, "rewrite": {"low_rank": {"rank": 3, "whiten": True}}}
    wanted = mm.load_spec({"version": 1, "name": "t", "rules": [prune, factors], "calibration": {"order": "sequential"}})
    done = compiled(graph, wanted, batches)
    rows = rows_of(done)
    deepest = max((path for path, row in rows.items() if row.role == "mlp.down"), key=lambda path: rows[path].layer or 0)
    pruned = max((path for path, row in rows.items() if row.role == "attention.o"), key=lambda path: rows[path].layer or 0)
    assert rows[deepest].layer == rows[pruned].layer == 1
    assert all(any("target" in note for note in rows[path].notes) for path in (deepest, pruned))
    last = {deepest: next(site for site in find_sites(graph) if site.path == deepest).applications[0].output.name}
    inputs = bound_batch(graph, batches[4], 4)
    before, after = (outputs(each, {last[deepest]}, inputs)[last[deepest]] for each in (done.source, done.graph))
    shown = first["attention_mask"].bool()
    wrong, size = (float(tokens[shown].square().sum()) for tokens in (before - after, before))
    assert rows[deepest].output_error == pytest.approx((wrong / size) ** 0.5, rel=1e-6)  # float64


def test_a_table_that_is_also_the_head_keeps_its_weight() -> None:
    text = """graph device=cpu
range b 1..
input %i: int64[b] "i"
parameter %t: float32[24, 16] "t.weight"
parameter %f: float32[16, 16] "f.weight"
%1: float32[b, 16] = aten.embedding.default(%t, %i)
%2: float32[b, 16] = aten.linear.default(%1, %f)
%3: float32[b, 24] = aten.linear.default(%2, %t)
output %3 "y"
"""
    g = torch.Generator().manual_seed(0)
    batches = [(torch.randint(0, 24, (30,), generator=g),) for _ in range(6)]
    done = compiled(graph_of(text), spec(REWRITES["nearest"]), batches)
    rows = rows_of(done)
    assert set(rows) == {"t", "f"}
    assert not any("target" in note for note in rows["t"].notes)
    wanted = held_out_errors(done, batches)
    assert rows["f"].output_error == pytest.approx(wanted["f"], rel=1e-4), "behind the look-ups in codes"  # float32 sums


def test_budgets_decide_before_on_parallel_statistics() -> None:
    auto = {"low_rank": {"rank": "auto", "whiten": True}}
    budget = {"budget": {"parameters": "60%", "of": "matched"}}
    graph, batches = graph_of(NET), data()
    found = {order: rows_of(compiled(graph, spec(auto, order, more=budget), batches)) for order in ("parallel", "sequential")}
    assert {path: row.rank for path, row in found["parallel"].items()} == {path: row.rank for path, row in found["sequential"].items()}
    assert any("target" in note for note in found["sequential"]["down"].notes)


def test_token_weights_reach_fits_in_sequence() -> None:
    graph, batches = graph_of(NET), data()
    for (x,) in batches:
        x[0] *= 100
    done = compiled(graph, spec(LOW, token_weights="norm"), batches)
    plain = compiled(graph, spec(LOW), batches)
    assert any(
        re.match(r"massive activations dominate the second moments of \d of 5 matmuls: at \w+ 10 of 240 rows", note)
        for note in plain.report.notes
    )
    assert "massive activations: 10 of 240 rows" in " ".join(rows_of(plain)["q"].notes)
    one, other = (next(const.load() for const in each.graph.state if const.path == "q.low_rank.down") for each in (done, plain))
    assert not torch.allclose(one, other, rtol=0.1)


# bad input


def test_sequential_without_data_is_refused() -> None:
    with pytest.raises(SpecError, match=r"calibration\.order: sequential needs calibration data and none was given"):
        compiled(graph_of(NET), spec({"low_rank": {"rank": 4, "whiten": False}}), None)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            {"order": "sequental"},
            'calibration.order: expected one of parallel, sequential, got the text "sequental"; did you mean sequential?',
        ),
        ({"token_weights": "norms"}, 'calibration.token_weights: expected one of none, norm, got the text "norms"; did you mean norm?'),
    ],
)
def test_unknown_words(setting: dict[str, str], message: str) -> None:
    rules = [{"match": {"op": "matmul"}, "rewrite": "keep"}]
    with pytest.raises(SpecError) as caught:
        mm.load_spec({"version": 1, "name": "t", "rules": rules, "calibration": setting})
    assert message in str(caught.value)


def test_a_plan_needs_no_data() -> None:
    assert plan_graph(graph_of(NET), spec(LOW), METHODS, "t").is_plan
