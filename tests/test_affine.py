"""Floating-point zero points: grids that they hold exactly, the search, ONNX Runtime's kernel, and what has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mutating import Check, Mutant, killer, mutated, unmutated
from quantizing import METHODS, quantize
from rewriting import LINEAR, graph_of, only_site, rewritten, rule_of
from torch import nn

import matmorph as mm
from matmorph.ir.site import Reject
from matmorph.passes.linalg.packing import pack_matmul_nbits, unpack_matmul_nbits
from matmorph.passes.linalg.quantize import Quantizer
from matmorph.passes.linalg.quantize import quantize as to_codes
from matmorph.passes.methods.quantize.method import Quantize
from matmorph.runtime import Session


def q4_1(rows: int, features: int) -> np.ndarray:
    """Weights of a GGUF file of type Q4_1, from its definition: per 32 numbers a step d and a minimum m in half precision, d code + m; the
    codes of a block reach 0 and 15, because d and m come from its extremes. One minimum is far above zero, one block is of one number."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (rows, features // 32, 32))
    codes[..., 3], codes[..., 11] = 0, 15
    d = rng.uniform(0.001, 0.02, codes.shape[:2]).astype(np.float16).astype(np.float32)
    m = rng.uniform(-0.2, 0.05, codes.shape[:2]).astype(np.float16).astype(np.float32)
    m[0, 0], d[1, 0] = 0.5, 0
    return (codes * d[..., None] + m[..., None]).astype(np.float32).reshape(rows, features)


@pytest.mark.parametrize("scale", ["absmax", "search"])
def test_the_grid_of_q4_1_is_held(scale: Any) -> None:
    w = q4_1(24, 128)
    q = to_codes(torch.from_numpy(w), Quantizer("uniform", 4, 32, zero_point="float", scale=scale))
    np.testing.assert_allclose(q.dequantize().numpy(), w, rtol=0, atol=2e-7)  # three roundings of float32 of numbers up to 0.8


def test_the_search_is_never_worse_and_mostly_better() -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) ** 3
    importance = torch.linspace(0.1, 3, 256, dtype=torch.float64)
    errors = []
    for scale in ("absmax", "search"):
        q = to_codes(w, Quantizer("uniform", 4, 32, zero_point="float", scale=scale), importance)
        errors.append(((w - q.dequantize()).double().square() * importance).view(64, 8, 32).sum(2))
    assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all())  # float32 sums
    assert float(errors[1].sum()) < 0.9 * float(errors[0].sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("features", [64, 90])
def test_packing_and_back(bits: int, features: int) -> None:
    w = torch.randn(5, features, generator=torch.Generator().manual_seed(1)) + 0.5
    quantizer = Quantizer("uniform", bits, 32, zero_point="float")
    q = to_codes(w, quantizer)
    packed = pack_matmul_nbits(q)
    again = unpack_matmul_nbits(packed, quantizer, (5, features))
    assert torch.equal(again.codes, q.codes)
    assert torch.equal(again.dequantize(), q.dequantize())
    assert packed.nbytes == q.nbytes


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_onnx_runtime_multiplies_with_them(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(70, 40), nn.GELU(), nn.Linear(40, 6)), torch.randn(3, 70)
    rewrite = {"quantize": {"quantizer": "uniform", "bits": bits, "block_size": 16, "zero_point": "float", "scale": "search"}}
    spec = {"version": 1, "rules": [{"match": {"op": "linear"}, "rewrite": rewrite, "force": True}]}
    compiled = mm.compile(model, spec, (x,), dynamic_shapes=({0: "batch"},))
    (found,) = Session(compiled.save(tmp_path / "out")).run({"input": x.numpy()}).values()
    np.testing.assert_allclose(found, compiled(x).detach().numpy(), rtol=0, atol=1e-5)  # float32, sums of 70 of size 1


def test_cost_is_what_is_built() -> None:
    _, (outcome,) = rewritten(
        graph_of(LINEAR), rule_of(quantize(quantizer="uniform", bits=4, zero_point="float"), force=True), None, METHODS
    )
    assert outcome.cost.bytes == sum(const.nbytes for const in outcome.consts)


def test_what_has_none_is_refused() -> None:
    with pytest.raises(ValueError, match="with 2, 3, 4 bits, not 8"):
        quantize(quantizer="uniform", bits=8, zero_point="float")
    with pytest.raises(ValueError, match="nf4 has neither a zero point"):
        quantize(quantizer="nf4", zero_point="float")
    text = """graph device=cpu
input %i: int64[4] "ids"
parameter %w: float32[30, 32] "embed.weight"
%e: float32[4, 32] = aten.embedding.default(%w, %i)
output %e "output"
"""
    found = Quantize().check(only_site(graph_of(text)), quantize(quantizer="uniform", bits=4, zero_point="float").spec)
    assert isinstance(found, Reject)
    assert "integer zero points only" in found.reason


MUTANTS = {
    "zero has a level": Mutant("affine_scales", "low, high = x.amin(1), x.amax(1)", "low, high = x.amin(1).clamp_max(0), x.amax(1)"),
    "one step too many": Mutant("affine_scales", "top = 2**bits - 1", "top = 2**bits"),
    "blocks of one number are lost": Mutant("affine_scales", "torch.where(step > 0, step, low.abs())", "step"),
    "zero point rounded": Mutant(
        "affine._zero", "-low / torch.where(step == 0, 1.0, step)", "(-low / torch.where(step == 0, 1.0, step)).round()"
    ),
    "sign of the zero point": Mutant("affine_codes", "zeros[:, None]", "-zeros[:, None]"),
}


def check_search(m: Any) -> None:
    for bits in (2, 4):
        w = torch.from_numpy(q4_1(24, 128)).view(-1, 32)
        w = w if bits == 4 else torch.where(w > w.mean(1, keepdim=True), w.amax(1, keepdim=True), w.amin(1, keepdim=True))
        for search in (False, True):
            scales, zeros = m.affine_scales(w, bits, search=search)
            levels = (m.affine_codes(w, scales, zeros, 2**bits - 1) - zeros[:, None]) * scales[:, None]
            np.testing.assert_allclose(levels.numpy(), w.numpy(), rtol=0, atol=2e-7)  # as above


CHECKS: tuple[Check, ...] = (check_search,)


def test_the_checks_pass_on_the_real_code() -> None:
    assert killer(unmutated(MUTANTS.values()), CHECKS) is None


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_killed(name: str) -> None:
    assert killer(mutated(MUTANTS[name]), CHECKS), "no check noticed"
