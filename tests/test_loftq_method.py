"""loftq as a method: what it keeps, its factors, whitening and alpha; mutants of the quantised methods. Oracle: numpy in float64."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from mutating import Check, Mutant, killer, mutated, unmutated
from quantizing import METHODS, dense, loftq, parts_of, put_in, qlora, quantize, relative, stands_for
from rewriting import LINEAR, graph_of, moment, only_site, rewritten, rule_of, run, weights_of

import matmorph as mm
from matmorph.errors import RewriteError, SpecError
from matmorph.ir.sites.matmuls import find_sites
from matmorph.passes.methods.protocol import SiteStats

TEXT = LINEAR.replace("12", "72").replace("10", "40")  # blocks of 16 and a short one
W = weights_of(TEXT)["fc.weight"].double().numpy()
G = torch.Generator().manual_seed(2)
X = torch.randn(400, 72, generator=G) @ torch.randn(72, 72, generator=G) * torch.logspace(0, -1.5, 72)
SETTINGS = {"quantizer": "uniform", "bits": 2, "block_size": 16}


def outcome_of(use: Any, stats: SiteStats | None = None) -> Any:
    _, (outcome,) = rewritten(graph_of(TEXT), rule_of(use, force=True), {"fc": stats} if stats else None, METHODS)
    return outcome


@pytest.mark.parametrize("settings", [SETTINGS, {"quantizer": "nf4", "block_size": 16}, {"quantizer": "nf2"}])
def test_one_iteration_leaves_the_tail_of_the_residual(settings: dict[str, Any]) -> None:
    """T = 1: the codes are those of quantize, the factors the truncated SVD of what they leave."""
    one, alone = outcome_of(loftq(8, iterations=1, **settings)), outcome_of(quantize(**settings))
    for name in ("codes", "scales"):
        np.testing.assert_array_equal(parts_of(one.consts)[name], parts_of(alone.consts)[name])
    left = np.linalg.svd(W - stands_for(alone), compute_uv=False)[8:]
    assert one.weight_error == pytest.approx(float(np.sqrt((left**2).sum())) / np.linalg.norm(W), rel=1e-4)  # float32 factors
    assert one.weight_error < alone.weight_error


def notes(outcome: Any) -> tuple[float, int, int, float | None, float]:
    """(error, kept, of, last or None, alone) of the note on iterates."""
    found = re.fullmatch(
        r"(?:weight|output) error (\S+) after iteration (\d+) of (\d+) \(kept\)(?:, (\S+) after iteration \d+)?, (\S+) without factors",
        outcome.notes[-1],
    )
    assert found is not None, outcome.notes
    error, kept, of, last, alone = found.groups()
    return float(error), int(kept), int(of), float(last) if last else None, float(alone)


def test_the_best_iterate_is_kept_and_reported_beside_the_last() -> None:
    kinds = set()
    for settings in (SETTINGS, {"quantizer": "nf2", "block_size": 16}):
        for rank in (2, 8, 24):
            errors = [outcome_of(loftq(rank, iterations=t, **settings)).weight_error for t in (1, 10)]
            outcome = outcome_of(loftq(rank, iterations=10, **settings))
            error, kept, of, last, alone = notes(outcome)
            assert error == pytest.approx(outcome.weight_error, rel=1e-3)  # four digits
            assert errors[1] <= errors[0] * (1 + 1e-6)
            assert of == 10
            assert alone == pytest.approx(outcome_of(quantize(**settings)).weight_error, rel=1e-3)
            assert (last is None) == (kept == of)
            if last is not None:
                assert last >= error
                same = outcome_of(loftq(rank, iterations=kept, **settings))
                assert same.weight_error == pytest.approx(outcome.weight_error, rel=1e-6)  # the last of fewer is the kept of more
            kinds.add(last is None)
    assert kinds == {True, False}


def test_whitening_minimises_the_output_error() -> None:
    stats, rows = moment(X), X.double().numpy()
    plain, white = (outcome_of(loftq(6, whiten=whiten, damping=1e-4, **SETTINGS), stats) for whiten in (False, True))
    for outcome in (plain, white):
        assert outcome.output_error == pytest.approx(relative(rows @ W.T, rows @ stands_for(outcome).T), rel=1e-4)  # float32 factors
        assert outcome.weight_error == pytest.approx(relative(W, stands_for(outcome)), rel=1e-4)
    assert white.output_error < 0.8 * plain.output_error
    assert white.weight_error > plain.weight_error
    assert notes(white)[0] == pytest.approx(white.output_error, rel=0.02)  # its objective has damping 1e-4 in it


def test_whitening_without_data_is_a_spec_error() -> None:
    linear = torch.nn.Linear(72, 40)
    spec = {"version": 1, "rules": [{"match": {"op": "matmul"}, "rewrite": {"loftq": {"quantizer": "nf4", "rank": 4, "whiten": True}}}]}
    with pytest.raises(SpecError, match=r"rule rule-1: loftq needs calibration data .* and none was given"):
        mm.compile(linear, spec, (torch.randn(2, 72),))
    assert mm.plan(linear, spec, (torch.randn(2, 72),)).sites[0].status == "rewritten"
    with pytest.raises(RewriteError, match="loftq with whiten: true needs calibration data"):
        METHODS["loftq"].errors(only_site(graph_of(TEXT)), loftq(2, whiten=True, **SETTINGS).spec, [], None)


@pytest.mark.parametrize("alpha", [2.0, 8.0, 16.0])
def test_the_adapter_scale_divides_the_factors_and_multiplies_their_product(alpha: float) -> None:
    graph, scale = graph_of(TEXT), alpha / 8
    plain, (one,) = rewritten(graph, rule_of(loftq(8, **SETTINGS), force=True), methods=METHODS)
    scaled, (two,) = rewritten(graph, rule_of(loftq(8, alpha=alpha, **SETTINGS), force=True), methods=METHODS)
    before, after = parts_of(one.consts), parts_of(two.consts)
    np.testing.assert_array_equal(before["codes"], after["codes"])
    np.testing.assert_allclose(scale * after["down"] @ after["up"], before["down"] @ before["up"], atol=1e-5)  # float32
    np.testing.assert_allclose(np.linalg.norm(after["down"], axis=0), np.linalg.norm(after["up"], axis=1), rtol=1e-4)  # split evenly
    assert two.weight_error == pytest.approx(one.weight_error, rel=1e-5)
    torch.testing.assert_close(run(scaled, X[:9])[0], run(plain, X[:9])[0], rtol=0, atol=2e-3)  # float32, sums of 72 of size 100
    assert [node.op for node in scaled.nodes].count("aten.mul.Scalar") == (scale != 1)


def test_svd_first_is_another_iterate() -> None:
    first, second = (outcome_of(loftq(8, iterations=1, svd_first=flag, **SETTINGS)) for flag in (False, True))
    assert first.weight_error != second.weight_error
    left = W - (parts_of(second.consts)["down"].astype(np.float64) @ parts_of(second.consts)["up"]).T
    u, s, vt = np.linalg.svd(W)
    np.testing.assert_allclose(left, W - (u[:, :8] * s[:8]) @ vt[:8], atol=1e-4)  # float32 factors: T = 1 starts from the SVD of W


def test_the_same_seed_gives_the_same_bits() -> None:
    twice = [parts_of(outcome_of(loftq(8, **SETTINGS)).consts) for _ in range(2)]
    assert all((twice[0][name] == twice[1][name]).all() for name in twice[0])


def test_only_factors_train() -> None:
    linear = torch.nn.Linear(72, 40)
    spec = {"version": 1, "rules": [{"match": {"op": "matmul"}, "rewrite": {"loftq": {**SETTINGS, "rank": 4}}}]}
    module = mm.compile(linear, spec, (torch.randn(2, 72),)).module
    module(X[:2]).square().sum().backward()
    gradients = {name.rpartition(".")[2]: parameter.grad for name, parameter in module.named_parameters()}
    assert set(gradients) == {"down", "up", "bias"}
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())
    assert {name.rpartition(".")[2] for name, _ in module.named_buffers()} == {"codes", "scales"}


# mutants: each plants one plausible mistake, the checks below must notice

MUTANTS = {
    "NaN let through": Mutant("readable", "not isfinite(largest(w))", "False"),
    "bias lost": Mutant(
        "base_of",
        "b('matmorph.matmul_codebook.default', rows, codes, scales, b.bias(), spec.quantizer, k, n, block)",
        "b('matmorph.matmul_codebook.default', rows, codes, scales, None, spec.quantizer, k, n, block)",
    ),
    "bias twice": Mutant("Quantize.build", "adds_bias=True", "adds_bias=False"),
    "bias twice beside factors": Mutant("LoftQ.build", "adds_bias=True", "adds_bias=False"),
    "bias never added by the rewrite": Mutant("SiteScope._close", "None if added else entry.application.bias", "None"),
    "scale not applied": Mutant(
        "LoftQ.build",
        "times(b, update, scale)",
        "update if True else b('aten.mul.Scalar', update, scale)",
    ),
    "factors not divided by the scale": Mutant(
        "LoftQ.build", "(found.A, found.B) if scale == 1 else found.factors(scale)", "(found.A, found.B) if True else found.factors(scale)"
    ),
    "whitening forgotten": Mutant("loftq._solved", "whitening=whitening", "whitening=None"),
    "alternation removed": Mutant("loftq._solved", "spec.iterations", "1"),
    "quantised alone reported as the error": Mutant("_iterate_notes", "found.error", "found.quantized_only"),
    "last for kept": Mutant("_iterate_notes", "found.kept + 1", "len(found.errors)"),
    "factors exchanged": Mutant(
        "LoftQ.build",
        "{'down': _stored(site, spec, down_t.T), 'up': _stored(site, spec, up_t.T)}",
        "{'down': _stored(site, spec, up_t), 'up': _stored(site, spec, down_t)}",
    ),
    "codes train": Mutant(
        "base_of",
        "b.const(name, tensor.reshape(shapes[name]), trainable=False, kind='buffer')",
        "b.const(name, tensor.reshape(shapes[name]), trainable=True)",
    ),
    "zero points forgotten": Mutant(
        "base_of",
        "b('matmorph.matmul_nbits.default', rows, codes, scales, zeros, b.bias(), k, n, bits, block)",
        "b('matmorph.matmul_nbits.default', rows, codes, scales, None, b.bias(), k, n, bits, block)",
    ),
    "zero points of a table forgotten": Mutant(
        "base_of",
        "b('matmorph.gather_nbits.default', indices, codes, scales, zeros, k, bits, block)",
        "b('matmorph.gather_nbits.default', indices, codes, scales, None, k, bits, block)",
    ),
    "shift forgotten": Mutant("base_of", "shift == 0", "True"),
    "shift of a table forgotten": Mutant("base_of", "shift != 0", "False"),
    "shift without the middle": Mutant("_per_block", "float(q.offset) + 2 ** (q.quantizer.width - 1) * float(q.scales)", "float(q.offset)"),
    "scales not counted": Mutant("arrays", "(('codes', 'uint8', codes), scales, *zeros)", "(('codes', 'uint8', codes), *zeros)"),
    "up drawn at random": Mutant("QLora.build", "torch.zeros(rank, site.out_features)", "torch.ones(rank, site.out_features)"),
    "gathers left": Mutant("Quantize.build", "base.lookup if site.gathers else None", "None"),
    "gathers not spliced": Mutant("SiteScope.close", "closed[node] = self._bound(written, value, node.output)", "pass"),
    "untie ignored": Mutant("_treated", "replace(site, gathers=()) if rule.untie else site", "site"),
    "size not judged": Mutant("_too_large", "rule.force", "True"),
}
TIED = """graph device=cpu
range b 1..
input %i: int64[b] "ids"
parameter %w: float32[30, 12] "wte.weight" "head.weight"
parameter %c: float32[30] "head.bias"
%e: float32[b, 12] = aten.embedding.default(%w, %i)
%h: float32[b, 12] = aten.relu.default(%e)
%y: float32[b, 30] = aten.linear.default(%h, %w, %c)
output %y "output"
"""
ADDMM = """graph device=cpu
range b 1..
input %x: float32[b, 12] "x"
parameter %w: float32[12, 10] "fc.weight"
parameter %c: float32[1, 10] "fc.bias"
%y: float32[b, 10] = aten.addmm.default(%c, %x, %w)
output %y "output"
"""


def treated(m: Any, text: str, use: Any, stats: SiteStats | None = None, **more: Any) -> Any:
    graph = graph_of(text)
    (site,) = find_sites(graph)
    methods = {"quantize": m.Quantize(), "loftq": m.LoftQ(), "qlora": m.QLora()}
    rule = rule_of(use, **{"force": True, **more})
    result, (outcome,) = m.rewrite(graph, [(site, rule)], methods, {site: stats} if stats else None)
    return graph, result, outcome


def clipped_shift(w: np.ndarray, bits: int) -> float:
    mean, deviation = w.mean(), w.std(ddof=1)
    low, high = max(w.min(), mean - 2 * deviation), min(w.max(), mean + 2 * deviation)
    return float(low + 2 ** (bits - 1) * (high - low) / (2**bits - 1))


def check_outputs(m: Any) -> None:
    for use in (
        quantize(zero_point=True, **SETTINGS),
        quantize(quantizer="nf4"),
        loftq(8, alpha=4, **SETTINGS),
        qlora(8, alpha=4, **SETTINGS),
    ):
        graph, result, outcome = treated(m, TEXT, use)
        matrix = stands_for(outcome, getattr(use.spec, "adapter_scale", 1.0))
        wanted = run(put_in(graph, {outcome.site: matrix}), X[:9])[0]
        torch.testing.assert_close(run(result, X[:9])[0], wanted, rtol=0, atol=2e-3)  # float32, sums of 72 of size 100
        assert relative(W, matrix) < 0.6
        assert outcome.weight_error == pytest.approx(relative(W, matrix), rel=1e-4)
        assert outcome.cost.bytes == sum(const.nbytes for const in outcome.consts)
        assert {const.path.rpartition(".")[2] for const in outcome.consts if const.trainable} <= {"down", "up"}
    plain, scaled = (treated(m, TEXT, loftq(8, alpha=alpha, **SETTINGS))[2] for alpha in (None, 4))
    assert scaled.weight_error == pytest.approx(plain.weight_error, rel=1e-5)  # float32 factors


def check_bias_of_two_axes(m: Any) -> None:
    """Kernels take a bias [out] only; any other is added behind them."""
    graph, result, outcome = treated(m, ADDMM, quantize(quantizer="nf4"))
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    wanted = run(put_in(graph, {outcome.site: stands_for(outcome)}), x)[0]
    torch.testing.assert_close(run(result, x)[0], wanted, rtol=0, atol=3e-5)  # float32, sums of 12


def check_clipped(m: Any) -> None:
    use = quantize(quantizer="uniform_clipped", bits=4)
    graph, result, outcome = treated(m, TEXT, use)
    matrix = stands_for(outcome) + clipped_shift(W, 4)
    assert relative(W, matrix) < 0.3
    wanted = run(put_in(graph, {outcome.site: matrix}), X[:9])[0]
    torch.testing.assert_close(run(result, X[:9])[0], wanted, rtol=0, atol=2e-3)


def check_iterates(m: Any) -> None:
    settings = {"quantizer": "nf2", "block_size": 16}
    many, one = (treated(m, TEXT, loftq(24, iterations=t, **settings))[2] for t in (10, 1))
    error, kept, of, last, _ = notes(many)
    assert many.weight_error < one.weight_error
    assert error == pytest.approx(many.weight_error, rel=1e-3)
    assert kept < of
    assert last is not None


def check_whitened(m: Any) -> None:
    plain, white = (treated(m, TEXT, loftq(6, whiten=whiten, **SETTINGS), moment(X))[2] for whiten in (False, True))
    assert white.output_error < 0.8 * plain.output_error


def check_qlora(m: Any) -> None:
    outcome = treated(m, TEXT, qlora(4, quantizer="nf4"))[2]
    assert not parts_of(outcome.consts)["up"].any()


def check_tied(m: Any) -> None:
    for use in (quantize(quantizer="uniform", bits=4, zero_point=True), quantize(quantizer="uniform_clipped", bits=8)):
        graph, result, outcome = treated(m, TIED, use)
        w = outcome.site.weight().double().numpy()
        shift = clipped_shift(w, 8) if use.spec.quantizer == "uniform_clipped" else 0.0
        wanted = put_in(graph, {outcome.site: stands_for(outcome) + shift})
        torch.testing.assert_close(run(result, torch.arange(30))[0], run(wanted, torch.arange(30))[0], rtol=0, atol=1e-4)  # float32
        assert "wte.weight" not in [const.path for const in result.state]
    _, result, outcome = treated(m, TIED, loftq(3, quantizer="nf4"), untie=True)
    assert outcome.reject is None
    assert [node.op for node in result.nodes if "embedding" in node.op] == ["aten.embedding.default"]


def check_refusals(m: Any) -> None:
    narrow = TEXT.replace("72", "1")
    assert treated(m, narrow, quantize(quantizer="uniform", bits=8), force=False)[2].reject is not None
    weights = weights_of(TEXT)
    weights["fc.weight"][2, 3] = float("nan")
    graph = graph_of(TEXT, weights)
    with pytest.raises(RewriteError, match=r"fc\.weight: 1 of 2880"):
        m.rewrite(graph, [(find_sites(graph)[0], rule_of(quantize(quantizer="nf4")))], {"quantize": m.Quantize()})


CHECKS: tuple[Check, ...] = (
    check_outputs,
    check_bias_of_two_axes,
    check_clipped,
    check_iterates,
    check_whitened,
    check_qlora,
    check_tied,
    check_refusals,
)


def test_the_checks_pass_on_the_real_code() -> None:
    assert killer(unmutated(MUTANTS.values()), CHECKS) is None


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_killed(name: str) -> None:
    assert killer(mutated(MUTANTS[name]), CHECKS), "no check noticed"


def test_dense_of_the_tests_is_that_of_the_library() -> None:
    """The oracle's unpacking against the quantizer's own dequantised matrix, which other tests compare with bitsandbytes."""
    from matmorph.passes.linalg.quantize import Quantizer
    from matmorph.passes.linalg.quantize import quantize as quantized

    outcome = outcome_of(quantize(quantizer="nf4", block_size=16))
    found = quantized(torch.from_numpy(W), Quantizer("nf4", block_size=16)).dequantize().numpy()
    np.testing.assert_allclose(dense(parts_of(outcome.consts), (40, 72), outcome.parts[0].use.spec), found, atol=1e-6)  # float32
