"""Activations rounded to 8 bits: torch's foresight against ONNX Runtime's kernel, and the tolerance that a sensitive model gets from it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from exporting import randn, session
from quantised import Quantised, Weight, codebook, error, expected, uniform
from torch import Tensor, nn

import matmorph as mm
from matmorph.exporters.onnx.onnx_model import export_onnx
from matmorph.exporters.onnx.precision import INT8_TOLERANCE
from matmorph.exporters.onnx.rounding import ORDERS, round_int8, rounds_activations, run_apart, runs_rounded
from matmorph.exporters.vectors import check_vectors, widened
from matmorph.ir.evaluate import evaluate
from matmorph.ir.tracing.trace import trace
from matmorph.runtime import Session
from matmorph.runtime.check import check
from matmorph.runtime.format.artifact import MODEL
from matmorph.specs.schema import Export


@pytest.mark.parametrize(("shape", "block"), [((3, 64), 32), ((2, 3, 40), 16), ((5, 40), 64), ((1, 33), 32)])
def test_blocks_are_rounded_to_255_levels(shape: tuple[int, ...], block: int) -> None:
    """The formula in numpy: q = rint(127 x / absmax), block by block; a last block may be short, a block of zeros stays."""
    x = randn(*shape)
    x[..., :block] *= 100
    x[0, ..., :block] = 0
    rows = x.numpy().astype(np.float64).reshape(-1, shape[-1])
    wanted = np.zeros_like(rows)
    for start in range(0, shape[-1], block):
        part = rows[:, start : start + block]
        scale = np.abs(part).max(axis=1, keepdims=True) / 127
        wanted[:, start : start + block] = np.rint(part / np.where(scale > 0, scale, 1)) * scale
    # half a level of float32 rounding decides at ties; elsewhere both sides name the same level to 1e-6 of the largest
    assert np.abs(round_int8(x, block).numpy().reshape(rows.shape) - wanted).max() <= 1e-6 * np.abs(rows).max()
    assert round_int8(x.half(), block).dtype == torch.float16


@pytest.mark.parametrize("bits", [4, 8])
def test_the_kernel_rounds_like_that(rng: np.random.Generator, tmp_path: Path, bits: int) -> None:
    """What is left of the difference once torch rounds too is at most a fifth: products of codes, sums in another order."""
    weight, x = uniform(rng, 16, 128, bits, 32), randn(7, 128)
    graph = trace(Quantised(weight, None), {"x": x}, {"x": {0: "batch"}})
    export_onnx(graph, tmp_path, Export(activations="int8", target=("cpu",)))
    (y,) = session(tmp_path / MODEL).run(None, {"x": x.numpy()})
    (foreseen,) = check_vectors(graph, [x], run=runs_rounded(False)).cases[0].outputs.values()
    exact = expected(weight, x, None)
    assert error(y, exact) > 1e-3  # it does round
    assert error(y, foreseen.astype(np.float64)) <= error(y, exact) / 5


def test_what_is_not_rounded(rng: np.random.Generator) -> None:
    weight, x = codebook(rng, 16, 64, "nf4", 32), randn(2, 64)
    assert not rounds_activations(trace(Quantised(weight, None), {"x": x}, {"x": {0: "batch"}}), True)
    weight = uniform(rng, 16, 64, 4, 32, True)
    assert rounds_activations(trace(Quantised(weight, None), {"x": x}, {"x": {0: "batch"}}), True)


class Products(nn.Module):
    """One of each kind, with and without something added; the last one is of a tensor with itself."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.packed = Quantised(weight, None)
        self.added, self.bare = nn.Linear(16, 12), nn.Linear(12, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.added.bias, self.bare(self.added(self.packed(x))), self.bare.weight)
        square = y @ y.T
        return square @ square


@pytest.mark.parametrize("order", range(len(ORDERS)))
def test_sums_in_two_parts_are_the_same_but_for_rounding(rng: np.random.Generator, order: int) -> None:
    x = randn(5, 40)
    graph = trace(Products(uniform(rng, 16, 40, 4, 8, True)), {"x": x}, {"x": {0: "batch"}})
    run = partial(run_apart, ORDERS[order])
    wide = widened(graph, torch.float64)
    (plain,), (apart,) = evaluate(wide, [x.double()]), evaluate(wide, [x.double()], run=run)
    assert float((plain - apart).abs().max()) <= 1e-13 * float(plain.abs().max())  # some hundred terms, each rounded to 1.1e-16
    (plain,), (apart,) = evaluate(graph, [x]), evaluate(graph, [x], run=run)
    assert not torch.equal(plain, apart)
    assert float((plain - apart).abs().max()) <= 1e-4 * float(plain.abs().max())  # the same, 6e-8


class Sensitive(nn.Module):
    """A saturated tanh: what rounding does before it is felt a hundredfold."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 32)
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.gain * self.second(torch.tanh(self.first(x))))


def saved(gain: float, activations: str, folder: Path) -> float:
    rewrite = {"quantize": {"quantizer": "uniform", "bits": 8, "block_size": 32}}
    spec = {"version": 1, "rules": [{"match": {"op": "linear"}, "rewrite": rewrite}]}
    export = {"target": ["cpu"], "activations": activations}
    compiled = mm.compile(Sensitive(gain).eval(), {**spec, "export": export}, (randn(16, 64),), ({0: "batch"},))
    compiled.save(folder)
    return float(json.loads((folder / "manifest.json").read_text())["tolerance"])


def test_a_sensitive_model_gets_the_tolerance_it_needs(tmp_path: Path) -> None:
    assert saved(1.0, "int8", tmp_path / "calm") == INT8_TOLERANCE
    tolerance = saved(300.0, "int8", tmp_path / "sensitive")
    assert INT8_TOLERANCE < tolerance <= 4  # twice the range of tanh
    result = check(tmp_path / "sensitive")
    assert result.ok
    assert result.max_difference is not None
    assert INT8_TOLERANCE < result.max_difference <= tolerance
    assert saved(300.0, "fp32", tmp_path / "exact") == 1e-4
    assert Session(tmp_path / "sensitive", "cpu", log=lambda line: None).run({"x": randn(3, 64).numpy()})["output"].shape == (3, 32)
