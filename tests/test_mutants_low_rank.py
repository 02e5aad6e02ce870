"""Mutants of low_rank: each plants one plausible mistake in the source, and the checks below must notice.

The checks are a digest of the other tests of the method, against numpy in float64; unmutated code passes them all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from mutating import Check, Mutant, killer, mutated, unmutated
from rewriting import LINEAR, graph_of, low_rank, moment, rule_of, run, weights_of

from matmorph.errors import RewriteError
from matmorph.ir.sites.matmuls import find_sites
from matmorph.passes.methods.protocol import SiteStats

MUTANTS = {
    "rank off by one": Mutant(
        "LowRank.solve",
        "truncated_svd(objective, rank, solver=spec.solver, seed=seed)",
        "truncated_svd(objective, max(1, rank - 1), solver=spec.solver, seed=seed)",
    ),
    "ratio rounds up": Mutant(
        "low_rank._wanted",
        "floor(value * site.in_features * site.out_features / (site.in_features + site.out_features))",
        "1 + floor(value * site.in_features * site.out_features / (site.in_features + site.out_features))",
    ),
    "energy judged as error": Mutant("_FROM_DATA", "rank_for_energy", "rank_for_error"),
    "whitening without its inverse": Mutant(
        "LowRank.solve", "project(w, found.u.to(w.dtype), weighting)", "project(objective.to(w.dtype), found.u.to(w.dtype), weighting)"
    ),
    "whitening forgotten": Mutant(
        "low_rank._objective", "weighted(w.double(), weighting) @ whitening.factor", "weighted(w.double(), weighting)"
    ),
    "bound not rooted": Mutant("low_rank._bound", "sqrt(tail / total)", "tail / total"),
    "bound against the wrong norm": Mutant("low_rank._bound", "optimum / norm", "optimum"),
    "NaN let through": Mutant("readable", "not isfinite(largest(w))", "False"),
    "bytes are parameters": Mutant("LowRank.cost", "parameters * site.const.tensor.torch_dtype.itemsize", "parameters"),
    "multiple rounds a promise of accuracy down": Mutant("low_rank._within", "-(-wanted // step)", "wanted // step"),
    "factors in the wrong order": Mutant("LowRank.build", "{'down': found.down, 'up': found.up}", "{'up': found.up, 'down': found.down}"),
    "root of S dropped on one side": Mutant("project", "outer * balance", "outer"),
    "S on one side": Mutant("project", "(norms / sizes).sqrt()", "norms / sizes"),
    "upper instead of lower factor": Mutant(
        "_factor",
        "Whitening(lower, moment.new_tensor(used * scale), raised)",
        "Whitening(lower.T.contiguous(), moment.new_tensor(used * scale), raised)",
    ),
    "energy counts s, not its square": Mutant("_smallest", "squares = row.square()", "squares = row"),
    "error not squared": Mutant("rank_for_error", "error ** 2 * squares.sum()", "error * squares.sum()"),
    "smallest singular values kept": Mutant("svd._randomized", "vectors[:, :rank]", "vectors[:, -rank:]"),
    "guard never fails": Mutant("_guarded", "error > GUARD * optimum", "False"),
    "certificate trusts Ritz values": Mutant("_certify", "bound[-rank:].double", "theta[:rank].double"),
    "missed directions not looked for": Mutant("_certify", "int(failed)", "False"),
    "signs left to chance": Mutant("fix_signs", "torch.where(peaks < 0, -1.0, 1.0)", "torch.where(peaks < 0, 1.0, 1.0)"),
    "bias lost": Mutant(
        "SiteScope._finish",
        "y if bias is None or entry.view.bias_on_rows else b('aten.add.Tensor', y, bias)",
        "y if bias is None or entry.view.bias_on_rows else y",
    ),
    "bias of a convolution lost": Mutant("SiteScope._finish", "bias is not None and entry.view.bias_on_rows", "False"),
    "replaced weight kept": Mutant("swept", "const in wanted or const not in was_read", "True"),
    "size not judged": Mutant("_too_large", "rule.force", "True"),
    "force ignored": Mutant("_too_large", "rule.force", "False"),
}


W = weights_of(LINEAR)["fc.weight"]
U, S, VH = np.linalg.svd(W.double().numpy())
_G = torch.Generator().manual_seed(2)
X = torch.randn(200, 12, generator=_G) @ torch.randn(12, 12, generator=_G) * torch.logspace(0, -1.5, 12)
OUTPUTS = np.linalg.svd((X.double() @ W.double().T).numpy(), compute_uv=False)

CONVOLUTION = """graph device=cpu
range b 1..
input %x: float32[b, 6, 4, 3] "x"
parameter %w: float32[5, 6, 1, 1] "conv.weight"
parameter %c: float32[5] "conv.bias"
%y: float32[b, 5, 4, 3] = aten.conv2d.default(%x, %w, %c)
output %y "output"
"""


def rewritten(m: Any, text: str, use, stats: SiteStats | None = None, **more):
    graph = graph_of(text)
    (site,) = find_sites(graph)
    rule = rule_of(use, **more)
    methods = {"low_rank": m.LowRank()}
    result, (outcome,) = m.rewrite(graph, [(site, rule)], methods, {site: stats} if stats else None)
    return graph, result, outcome


def relative_tail(s: np.ndarray, rank: int) -> float:
    return float(np.sqrt((s[rank:] ** 2).sum() / (s**2).sum()))


def check_plain(m: Any) -> None:
    _, result, outcome = rewritten(m, LINEAR, low_rank(3))
    expected = X.double().numpy() @ ((U[:, :3] * S[:3]) @ VH[:3]).T + weights_of(LINEAR)["fc.bias"].double().numpy()
    np.testing.assert_allclose(run(result, X)[0].numpy(), np.maximum(expected, 0), atol=1e-4)  # float32, outputs of size 10
    assert outcome.weight_error == pytest.approx(relative_tail(S, 3), rel=1e-5)  # float32 factors
    assert relative_tail(S, 3) * 0.999 < outcome.bound.value <= relative_tail(S, 3)
    down, up = (const.load().double().numpy() for const in outcome.consts)
    np.testing.assert_allclose(np.linalg.norm(down, axis=0), np.sqrt(S[:3]), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(up, axis=1), np.sqrt(S[:3]), rtol=1e-5)
    assert [const.path for const in result.state] == ["fc.low_rank.down", "fc.low_rank.up", "fc.bias"]
    assert outcome.cost.bytes == 4 * 3 * 22


def check_whitened(m: Any) -> None:
    _, _, outcome = rewritten(m, LINEAR, low_rank(3, whiten=True, damping=1e-6), moment(X))
    optimum = relative_tail(OUTPUTS, 3)
    assert outcome.output_error == pytest.approx(optimum, rel=1e-3)  # damping 1e-6
    down, up = (const.load().double() for const in outcome.consts)
    measured = (X.double() @ W.double().T - X.double() @ down @ up).norm() / (X.double() @ W.double().T).norm()
    assert float(measured) == pytest.approx(optimum, rel=1e-3)
    assert optimum * 0.95 < outcome.bound.value <= optimum


def check_ranks(m: Any) -> None:
    kept = np.concatenate([[0], (S**2).cumsum()]) / (S**2).sum()
    for share in (0.5, 0.8, 0.9):
        _, _, energy = rewritten(m, LINEAR, low_rank({"energy": share}), force=True)
        assert energy.parts[0].choice.rank == next(r for r in range(1, 11) if kept[r] >= share)
        _, _, error = rewritten(m, LINEAR, low_rank({"error": share}), force=True)
        assert error.parts[0].choice.rank == next(r for r in range(1, 11) if 1 - kept[r] <= share**2)
    _, _, rounded = rewritten(m, LINEAR, low_rank({"energy": 0.9, "multiple_of": 4}), force=True)
    assert kept[rounded.parts[0].choice.rank] >= 0.9
    _, _, ratio = rewritten(m, LINEAR, low_rank({"ratio": 0.8}))
    assert ratio.parts[0].choice.rank == 4


def check_break_even(m: Any) -> None:
    """[10, 12]: rank 5 takes 440 of 480 bytes, rank 6 takes 528."""
    outcomes = [rewritten(m, LINEAR, low_rank(rank), force=force)[2] for rank, force in ((5, False), (6, False), (6, True))]
    assert [outcome.reject is None for outcome in outcomes] == [True, False, True]


def check_full_rank(m: Any) -> None:
    graph, result, _ = rewritten(m, CONVOLUTION, low_rank({"energy": 1.0}), force=True)
    x = torch.randn(2, 6, 4, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run(result, x)[0], run(graph, x)[0], rtol=0, atol=2e-5)  # float32, sums of 6


def check_bad_weight(m: Any) -> None:
    weights = weights_of(LINEAR)
    weights["fc.weight"][2, 3] = float("nan")
    graph = graph_of(LINEAR, weights)
    with pytest.raises(RewriteError, match=r"fc\.weight: 1 of 120"):
        m.rewrite(graph, [(find_sites(graph)[0], rule_of(low_rank(2)))], {"low_rank": m.LowRank()})


def check_solvers(m: Any) -> None:
    flat = torch.randn(130, 110, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    optimum = float(np.sqrt((np.linalg.svd(flat.numpy(), compute_uv=False)[6:] ** 2).sum()))
    for steps, solver in (((0,), "gram"), ((2, 1, 1, 8), "randomized")):
        m.put("svd._STEPS", steps)
        found = m.truncated_svd(flat, 6, solver="randomized")
        assert found.solver == solver
        error = float((flat - (found.u * found.s) @ found.vh).norm())
        assert error <= min(found.guard, 1.01) * optimum * (1 + 1e-9)  # float64
        assert found.optimum <= optimum * (1 + 1e-9)
        assert bool((found.u.gather(0, found.u.abs().argmax(0, keepdim=True)) > 0).all())
    steep = torch.diag(10.0 ** -torch.arange(40.0))  # in float32 its Gram matrix has lost all but four values
    assert m.truncated_svd(steep, 4, solver="gram").solver == "exact"
    blind = torch.eye(40, dtype=torch.float64)[:, 1:6]
    assert m._certify(torch.diag(torch.arange(40, 0, -1, dtype=torch.float64)), blind, 2)[2] == float("inf")


CHECKS: tuple[Check, ...] = (
    check_plain,
    check_whitened,
    check_ranks,
    check_break_even,
    check_full_rank,
    check_bad_weight,
    check_solvers,
)


def test_the_checks_pass_on_the_real_code() -> None:
    assert killer(unmutated(MUTANTS.values()), CHECKS) is None


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_killed(name: str) -> None:
    assert killer(mutated(MUTANTS[name]), CHECKS), "no check noticed"
