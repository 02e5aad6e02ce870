"""Mutants of low_rank: each plants one plausible mistake in the source, and the checks below must notice.

The checks are a digest of the other tests of the method, against numpy in float64; unmutated code passes them all.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from mutating import UNCHANGED, Check, killer
from rewriting import LINEAR, graph_of, low_rank, moment, rule_of, run, weights_of

from matmorph.errors import RewriteError
from matmorph.ir.sites.matmuls import find_sites
from matmorph.passes.methods.protocol import SiteStats

MODULES = ("linalg.svd", "linalg.whiten", "methods.weights", "methods.low_rank", "rows", "fragment", "rewrite")
"""In the order of their imports."""

SVD, WHITEN, METHOD, FRAGMENT, REWRITE = "linalg.svd", "linalg.whiten", "methods.low_rank", "fragment", "rewrite"
MUTANTS: dict[str, tuple[str, str, str]] = {
    "rank off by one": (METHOD, "truncated_svd(objective, rank,", "truncated_svd(objective, max(1, rank - 1),"),
    "ratio rounds up": (METHOD, "return floor(", "return 1 + floor("),
    "energy judged as error": (METHOD, '"energy": rank_for_energy', '"energy": rank_for_error'),
    "whitening without its inverse": (METHOD, "project(w, found.u", "project(objective.to(w.dtype), found.u"),
    "whitening forgotten": (METHOD, "weighted(w.double(), weighting) @ whitening.factor", "weighted(w.double(), weighting)"),
    "bound not rooted": (METHOD, "sqrt(tail / total)", "(tail / total)"),
    "bound against the wrong norm": (METHOD, "found.optimum / norm", "found.optimum"),
    "NaN let through": ("methods.weights", "    if not isfinite(largest(w)):", "    if False:"),
    "bytes are parameters": (METHOD, "parameters * site.const.tensor.torch_dtype.itemsize", "parameters"),
    "multiple rounds a promise of accuracy down": (METHOD, "-(-wanted // step) * step", "wanted // step * step"),
    "factors in the wrong order": (METHOD, 'zip(("down", "up")', 'zip(("up", "down")'),
    "root of S dropped on one side": (WHITEN, "(outer * balance)", "outer"),
    "S on one side": (WHITEN, "balance = (norms / sizes).sqrt()", "balance = norms / sizes"),
    "upper instead of lower factor": (WHITEN, "return Whitening(lower, ", "return Whitening(lower.T.contiguous(), "),
    "energy counts s, not its square": (SVD, "squares = row.square()", "squares = row"),
    "error not squared": (SVD, "error**2 * squares.sum()", "error * squares.sum()"),
    "smallest singular values kept": (SVD, "vectors[:, :rank]", "vectors[:, -rank:]"),
    "guard never fails": (SVD, "if error > GUARD * optimum:", "if False:"),
    "certificate trusts Ritz values": (SVD, "float(bound[-rank:]", "float(theta[:rank]"),
    "missed directions not looked for": (SVD, "if int(failed):", "if False:"),
    "signs left to chance": (SVD, "peaks < 0, -1.0, 1.0", "peaks < 0, 1.0, 1.0"),
    "bias lost": (FRAGMENT, 'else b("aten.add.Tensor", y, bias)', "else y"),
    "bias of a convolution lost": (FRAGMENT, "if bias is not None and entry.view.bias_on_rows:", "if False:"),
    "replaced weight kept": (REWRITE, "if const in read or const not in was_read:", "if True:"),
    "size not judged": (REWRITE, "judged = () if rule.force else", "judged = () if True else"),
    "force ignored": (REWRITE, "judged = () if rule.force else", "judged = () if False else"),
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


def rewritten(m: dict[str, ModuleType], text: str, use, stats: SiteStats | None = None, **more):
    graph = graph_of(text)
    (site,) = find_sites(graph)
    rule = rule_of(use, **more)
    methods = {"low_rank": m[METHOD].LowRank()}
    result, (outcome,) = m[REWRITE].rewrite(graph, [(site, rule)], methods, {site: stats} if stats else None)
    return graph, result, outcome


def relative_tail(s: np.ndarray, rank: int) -> float:
    return float(np.sqrt((s[rank:] ** 2).sum() / (s**2).sum()))


def check_plain(m: dict[str, ModuleType]) -> None:
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


def check_whitened(m: dict[str, ModuleType]) -> None:
    _, _, outcome = rewritten(m, LINEAR, low_rank(3, whiten=True, damping=1e-6), moment(X))
    optimum = relative_tail(OUTPUTS, 3)
    assert outcome.output_error == pytest.approx(optimum, rel=1e-3)  # damping 1e-6
    down, up = (const.load().double() for const in outcome.consts)
    measured = (X.double() @ W.double().T - X.double() @ down @ up).norm() / (X.double() @ W.double().T).norm()
    assert float(measured) == pytest.approx(optimum, rel=1e-3)
    assert optimum * 0.95 < outcome.bound.value <= optimum


def check_ranks(m: dict[str, ModuleType]) -> None:
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


def check_break_even(m: dict[str, ModuleType]) -> None:
    """[10, 12]: rank 5 takes 440 of 480 bytes, rank 6 takes 528."""
    outcomes = [rewritten(m, LINEAR, low_rank(rank), force=force)[2] for rank, force in ((5, False), (6, False), (6, True))]
    assert [outcome.reject is None for outcome in outcomes] == [True, False, True]


def check_full_rank(m: dict[str, ModuleType]) -> None:
    graph, result, _ = rewritten(m, CONVOLUTION, low_rank({"energy": 1.0}), force=True)
    x = torch.randn(2, 6, 4, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run(result, x)[0], run(graph, x)[0], rtol=0, atol=2e-5)  # float32, sums of 6


def check_bad_weight(m: dict[str, ModuleType]) -> None:
    weights = weights_of(LINEAR)
    weights["fc.weight"][2, 3] = float("nan")
    graph = graph_of(LINEAR, weights)
    with pytest.raises(RewriteError, match=r"fc\.weight: 1 of 120"):
        m[REWRITE].rewrite(graph, [(find_sites(graph)[0], rule_of(low_rank(2)))], {"low_rank": m[METHOD].LowRank()})


def check_solvers(m: dict[str, ModuleType]) -> None:
    svd = m[SVD]
    flat = torch.randn(130, 110, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    optimum = float(np.sqrt((np.linalg.svd(flat.numpy(), compute_uv=False)[6:] ** 2).sum()))
    for steps, solver in (((0,), "gram"), ((2, 1, 1, 8), "randomized")):
        svd._STEPS = steps
        found = svd.truncated_svd(flat, 6, solver="randomized")
        assert found.solver == solver
        error = float((flat - (found.u * found.s) @ found.vh).norm())
        assert error <= min(found.guard, 1.01) * optimum * (1 + 1e-9)  # float64
        assert found.optimum <= optimum * (1 + 1e-9)
        assert bool((found.u.gather(0, found.u.abs().argmax(0, keepdim=True)) > 0).all())
    steep = torch.diag(10.0 ** -torch.arange(40.0))  # in float32 its Gram matrix has lost all but four values
    assert svd.truncated_svd(steep, 4, solver="gram").solver == "exact"
    blind = torch.eye(40, dtype=torch.float64)[:, 1:6]
    assert svd._certify(torch.diag(torch.arange(40, 0, -1, dtype=torch.float64)), blind, 2)[2] == float("inf")


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
    assert killer(MODULES, CHECKS, *UNCHANGED) is None


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_killed(name: str) -> None:
    assert killer(MODULES, CHECKS, *MUTANTS[name]), "no check noticed"
