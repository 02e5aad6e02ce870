"""fp16 and bf16 exports of the library specs: CUDA has a kernel for each node, by the list and by what the provider itself says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cuda_stand_in as stand_in
import onnx
import pytest
import torch
from exporting import seeded
from test_placement import assert_placed
from torch import nn
from zoo import ZOO

import matmorph as mm
from matmorph.exporters.onnx.onnx_model import export_onnx, skeleton
from matmorph.exporters.onnx.placement import placements
from matmorph.ir.core import Graph
from matmorph.passes.adapters.inference import inference_graph
from matmorph.passes.methods import all_methods
from matmorph.passes.pipeline import compile_graph
from matmorph.runtime.format.artifact import MODEL
from matmorph.runtime.targets.placement import Placement
from matmorph.specs.load import library_names
from matmorph.specs.schema import Export

VOCAB, BATCH, SEQ = 97, 2, 7
LLAMAS = {  # width, heads, kv heads: what the paper's shapes fit
    "tt-lora-llama2-7b": (4096, 32, 32),
    "tt-lora-llama3.1-70b": (8192, 64, 8),
    "tt-lora-llama3.1-8b": (4096, 32, 8),
    "tt-lora-llama3.2-1b": (2048, 32, 8),
    "tt-lora-llama3.2-3b": (3072, 24, 8),
}
SAMPLE = ("low-rank-60", "loftq-nf4")
HALVES = ("fp16", "bf16")


def bert(width: int, layers: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=width, intermediate_size=2 * width, num_attention_heads=4, num_hidden_layers=layers, vocab_size=VOCAB
    )
    module: nn.Module = seeded(lambda: transformers.BertForSequenceClassification(config))
    return module


def llama(width: int, heads: int, pairs: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=64, num_attention_heads=heads, num_key_value_heads=pairs, num_hidden_layers=1, vocab_size=VOCAB
    )
    module: nn.Module = seeded(lambda: transformers.LlamaForCausalLM(config))
    return module


def batches(count: int) -> Iterator[dict[str, torch.Tensor]]:
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        yield {"input_ids": torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator), "labels": torch.arange(BATCH) % 2}


def traced(module: nn.Module) -> Graph:
    return mm.trace(module, {"input_ids": next(batches(1))["input_ids"]}, {"input_ids": {0: "batch", 1: "seq"}})


@pytest.fixture(scope="module")
def small() -> Graph:
    return traced(bert(128, 2))


def compiled(graph: Graph, name: str) -> tuple[Graph, Any]:
    """(the graph that would be exported, the spec)."""
    spec = mm.load_spec(name)
    done = compile_graph(graph, spec, all_methods(), "model", calibration=list(batches(30)))
    assert any(row.status == "rewritten" for row in done.report.sites)
    return inference_graph(done.graph, all_methods()), spec


def placed(graph: Graph, spec: Any, precision: str) -> Placement:
    export = replace(spec.export, precision=precision, target=("cuda",))
    (found,) = placements(skeleton(graph, export), export.target, MODEL)
    return found


@pytest.mark.parametrize("name", SAMPLE)
def test_half_precision_of_a_library_spec_runs_on_cuda(small: Graph, name: str, tmp_path: Path) -> None:
    graph, spec = compiled(small, name)
    files = []
    for precision in HALVES:
        (tmp_path / precision).mkdir()
        found = export_onnx(graph, tmp_path / precision, replace(spec.export, precision=precision, target=("cuda",))).placements
        assert [(one.handed, one.unknown) for one in found] == [((), ())]
        files.append(tmp_path / precision / MODEL)
    if stand_in.obstacle() is None:
        asked = stand_in.placed(stand_in.build(tmp_path), files)
        assert [(one.without, one.declined, one.error) for one in asked] == [(frozenset(), frozenset(), "")] * len(HALVES)


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ZOO)
def test_every_architecture_is_placed_as_the_provider_says(name: str, precision: str, tmp_path: Path) -> None:
    if (why := stand_in.obstacle()) is not None:
        pytest.skip(why)
    module, inputs, axes = ZOO[name].build()
    export_onnx(mm.trace(module, inputs, axes), tmp_path, Export(precision=precision, target=("cuda",)))
    (found,) = stand_in.placed(stand_in.build(tmp_path), [tmp_path / MODEL])
    assert_placed(onnx.load(tmp_path / MODEL, load_external_data=False), found)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in library_names() if name not in SAMPLE])
def test_half_precision_of_every_library_spec_runs_on_cuda(small: Graph, name: str) -> None:
    own = traced(llama(*LLAMAS[name])) if name in LLAMAS else traced(bert(768, 1)) if name == "tt-lora-roberta" else small
    graph, spec = compiled(own, name)
    for precision in HALVES:
        found = placed(graph, spec, precision)
        assert (found.handed, found.unknown) == ((), ())
