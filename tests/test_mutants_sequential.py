"""Mutants of calibration in sequence: each plants one plausible mistake, and the checks below must notice."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import numpy as np
import pytest
import torch
from mutating import Mutant, killer, mutated, unmutated
from rewriting import graph_of
from test_sequential import LOW, NET, by_rows, data, held_out_errors, pair, rows_of, spec
from test_stream import RESIDUAL

from matmorph.ir.site import Statistic
from matmorph.ir.sites.matmuls import find_sites

W = np.random.default_rng(7).standard_normal((5, 8))


def moments(m: Any, x: np.ndarray, y: np.ndarray) -> Any:
    return m.CrossMoments(*(torch.from_numpy(a.T @ b) for a, b in ((x, x), (x, y), (y, y))), len(x))


def least_squares(m: Any) -> None:
    for seed, rows in enumerate((8, 12, 16, 24, 40, 400)):
        fitted, held = pair(seed, rows), pair(9 + seed, 12)
        found = m["target.target"](torch.from_numpy(W), m["target.Directions"].of(moments(m, *fitted), moments(m, *held)))
        errors = {one: np.square(held[0] @ W.T - held[1] @ by_rows(W, *fitted, one).T).sum() for one in m.STRENGTHS}
        enough = errors[inf] - 0.9 * (errors[inf] - min(errors.values()))
        assert found.strength == max(one for one, error in errors.items() if error <= enough * (1 + 1e-12))
        np.testing.assert_allclose(found.weight.numpy(), by_rows(W, *fitted, found.strength), atol=1e-7)  # half of float64's digits


def errors_of_rows(m: Any) -> None:
    x, y = pair(1, 30)
    other = np.random.default_rng(8).standard_normal((5, 8))
    wanted = np.linalg.norm(x @ W.T - y @ other.T) / np.linalg.norm(x @ W.T)
    assert moments(m, x, y).relative_error(torch.from_numpy(W), torch.from_numpy(other)) == pytest.approx(wanted, rel=1e-10)


def one_matmul(m: Any, batches: list[torch.Tensor], **more: Any) -> Any:
    graph = graph_of(RESIDUAL)
    site = next(site for site in find_sites(graph) if site.path == "a")
    wanted = frozenset({Statistic.INPUT_SECOND_MOMENT, Statistic.HELD_OUT_MOMENT})
    return m.calibrate(graph, [(site, wanted)], [(x,) for x in batches], 10**6, **more)[site]


def token_weights(m: Any) -> None:
    g = torch.Generator().manual_seed(3)
    batches = [torch.randn(4, 6, generator=g) * torch.tensor([[1.0], [30.0], [0.1], [0.0]]) for _ in range(5)]
    x = torch.cat(batches[:4]).double()
    some = x[x.norm(dim=1) > 0]
    unit = some / some.norm(dim=1, keepdim=True)
    wanted = unit.T @ unit * len(x) / float((1 / some.square().sum(1)).sum())
    found = one_matmul(m, batches, token_weights="norm").second_moment
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 * float(wanted.max()))  # float32 rows


def held_out(m: Any) -> None:
    batches = [torch.full((3, 6), float(k)) for k in range(7)]
    found = one_matmul(m, batches)
    assert float(found.held_out[0, 0]) == 3 * 4.0**2


def massive(m: Any) -> None:
    g = torch.Generator().manual_seed(4)
    batches = [torch.randn(50, 6, generator=g) for _ in range(5)]
    batches[0][:2] *= 300
    squares = torch.cat(batches).double().square().sum(1)
    found = one_matmul(m, batches).massive
    assert found.tokens == 2
    assert found.share == pytest.approx(float(squares.topk(2).values.sum() / squares.sum()), rel=1e-6)  # squares of float32


def a_stage(m: Any) -> None:
    """Errors of a whole stage are those of the outputs of both whole graphs."""
    batches = data()
    done = m.compile_graph(graph_of(NET), spec(LOW), {"low_rank": m.LowRank()}, "t", calibration=batches)
    wanted = held_out_errors(done, batches)
    rows = rows_of(done)
    assert any("target" in note for note in rows["down"].notes)
    for path, row in rows.items():
        assert row.output_error == pytest.approx(wanted[path], rel=1e-4)  # float32 sums


MATHEMATICS = (
    Mutant("target.Directions.of", "vectors.T @ held_out.rewritten @ vectors", "vectors @ held_out.rewritten @ vectors.T"),
    Mutant("target.target", "fitted.cross - fitted.rewritten", "fitted.cross.T - fitted.rewritten"),
    Mutant("target.target", "strength * scale", "strength"),
    Mutant("_best", "held_out.cross - held_out.rewritten", "held_out.original - held_out.rewritten"),
    Mutant("KEPT", "0.9", "1.0"),
    Mutant("CrossMoments.squared_error", "before @ self.cross", "before @ self.cross.T"),
    Mutant("CrossMoments.relative_error", "self.original", "self.rewritten"),
)
STATISTICS = (
    Mutant("add_rows", "weights.sqrt()", "weights"),
    Mutant("inverse", "squares > 0", "squares >= 0"),
    Mutant("_level", "found.rows / found.weights.clamp_min(torch.finfo(torch.float64).tiny)", "found.rows"),
    Mutant("held_of", "HELD_OUT_EVERY - 1", "0"),
    Mutant("Norms.massive", "rows / 2", "rows"),
    Mutant("Norms.add", "weights=some", "weights=None"),
)
STAGES = (
    Mutant("_Sides.add", "groups(one, now, pick)", "groups(one, before, pick)"),
    Mutant("_Pair.add", "x.T @ y", "y.T @ x"),
    Mutant("Stream.exchange", "range(self.at, len(self._nodes))", "range(self.at + 1, len(self._nodes))"),
    Mutant("Stream.fork", "[*self._steps]", "self._steps"),
    Mutant("SiteStats.output_error", "self.across if self.held_out is None else self.held_across", "self.across"),
    Mutant("aimed", "target is None", "target is not None"),
)
MATHEMATICAL: tuple[Callable[[Any], None], ...] = (least_squares, errors_of_rows)
STATISTICAL: tuple[Callable[[Any], None], ...] = (token_weights, held_out, massive)


def ids(mutants: tuple[Mutant, ...]) -> list[str]:
    return [f"{mutant.where}: {mutant.put}" for mutant in mutants]


@pytest.mark.parametrize("mutant", MATHEMATICS, ids=ids(MATHEMATICS))
def test_mutants_of_the_target_are_noticed(mutant: Mutant) -> None:
    assert killer(mutated(mutant), MATHEMATICAL)


@pytest.mark.full
@pytest.mark.parametrize("mutant", STATISTICS, ids=ids(STATISTICS))
def test_mutants_of_statistics_are_noticed(mutant: Mutant) -> None:
    assert killer(mutated(mutant), STATISTICAL)


@pytest.mark.full
@pytest.mark.parametrize("mutant", STAGES, ids=ids(STAGES))
def test_mutants_of_stages_are_noticed(mutant: Mutant) -> None:
    assert killer(mutated(mutant), (a_stage,))


@pytest.mark.parametrize(
    ("mutants", "checks"),
    [
        (MATHEMATICS, MATHEMATICAL),
        pytest.param(STATISTICS, STATISTICAL, marks=pytest.mark.full),
        pytest.param(STAGES, (a_stage,), marks=pytest.mark.full),
    ],
)
def test_the_code_itself_passes(mutants: tuple[Mutant, ...], checks: Any) -> None:
    with unmutated(mutants) as found:
        for check in checks:
            check(found)
