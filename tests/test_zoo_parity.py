"""Every model of the zoo, rewritten: three executors agree (the original under torch, the IR's evaluator, ONNX Runtime with optimisations
off and on) at three shapes, one of them with batch 1; and factors of full rank give the original's answers back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import answers, difference, feeds, session
from torch.utils._pytree import tree_leaves
from zoo import ZOO, Entry

from matmorph.api import load_spec
from matmorph.exporters.onnx.onnx_model import export_onnx
from matmorph.ir.core import Graph
from matmorph.ir.evaluate import bind, evaluate
from matmorph.ir.site import LISTED
from matmorph.ir.to_torch import to_torch
from matmorph.ir.tracing.trace import trace
from matmorph.passes.methods import method_table
from matmorph.passes.pipeline import Compilation, compile_graph
from matmorph.specs.schema import Export

pytestmark = pytest.mark.no_cover
"""What runs here is covered by the tests of its parts; the tracer of the coverage would take two fifths of the time."""

FULL_RANK = {"match": {"op": "matmul"}, "rewrite": {"low_rank": {"rank": {"energy": 1.0}}}, "force": True, "untie": True}
HALF = {"match": {"not": {"layer": 1}, "op": "matmul"}, "rewrite": {"low_rank": {"rank": {"ratio": 0.5}}}}

ORIGINAL = 1e-4
"""Full rank against the original: float32 factors rebuild each weight to about 1e-6 of its norm, and a model stacks a dozen of them."""

EXECUTORS = 1e-5
"""The same graph on two executors: float32 sums in another order, a few hundred terms of rounding 6e-8 each."""


def rewritten(graph: Graph, rule: dict[str, Any]) -> Compilation:
    spec = load_spec({"version": 1, "name": "zoo", "rules": [{"name": "all", **rule}]})
    return compile_graph(graph, spec, {name: method() for name, method in method_table().items()}, "zoo")


def evaluated(graph: Graph, inputs: Any) -> list[np.ndarray]:
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    with torch.no_grad():
        results = evaluate(graph, bind(graph, args, kwargs))
    return [result.numpy() for result in results if isinstance(result, torch.Tensor)]


VARIANTS = (
    "gpt2-eager",
    "llama-eager",
    "vit-eager",
    "bert-eager",
    "clip",
    "t5-eager",
    "t5-gated",
    "bert-classifier",
    "roberta-masked",
    "deberta-apart",
    "mha-weights",
    "roberta",
    "distilbert",
    "opt",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma3",
    "albert",
    "deberta",
    "bart",
    "whisper",
)
"""Models whose like is tested without them (vit stands for clip, llama for mistral, t5 for bart, bert for its eager form): sites and roles
always, parity in the full grid."""

ENTRIES = [pytest.param(entry, id=name, marks=pytest.mark.full if name in VARIANTS else ()) for name, entry in ZOO.items()]


@pytest.mark.parametrize("entry", ENTRIES)
def test_rewritten_models_agree(entry: Entry, tmp_path: Path) -> None:
    module, inputs, axes = entry.build()
    graph = trace(module, inputs, axes)
    full, half = rewritten(graph, FULL_RANK), rewritten(graph, HALF)
    assert {row.status for row in full.report.sites if row.form != "embedding" and row.form not in LISTED} == {"rewritten"}
    assert "rewritten" in {row.status for row in half.report.sites}
    runs = {}
    for name, compilation in (("full", full), ("half", half)):
        (tmp_path / name).mkdir()
        export_onnx(compilation.graph, tmp_path / name, Export())
        runs[name] = [session(tmp_path / name / "model.onnx", level) for level in ("plain", "optimised")]
    for example in entry.more_inputs():
        original = answers(module, example)
        for name, compilation in (("full", full), ("half", half)):
            by_torch = evaluated(compilation.graph, example)
            for run in runs[name]:
                assert difference(run.run(None, feeds(run, example)), by_torch) <= EXECUTORS
            if name == "full":
                assert difference(by_torch, original) <= ORIGINAL


@pytest.mark.parametrize("name", ["bert", "gpt2", *(pytest.param(name, marks=pytest.mark.full) for name in ("mixtral", "clip"))])
def test_the_torch_module_agrees_too(name: str) -> None:
    entry = ZOO[name]
    module, inputs, axes = entry.build()
    compiled = to_torch(rewritten(trace(module, inputs, axes), FULL_RANK).graph)
    for example in entry.more_inputs():
        with torch.no_grad():
            got = [leaf.numpy() for leaf in tree_leaves(compiled(**example)) if isinstance(leaf, torch.Tensor)]
        assert difference(got, answers(module, example)) <= ORIGINAL
