"""low_rank as a method: ranks, costs, checks, errors, bounds, factors. Oracle: numpy's SVD in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from handmade import gather
from hypothesis import given
from hypothesis import strategies as st
from rewriting import LINEAR, METHODS, graph_of, low_rank, moment, only_site, rewritten, rule_of, run, weights_of

from matmorph.errors import RewriteError, SpecError
from matmorph.ir.site import Choice, Reject, Site, Statistic
from matmorph.ir.sites.matmuls import find_sites
from matmorph.passes.methods.low_rank.method import LowRank
from matmorph.passes.methods.protocol import dense_cost, refuse_larger

METHOD = LowRank()
SITE = only_site(graph_of(LINEAR))  # [10, 12]
SPECTRUM = np.linalg.svd(SITE.weight().double().numpy(), compute_uv=False)


def choice(rank: int | dict, site: Site = SITE) -> Choice:
    (found,) = METHOD.choices(site, low_rank(rank).spec)
    return found


def taken(rank: int | dict, text: str = LINEAR, **more) -> int | None:
    """The rank of the only site after a rewrite."""
    _, (outcome,) = rewritten(graph_of(text), rule_of(low_rank(rank, **more), force=True))
    return outcome.parts[0].choice.rank


# ranks


@given(ratio=st.floats(0.01, 1.0), n_in=st.integers(1, 500), n_out=st.integers(1, 500))
def test_ratio_is_the_share_of_parameters_that_the_factors_may_take(ratio: float, n_in: int, n_out: int) -> None:
    site = replace(SITE, in_features=n_in, out_features=n_out)
    found = choice({"ratio": ratio}, site)
    assert not found.at_most
    assert found.rank == max(1, int(np.floor(ratio * n_in * n_out / (n_in + n_out))))
    if found.rank > 1:
        assert METHOD.cost(site, low_rank().spec, found).parameters <= ratio * n_in * n_out


def test_rank_forms_and_their_limits() -> None:
    assert choice(7) == Choice(7)
    assert choice({"ratio": 0.8}) == Choice(4)  # floor(0.8 * 120 / 22) = floor(4.36)
    assert choice({"ratio": 0.8, "multiple_of": 3}) == Choice(3)  # a promise of size rounds down
    assert choice({"ratio": 0.1, "multiple_of": 4}) == Choice(4)  # but not to 0
    assert choice({"ratio": 0.1, "min": 3}) == Choice(3)
    assert choice({"ratio": 1.0, "max": 2}) == Choice(2)
    assert choice({"ratio": 0.1, "min": 64}) == Choice(10)  # min(in, out)
    assert choice({"energy": 0.9}) == Choice(10, at_most=True)
    assert choice({"error": 0.2, "max": 6}) == Choice(6, at_most=True)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.99, 1.0])
def test_energy_and_error_take_the_smallest_rank_that_keeps_the_promise(share: float) -> None:
    kept = np.concatenate([[0], (SPECTRUM**2).cumsum()]) / (SPECTRUM**2).sum()
    assert taken({"energy": share}) == next(r for r in range(1, 11) if kept[r] >= share - 1e-12)  # float64 sums
    assert taken({"error": share}) == next(r for r in range(1, 11) if 1 - kept[r] <= share**2 + 1e-12)


def test_energy_and_error_round_up_to_their_multiple() -> None:
    exact = taken({"energy": 0.8})
    assert taken({"energy": 0.8, "multiple_of": 4}) == min(-(-exact // 4) * 4, 10)
    assert taken({"energy": 0.8, "max": 2}) == 2
    assert taken({"error": 0.99, "min": 5}) == 5


# checks and costs


@pytest.mark.parametrize(
    ("site", "reason"),
    [
        (replace(SITE, blocked="its rows overlap"), "its rows overlap"),
        (replace(SITE, form="embedding", applications=()), "this is an embedding table"),
        (replace(SITE, gathers=(gather(),)), "use untie: true"),
        (replace(SITE, in_features=3), "rank 4 is above min(in, out) = 3"),
    ],
)
def test_rejects(site: Site, reason: str) -> None:
    found = METHOD.check(site, low_rank(4).spec)
    assert found is not None
    assert reason in found.reason


def test_a_good_site_passes_and_needs_follow_whiten() -> None:
    assert METHOD.check(SITE, low_rank(10).spec) is None
    assert METHOD.needs(low_rank().spec) == frozenset()
    assert METHOD.needs(low_rank(whiten=True).spec) == {Statistic.INPUT_SECOND_MOMENT}


def test_break_even_is_exact() -> None:
    """[10, 12]: 120 * 4 bytes dense; rank 5 takes 5 * 22 * 4 = 440, rank 6 takes 528."""
    costs = [METHOD.cost(SITE, low_rank().spec, Choice(rank)) for rank in (5, 6)]
    assert [(cost.parameters, cost.bytes, cost.macs) for cost in costs] == [(110, 440, 110), (132, 528, 132)]
    assert dense_cost(SITE).bytes == 480
    assert refuse_larger(SITE, costs[0]) is None
    assert refuse_larger(SITE, costs[1]) == Reject(
        "does not pay: 528 bytes, the dense weight has 480 (force: true rewrites it all the same)"
    )


@pytest.mark.parametrize("rank", [6, {"energy": 1.0}, {"error": 0.0}])
def test_a_rank_that_does_not_pay_is_a_reject_unless_forced(rank) -> None:
    graph = graph_of(LINEAR)
    result, (outcome,) = rewritten(graph, rule_of(low_rank(rank)))
    assert outcome.reject is not None
    assert "480" in outcome.reject.reason
    assert result.nodes == graph.nodes
    _, (forced,) = rewritten(graph, rule_of(low_rank(rank), force=True))
    assert forced.reject is None


def test_the_rank_of_every_site_too_large_is_a_spec_error() -> None:
    with pytest.raises(SpecError, match=r"rule all: rank 11 is above min\(in, out\) of every matched site; the largest is 10 \(fc\)"):
        rewritten(graph_of(LINEAR), rule_of(low_rank(11)))


def test_whitening_without_data_is_a_spec_error_that_names_the_rule() -> None:
    with pytest.raises(SpecError, match="rule all: low_rank needs calibration data"):
        rewritten(graph_of(LINEAR), rule_of(low_rank(whiten=True)))


@pytest.mark.parametrize(("bad", "count"), [(float("nan"), 1), (float("inf"), 2)])
def test_nan_and_infinity_are_named(bad: float, count: int) -> None:
    weights = weights_of(LINEAR)
    weights["fc.weight"].flatten()[:count] = bad
    with pytest.raises(RewriteError, match=rf"fc.weight: {count} of 120 entries are NaN or infinite"):
        rewritten(graph_of(LINEAR, weights), rule_of(low_rank()))


# what comes out


def test_plain_factors_reach_the_eckart_young_error_and_say_so() -> None:
    graph = graph_of(LINEAR)
    result, (outcome,) = rewritten(graph, rule_of(low_rank(3)))
    optimum = np.sqrt((SPECTRUM[3:] ** 2).sum() / (SPECTRUM**2).sum())
    assert outcome.weight_error == pytest.approx(optimum, rel=1e-5)  # float32 factors: 10 * eps = 1e-6
    assert outcome.output_error is None
    assert outcome.bound is not None
    assert (outcome.bound.name, outcome.bound.on) == ("eckart_young", "weight_error")
    assert outcome.bound.value <= optimum
    assert outcome.bound.value == pytest.approx(optimum, rel=1e-4)  # the solver gives its rounding away
    w = SITE.weight().double().numpy()
    u, s, vh = np.linalg.svd(w)
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    expected = x.double().numpy() @ ((u[:, :3] * s[:3]) @ vh[:3]).T + weights_of(LINEAR)["fc.bias"].double().numpy()
    np.testing.assert_allclose(run(result, x)[0].numpy(), np.maximum(expected, 0), atol=1e-4)  # float32, outputs of size 10


def test_whitened_factors_have_the_smallest_output_error_and_a_bound_below_it() -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(200, 12, generator=g) @ torch.randn(12, 12, generator=g) * torch.logspace(0, -1.5, 12)
    stats = {"fc": moment(x)}
    graph = graph_of(LINEAR)
    _, (plain,) = rewritten(graph, rule_of(low_rank(3)), stats)
    _, (ours,) = rewritten(graph, rule_of(low_rank(3, whiten=True, damping=1e-6)), stats)
    outputs = np.linalg.svd((x.double() @ SITE.weight().double().T).numpy(), compute_uv=False)
    optimum = np.sqrt((outputs[3:] ** 2).sum() / (outputs**2).sum())
    assert ours.output_error == pytest.approx(optimum, rel=1e-3)  # damping 1e-6 moves it by less than that
    assert plain.output_error > ours.output_error * 1.05
    assert plain.weight_error < ours.weight_error
    assert ours.bound is not None
    assert ours.bound.on == "fitted_error"
    assert optimum * 0.95 < ours.bound.value <= optimum * (1 + 1e-9)


def test_error_is_judged_on_outputs_when_whitened() -> None:
    x = torch.randn(100, 12, generator=torch.Generator().manual_seed(2)) * torch.logspace(0, -2, 12)
    stats = {"fc": moment(x)}
    use = low_rank({"error": 0.1}, whiten=True, damping=0.0)
    _, (outcome,) = rewritten(graph_of(LINEAR), rule_of(use, force=True), stats)
    rank = outcome.parts[0].choice.rank
    assert outcome.output_error <= 0.1 * (1 + 1e-5)  # float32 factors
    one_less = low_rank(rank - 1, whiten=True, damping=0.0)
    _, (worse,) = rewritten(graph_of(LINEAR), rule_of(one_less, force=True), stats)
    assert worse.output_error > 0.1


def test_errors_of_all_choices_match_what_build_reaches() -> None:
    stats = moment(torch.randn(80, 12, generator=torch.Generator().manual_seed(5)))
    for use in (low_rank(), low_rank(whiten=True, damping=0.0)):
        choices = [Choice(rank) for rank in (1, 4, 10)]
        errors = METHOD.errors(SITE, use.spec, choices, stats)
        for option, error in zip(choices, errors, strict=True):
            rule = rule_of(low_rank(option.rank, whiten=use.spec.whiten, damping=0.0), force=True)
            _, (outcome,) = rewritten(graph_of(LINEAR), rule, {"fc": stats})
            measured = outcome.output_error if use.spec.whiten else outcome.weight_error
            promised = error.output_error if use.spec.whiten else error.weight_error
            assert measured == pytest.approx(promised, abs=2e-6)  # float32 factors


def test_zero_weight_has_no_error() -> None:
    weights = weights_of(LINEAR) | {"fc.weight": torch.zeros(10, 12)}
    _, (outcome,) = rewritten(graph_of(LINEAR, weights), rule_of(low_rank(2)), {"fc": moment(torch.ones(3, 12))})
    assert (outcome.weight_error, outcome.output_error, outcome.bound) == (0.0, 0.0, None)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("bfloat16", 1.6e-2), ("float64", 1e-13)])
def test_factors_are_stored_in_the_weights_type_and_errors_count_that(dtype: str, tolerance: float) -> None:
    """Tolerance: two roundings of half an ulp each (2^-11, 2^-8), doubled for the sum over 10 terms; float64: its eps times the size."""
    text = LINEAR.replace("float32", dtype)
    graph = graph_of(text)
    _, (outcome,) = rewritten(graph, rule_of(low_rank(10), force=True))
    assert [str(const.load().dtype) for const in outcome.consts] == [f"torch.{dtype}"] * 2
    down, up = (const.load().double() for const in outcome.consts)
    w = only_site(graph).weight().double()
    stored = float((w - (down @ up).T).norm() / w.norm())
    assert outcome.weight_error == pytest.approx(stored, rel=1e-3, abs=1e-13)  # W' in float32 (half types) or float64
    assert outcome.weight_error < tolerance


def test_merge_is_the_inverse_of_build() -> None:
    _, (outcome,) = rewritten(graph_of(LINEAR), rule_of(low_rank(10), force=True))
    w, bias = METHOD.merge({const.path.rpartition(".")[2]: const.load() for const in outcome.consts})
    assert bias is None
    torch.testing.assert_close(w, SITE.weight(), rtol=0, atol=5e-6)  # float32, full rank, entries up to 3


def test_seed_decides_and_repeats() -> None:
    text = LINEAR.replace("12]", "300]").replace("10, 300", "280, 300").replace("10]", "280]")
    graph = graph_of(text)
    site = only_site(graph)

    def factors(seed: int) -> torch.Tensor:
        from matmorph.passes.rewriting.rewrite import rewrite

        _, (outcome,) = rewrite(graph, [(site, rule_of(low_rank(8)))], METHODS, seed=seed)
        assert outcome.notes[0].startswith("randomized solver: proven within ")
        return outcome.consts[0].load()

    assert torch.equal(factors(1), factors(1))
    assert not torch.equal(factors(1), factors(2))


def test_expert_stacks_get_one_rank_for_all() -> None:
    text = """graph device=cpu
range rows 1..
input %x: float32[3, rows, 6] "x"
parameter %w: float32[3, 6, 8] "experts.w" trainable
%bmm: float32[3, rows, 8] = aten.bmm.default(%x, %w)
output %bmm "output"
"""
    weights = weights_of(text)
    weights["experts.w"][0] *= torch.tensor([1.0, 0, 0, 0, 0, 0]).unsqueeze(1)  # expert 0 has rank 1
    graph = graph_of(text, weights)
    (site,) = find_sites(graph)
    assert site.batch == 3
    _, (outcome,) = rewritten(graph, rule_of(low_rank({"energy": 0.9}), force=True))
    needed = []
    for matrix in weights["experts.w"]:
        s = np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2
        needed.append(int((s.cumsum() / s.sum() < 0.9).sum()) + 1)
    assert outcome.parts[0].choice.rank == max(needed)
    assert [tuple(const.tensor.shape) for const in outcome.consts] == [(3, 6, max(needed)), (3, max(needed), 8)]
    full, (_,) = rewritten(graph, rule_of(low_rank(6), force=True))
    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run(full, x)[0], run(graph, x)[0], rtol=0, atol=2e-5)  # float32, sums of 6 terms of size 3
