"""The passes in order: plan against compile, stages, calibration data in every form, tolerances, and the totals of the report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from exporting import Mlp, answers, difference, mlp_graph, randn, seeded

from matmorph.errors import CheckError, InputError, RewriteError, SpecError
from matmorph.ir.core import Graph
from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.to_torch import to_torch
from matmorph.ir.tracing.trace import trace
from matmorph.passes.methods import method_table
from matmorph.passes.pipeline import Compilation, compile_graph, inspect_graph, plan_graph
from matmorph.report.model import Report, SiteRow
from matmorph.specs.load import load_spec

METHODS = {name: method() for name, method in method_table().items()}
X = randn(3, 5, 8)
ERRORS = {"weight_error": None, "output_error": None, "bound": None, "spectrum": None, "notes": (), "parts": ()}
"""What a plan cannot know."""


@pytest.fixture(scope="module")
def graph() -> Graph:
    """fc1 [16, 8] and fc2 [4, 16], 128 and 64 parameters."""
    return mlp_graph()


def rule(name: str, match: Any, rank: Any = None, whiten: bool = False, **more: Any) -> dict[str, Any]:
    """`rank` None = keep."""
    return {"name": name, "match": match, "rewrite": "keep" if rank is None else {"low_rank": {"rank": rank, "whiten": whiten}}, **more}


def spec(*rules: dict[str, Any], **top: Any) -> Any:
    return load_spec({"version": 1, "name": "t", "rules": list(rules), **top}, method_table())


def stages(*stages: tuple[dict[str, Any], ...], **top: Any) -> Any:
    listed = [{"name": f"stage {number}", "rules": list(rules)} for number, rules in enumerate(stages)]
    return load_spec({"version": 1, "name": "t", "stages": listed, **top}, method_table())


def compiled(graph: Graph, loaded: Any, **options: Any) -> Compilation:
    return compile_graph(graph, loaded, METHODS, "Mlp", **options)


def planned(graph: Graph, loaded: Any) -> Report:
    return plan_graph(graph, loaded, METHODS, "Mlp")


def row(report: Report, path: str) -> SiteRow:
    return next(row for row in report.sites if row.path == path)


ALL = {"op": "matmul"}


# ---- rows and totals


def test_inspect_lists_sites_as_they_are(graph: Graph) -> None:
    report = inspect_graph(graph, "Mlp")
    assert [(found.path, found.status, found.shape, found.parameters, found.bytes, found.macs) for found in report.sites] == [
        ("fc1", "unclaimed", (16, 8), (128, 128), (512, 512), (128, 128)),
        ("fc2", "unclaimed", (4, 16), (64, 64), (256, 256), (64, 64)),
    ]
    assert report.is_plan
    assert report.totals.parameters == (220, 220), "128 + 16 + 64, and 12 that forward does not read"
    assert report.totals.bytes == (848, 848), "what is read, the buffer of 4 included, in four bytes each"
    assert report.totals.macs == (192, 192)


@pytest.mark.parametrize("rank", [3, {"ratio": 0.7}, {"ratio": 0.7, "multiple_of": 2}])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_plan_is_the_report_without_errors(graph: Graph, rank: Any, precision: str) -> None:
    loaded = spec(rule("r", ALL, rank), export={"precision": precision})
    plan, report = planned(graph, loaded), compiled(graph, loaded).report
    assert [replace(found, **ERRORS) for found in report.sites] == [replace(found, **ERRORS) for found in plan.sites]
    assert all(found.weight_error is None and found.output_error is None for found in plan.sites)
    assert report.totals == plan.totals
    assert plan.is_plan
    assert not report.is_plan


@pytest.mark.parametrize("rank", [{"energy": 0.9}, {"error": 0.3}])
def test_a_plan_says_where_the_data_decides(graph: Graph, rank: Any) -> None:
    loaded = spec(rule("r", ALL, rank, force=True))
    plan, report = planned(graph, loaded), compiled(graph, loaded).report
    for found in plan.sites:
        done = row(report, found.path)
        assert found.rank_at_most
        assert not done.rank_at_most
        assert (done.rank or 0) <= (found.rank or 0) == min(found.shape)
        assert done.parameters[1] <= found.parameters[1]
        assert done.trainable <= found.trainable
        assert done.requested_rank == found.requested_rank == " ".join(str(part) for part in next(iter(rank.items())))


def test_every_field_of_a_rewritten_row(graph: Graph) -> None:
    found = row(compiled(graph, spec(rule("r", {"path": "fc1"}, 3)), calibration=[{"x": X}]).report, "fc1")
    w = seeded(Mlp).fc1.weight.detach().double()
    s = torch.linalg.svdvals(w)
    tail = float(s[3:].norm() / s.norm())
    assert found.role == "mlp.fc1"
    assert (found.form, found.shape, found.applications, found.layer) == ("linear", (16, 8), 1, None)
    assert (found.rule, found.method, found.status, found.reason) == ("r", "low_rank", "rewritten", None)
    assert (found.rank, found.requested_rank, found.rank_at_most) == (3, "3", False)
    assert (found.parameters, found.bytes, found.macs) == ((128, 72), (512, 288), (128, 72))
    assert found.trainable == 72
    assert found.weight_error == pytest.approx(tail, rel=1e-5), "the factors are stored in float32 (6e-8), and the tail is 0.5 or so"
    assert found.bound is not None
    assert (found.bound.name, found.bound.on) == ("eckart_young", "weight_error")
    assert found.bound.value == pytest.approx(tail, rel=1e-5)
    assert [part.method for part in found.parts] == ["low_rank"]


def test_output_errors_are_measured_where_there_is_data(graph: Graph) -> None:
    """|(W - W') L| / |W L| with L L^T = X^T X is the error of the outputs themselves, without the bias."""
    done = compiled(graph, spec(rule("r", {"path": "fc1"}, 3)), calibration=[{"x": X}, {"x": 2 * X}])
    factors = {const.path: const.load().double() for const in done.graph.state}
    w = seeded(Mlp).fc1.weight.detach().double()
    w_low = (factors["fc1.low_rank.down"] @ factors["fc1.low_rank.up"]).T
    rows = X.reshape(-1, 8).double()
    expected = float((rows @ (w - w_low).T).norm() / (rows @ w.T).norm())
    assert row(done.report, "fc1").output_error == pytest.approx(expected, rel=1e-4), "the moment is summed from float32 products"
    assert row(compiled(graph, spec(rule("r", {"path": "fc1"}, 3))).report, "fc1").output_error is None


def test_unclaimed_kept_and_rejected_rows(graph: Graph) -> None:
    loaded = spec(rule("r", {"path": "fc2"}, 4), rule("k", {"path": "fc1"}))
    for report in (planned(graph, loaded), compiled(graph, loaded).report):
        assert (row(report, "fc2").status, row(report, "fc2").rule, row(report, "fc2").method) == ("rejected", "r", "low_rank")
        assert row(report, "fc2").reason == "does not pay: 320 bytes, the dense weight has 256 (force: true rewrites it all the same)"
        assert (row(report, "fc1").status, row(report, "fc1").rule) == ("unclaimed", "k")
        assert row(report, "fc1").reason == "kept dense by rule k"
        assert report.totals.parameters[0] == report.totals.parameters[1]
    alone = compiled(graph, spec(rule("r", {"path": "fc2"}, 2))).report
    assert row(alone, "fc1").reason == "no rule matches"


def test_force_rewrites_all_the_same(graph: Graph) -> None:
    report = compiled(graph, spec(rule("r", {"path": "fc2"}, 4, force=True))).report
    assert row(report, "fc2").parameters == (64, 80)
    assert row(report, "fc2").weight_error == pytest.approx(0, abs=1e-6), "all of the rank, in float32"


def test_strict_makes_a_reject_an_error(graph: Graph) -> None:
    loaded = spec(rule("r", ALL, 4), strict=True)
    for act in (planned, compiled):
        with pytest.raises(SpecError, match=r"strict: rule r cannot rewrite fc2: does not pay: 320 bytes"):
            act(graph, loaded)


def test_a_rank_above_some_sites_is_their_reject_above_all_an_error(graph: Graph) -> None:
    for act in (lambda *given: planned(*given), lambda *given: compiled(*given).report):
        report = act(graph, spec(rule("r", ALL, 5)))
        assert row(report, "fc2").reason == "rank 5 is above min(in, out) = 4"
        assert row(report, "fc1").status == "rewritten"
        with pytest.raises(SpecError, match="rule r: rank 9 is above min"):
            act(graph, spec(rule("r", ALL, 9)))


def test_an_optional_rule_may_match_nothing(graph: Graph) -> None:
    loaded = spec(rule("none", {"role": "attention.q"}, 2, optional=True), rule("r", ALL, 2))
    assert [found.rule for found in compiled(graph, loaded).report.sites] == ["r", "r"]
    with pytest.raises(SpecError, match="rule none matches no matmul"):
        compiled(graph, spec(rule("none", {"role": "attention.q"}, 2)))


# ---- stages


def test_a_later_stage_may_take_what_an_earlier_one_left(graph: Graph) -> None:
    """Left means: unclaimed, kept or rejected. Plan and compile agree."""
    for first in (
        (rule("a", {"path": "fc1"}, 3),),
        (rule("k", {"path": "fc2"}), rule("a", ALL, 3)),
        (rule("a", ALL, {"ratio": 1.0, "min": 4}),),
    ):
        loaded = stages(first, (rule("b", {"path": "fc2"}, 2),))
        plan, report = planned(graph, loaded), compiled(graph, loaded).report
        assert [(found.path, found.rule) for found in report.sites] == [("fc1", "a"), ("fc2", "b")]
        assert [found.status for found in report.sites] == ["rewritten", "rewritten"]
        assert [replace(found, **ERRORS) for found in report.sites] == [replace(found, **ERRORS) for found in plan.sites]
        assert report.totals == plan.totals


def test_what_a_later_stage_keeps_is_said(graph: Graph) -> None:
    loaded = stages((rule("a", {"path": "fc1"}, 3),), (rule("k", {"path": "fc2"}),))
    for report in (planned(graph, loaded), compiled(graph, loaded).report):
        assert row(report, "fc2").reason == "kept dense by rule k"


def test_inserted_matmuls_are_sites_for_inserted_by_alone(graph: Graph) -> None:
    with pytest.raises(SpecError, match="rule b matches no matmul"):
        compiled(graph, stages((rule("a", ALL, 3),), (rule("b", {"path": "fc1.**"}, 2),)))
    loaded = stages((rule("a", {"path": "fc1"}, 4),), (rule("b", {"inserted_by": "a"}, 2, force=True),))
    done = compiled(graph, loaded)
    assert [found.path for found in done.report.sites] == ["fc1", "fc2", "fc1.low_rank.down", "fc1.low_rank.up"]
    # Before refers to the source: 8 * 16 and 16 * 4. After: 8x4 became 24, 4x16 became 40, and fc2 stays.
    assert done.report.totals.macs == (192, 24 + 40 + 64)
    assert done.report.totals.parameters == (220, 220 - 128 + 64)
    assert done.report.totals.trainable == 64
    assert done.report.totals.parameters[1] == sum(parameter.numel() for parameter in to_torch(done.graph).parameters())
    assert row(done.report, "fc1.low_rank.up").notes[-1].startswith("a matmul that an earlier stage inserted")
    assert planned(graph, loaded).notes == ("rule b works on what an earlier stage inserts: planned only by compiling",)
    assert len(find_sites(done.source)) == 2, "the source is as it was"


def test_each_stage_has_its_own_tolerance(graph: Graph) -> None:
    loaded = load_spec(
        {
            "version": 1,
            "name": "t",
            "stages": [
                {"name": "one", "rules": [rule("a", {"path": "fc1"}, 2)]},
                {"name": "two", "rules": [rule("b", {"path": "fc2"}, 1)], "tolerance": {"weight_error": 0.01}},
            ],
        },
        method_table(),
    )
    with pytest.raises(CheckError, match=r"^fc2: weight_error 0\.\d+ exceeds 0.01"):
        compiled(graph, loaded)


def test_a_later_stage_is_calibrated_on_what_the_earlier_one_made(graph: Graph) -> None:
    """fc2 reads other activations once fc1 is rewritten, so its output error is another one."""
    alone = compiled(graph, spec(rule("b", {"path": "fc2"}, 2)), calibration=[{"x": X}])
    second = compiled(graph, stages((rule("a", {"path": "fc1"}, 1),), (rule("b", {"path": "fc2"}, 2),)), calibration=[{"x": X}])
    first, later = (row(done.report, "fc2") for done in (alone, second))
    assert first.weight_error == later.weight_error
    assert first.output_error != pytest.approx(later.output_error, rel=1e-3)


# ---- calibration data


def test_batches_in_every_form_make_the_same_factors(graph: Graph) -> None:
    loaded = stages((rule("a", {"path": "fc1"}, 3, whiten=True),), (rule("b", {"path": "fc2"}, 2, whiten=True),))
    batches = [{"x": X}, {"x": X[:1] * 2}]
    forms: list[Any] = [
        batches,
        tuple(batches),
        iter(batches),
        (batch for batch in batches),
        [{"x": batch["x"].numpy()} for batch in batches],
    ]
    results = [compiled(graph, loaded, calibration=form) for form in forms]
    first = {const.path: const.load() for const in results[0].graph.state}
    for result in results[1:]:
        assert all(torch.equal(const.load(), first[const.path]) for const in result.graph.state)


def test_tuple_batches_mirror_positional_inputs() -> None:
    positional = trace(seeded(Mlp), (X,), ({0: "batch", 1: "seq"},))
    loaded = spec(rule("a", {"path": "fc1"}, 3, whiten=True))
    one, two = (compiled(positional, loaded, calibration=form) for form in ([(X,)], [X]))
    assert all(torch.equal(a.load(), b.load()) for a, b in zip(one.graph.state, two.graph.state, strict=True))


def test_no_more_is_read_than_asked_for(graph: Graph) -> None:
    read = 0

    def endless() -> Iterator[Any]:
        nonlocal read
        while True:
            read += 1
            yield {"x": X}

    loaded = stages(
        (rule("a", {"path": "fc1"}, 3, whiten=True),), (rule("b", {"path": "fc2"}, 2, whiten=True),), calibration={"samples": 7}
    )
    compiled(graph, loaded, calibration=endless())
    assert read == 3, "batches of 3 samples each, and the second stage reads the same again"


def test_nothing_is_read_where_nothing_is_rewritten(graph: Graph) -> None:
    def never() -> Iterator[Any]:
        pytest.fail("a batch was read")
        yield

    compiled(graph, spec(rule("k", ALL)), calibration=never())


@pytest.mark.parametrize("odd", [5, {"x": X}, X, "x.npz"])
def test_what_is_no_series_of_batches(graph: Graph, odd: Any) -> None:
    with pytest.raises(InputError, match=r"calibration must be an iterable of batches, each like the example inputs; got "):
        compiled(graph, spec(rule("r", ALL, 2)), calibration=odd)


def test_needs_are_said_before_the_work(graph: Graph) -> None:
    with pytest.raises(SpecError, match=r"rule r: low_rank needs calibration data \(input_second_moment\) and none was given"):
        compiled(graph, spec(rule("r", ALL, 2, whiten=True)))
    with pytest.raises(SpecError, match=r"tolerance.output_error: a limit on output errors needs calibration data"):
        compiled(graph, spec(rule("r", ALL, 2), tolerance={"output_error": 0.1}))
    assert planned(graph, spec(rule("r", ALL, 2, whiten=True), tolerance={"output_error": 0.1})).sites[0].status == "rewritten"


# ---- checks


def test_tolerance_fails_with_the_worst_site(graph: Graph) -> None:
    with pytest.raises(CheckError) as caught:
        compiled(graph, spec(rule("r", ALL, 2), tolerance={"weight_error": 0.01}))
    assert caught.value.exit_code == 1
    errors = {found.path: found.weight_error or 0 for found in compiled(graph, spec(rule("r", ALL, 2))).report.sites}
    worst = max(errors, key=errors.__getitem__)
    assert caught.value.message.startswith(f"{worst}: weight_error {errors[worst]:.3g} exceeds 0.01")


def test_roll_back_leaves_the_worst_dense(graph: Graph) -> None:
    errors = {found.path: found.weight_error or 0 for found in compiled(graph, spec(rule("r", ALL, 2))).report.sites}
    limit = sum(errors.values()) / 2
    worst, other = sorted(errors, key=errors.__getitem__, reverse=True)
    done = compiled(graph, spec(rule("r", ALL, 2), tolerance={"weight_error": limit, "on_exceed": "roll_back"}))
    assert row(done.report, worst).status == "rejected"
    assert (row(done.report, worst).reason or "").startswith("rolled back: weight_error")
    assert row(done.report, other).status == "rewritten"
    assert done.report.notes == (f"{worst} {row(done.report, worst).reason}",)
    paths = {const.path for const in done.graph.state}
    assert f"{worst}.weight" in paths
    assert f"{worst}.low_rank.down" not in paths
    assert f"{other}.weight" not in paths


def test_rolled_back_as_a_whole_the_model_is_the_source(graph: Graph) -> None:
    done = compiled(graph, spec(rule("r", ALL, 2), tolerance={"weight_error": 1e-6, "on_exceed": "roll_back"}))
    assert done.graph.nodes == graph.nodes
    assert done.report.totals.parameters == (220, 220)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("path", ["fc1.weight", "fc1.bias", "fc2.weight"])
def test_every_weight_is_looked_at(path: str, bad: float) -> None:
    module = seeded(Mlp)
    with torch.no_grad():
        module.get_parameter(path).view(-1)[1] = bad
    graph = trace(module, {"x": X})
    with pytest.raises(RewriteError, match=rf"^{path}: 1 of \d+ entries are NaN or infinite$"):
        compiled(graph, spec(rule("r", {"path": "fc2"}, 2)))


def test_weights_whose_sum_overflows_are_finite() -> None:
    module = seeded(Mlp)
    with torch.no_grad():
        module.fc1.bias.fill_(3e38)
    assert compiled(trace(module, {"x": X}), spec(rule("r", {"path": "fc2"}, 2))).report.sites


def test_the_rewritten_graph_answers_like_the_rewritten_matrices(graph: Graph) -> None:
    done = compiled(graph, spec(rule("r", ALL, 2)))
    held = {const.path: const.load() for const in done.graph.state}
    module = seeded(Mlp)
    with torch.no_grad():
        module.fc1.weight.copy_((held["fc1.low_rank.down"] @ held["fc1.low_rank.up"]).T)
        module.fc2.weight.copy_((held["fc2.low_rank.down"] @ held["fc2.low_rank.up"]).T)
    # Two matmuls against their product: some tens of roundings at 6e-8.
    assert difference(answers(to_torch(done.graph), {"x": X}), answers(module, {"x": X})) < 2e-6


def test_progress_tells_of_every_pass(graph: Graph) -> None:
    told: list[tuple[str, int, int | None]] = []
    compiled(graph, spec(rule("r", ALL, 2)), calibration=[{"x": X}], progress=lambda *step: told.append(step))
    assert told == [("calibrating", 1, 3), ("calibrating", 3, 3), ("rewriting", 1, 2), ("rewriting", 2, 2)]


def test_seed_decides_the_randomised_solver() -> None:
    module = torch.nn.Linear(64, 48)
    graph = trace(module.eval(), (randn(4, 64),))
    loaded = load_spec(
        {"version": 1, "name": "t", "rules": [{"match": ALL, "rewrite": {"low_rank": {"rank": 2, "solver": "randomized"}}}]}, method_table()
    )
    runs = [compile_graph(graph, loaded, METHODS, "Linear", seed=seed).graph.state[0].load().numpy() for seed in (3, 3, 4)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])
