"""Rank policies as data: constant, linear in depth (PRILoRA, arXiv 2401.11316), energy; and factors in half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import randn, seeded
from torch import Tensor, nn

import matmorph as mm
from matmorph.errors import RewriteError
from matmorph.passes.methods.loftq import method as method

LAYERS = 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.fc(x))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def compiled(rules: list[dict[str, Any]], **top: Any) -> mm.Compiled:
    given = {"version": 1, "rules": rules, **top}
    return mm.compile(seeded(Stack), given, {"x": randn(3, 24)}, {"x": {0: "batch"}}, [{"x": randn(64, 24)}])


def low_rank(rank: Any, **match: Any) -> dict[str, Any]:
    return {"match": {"op": "matmul", **match}, "rewrite": {"low_rank": {"rank": rank}}}


def test_a_constant_rank() -> None:
    assert [row.rank for row in compiled([low_rank(5)]).report.sites] == [5] * LAYERS


def test_ranks_that_grow_linearly_with_depth() -> None:
    """One rule per layer: r = first + (last - first) l / (L - 1)."""
    first, last = 2, 11
    ranks = [first + (last - first) * layer // (LAYERS - 1) for layer in range(LAYERS)]
    assert [row.rank for row in compiled([low_rank(rank, layer=layer) for layer, rank in enumerate(ranks)]).report.sites] == [2, 5, 8, 11]


def test_ranks_that_keep_a_share_of_the_energy() -> None:
    for row in compiled([low_rank({"energy": 0.6})]).report.sites:
        weight = seeded(Stack).get_parameter(f"{row.path}.weight").detach().double()
        squares = torch.linalg.svdvals(weight) ** 2
        kept = squares.cumsum(0) / squares.sum()
        assert row.rank == int((kept < 0.6).sum()) + 1


CODES = {"quantizer": "uniform", "bits": 4, "block_size": 16, "rank": 4}


def loftq(**more: Any) -> list[dict[str, Any]]:
    return [{"match": {"op": "matmul"}, "rewrite": {"loftq": {**CODES, **more}}}]


def test_factors_in_half_precision_take_half_the_bytes_and_run(tmp_path: Path) -> None:
    whole, half = (compiled(loftq(factors=kind), export={"precision": "keep"}) for kind in ("keep", "fp16"))
    per_site = 4 * (24 + 24)
    for one, other in zip(whole.report.sites, half.report.sites, strict=True):
        assert one.bytes[1] - other.bytes[1] == 2 * per_site
        assert other.output_error == pytest.approx(one.output_error, rel=0.02)  # factors of 11 bits beside codes of 4
    x = randn(7, 24)
    with torch.no_grad():
        difference = (half.module(x=x) - whole.module(x=x)).norm() / whole.module(x=x).norm()
    assert 0 < float(difference) < 1e-2  # 2^-11 per factor, small beside the base
    half.save(tmp_path / "out")  # verified: ONNX Runtime answers as torch does
    assert half.report.parity is not None
    assert half.report.totals.bytes[1] < whole.report.totals.bytes[1]


def test_factors_outside_half_precision_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = method.stored
    monkeypatch.setattr(method, "stored", lambda site, factor: real(site, factor * 1e6))
    with pytest.raises(RewriteError, match=r"layers\.0\.fc: the factors leave the range of float16"):
        compiled(loftq(factors="fp16"))
