"""Architectures that ask for what the zoo does not: sizes that simplify only as polynomials (BLOOM), pooling after a permute (ConvNeXt,
Swin, SwinV2, and as torchvision writes their heads). Traced once, run at other sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import answers, difference, feeds, randn, seeded, session
from torch import Tensor, nn
from zoo import HIDDEN, LAYERS, TEXT_AXES, VOCAB, hugging_face, text

from matmorph.exporters.onnx.onnx_model import export_onnx
from matmorph.ir.tracing.trace import trace
from matmorph.ir.verify import verify
from matmorph.specs.schema import Export

PARITY = 1e-4
"""The tolerance of an artefact."""

SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "num_labels": 9}
CONVNEXT = {"hidden_sizes": [8, 12, 16], "depths": [1, 1, 1], "num_stages": 3, "image_size": 32, "num_labels": 9}
BLOOM = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "n_layer": LAYERS,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


class Classifier(nn.Module):
    """A head over [batch, height, width, channels] as torchvision's SwinTransformer has it: norm, permute, pool, flatten."""

    def __init__(self, pooled: int | tuple[int, int] = 1) -> None:
        super().__init__()
        self.features, self.norm, self.pool = nn.Linear(6, 8), nn.LayerNorm(8), nn.AdaptiveAvgPool2d(pooled)
        self.head = nn.LazyLinear(5)
        self.forward(randn(1, 4, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.features(x)).permute(0, 3, 1, 2)
        return self.head(torch.flatten(self.pool(x), 1))


class Lines(nn.Module):
    """Pooling of [batch, seq, channels], as the pooler of transformers' Swin has it."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool1d(x.transpose(1, 2), 1).flatten(1)


class Classes(nn.Module):
    def forward(self, weights: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.one_hot(labels, 5).float() @ weights


class Orthogonal(nn.Module):
    """torch's three orthogonal parametrisations: a matrix exponential, the Cayley map (a linear system), Householder reflections."""

    def __init__(self) -> None:
        super().__init__()
        maps = ("matrix_exp", "cayley", "householder")
        self.layers = nn.Sequential(*(nn.utils.parametrizations.orthogonal(nn.Linear(6, 6), orthogonal_map=map) for map in maps))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def pixels(batch: int) -> dict[str, Tensor]:
    return {"pixel_values": randn(batch, 3, 32, 32)}


IMAGES = ({"pixel_values": {0: "batch"}}, pixels(2), [pixels(1), pixels(3)])
TEXTS = (
    TEXT_AXES,
    text(3, 7, torch.Generator().manual_seed(1)),
    [text(b, s, torch.Generator().manual_seed(2)) for b, s in ((1, 5), (2, 12))],
)
MODELS: dict[str, tuple[Any, tuple[Any, Any, list[Any]]]] = {
    "bloom": (hugging_face("BloomForCausalLM", "BloomConfig", "eager", **BLOOM), TEXTS),
    "convnext": (hugging_face("ConvNextForImageClassification", "ConvNextConfig", "eager", **CONVNEXT), IMAGES),
    "swin": (hugging_face("SwinForImageClassification", "SwinConfig", "eager", **SWIN), IMAGES),
    "swinv2": (hugging_face("Swinv2ForImageClassification", "Swinv2Config", "eager", **SWIN), IMAGES),
    "head": (
        Classifier,
        (({0: "batch", 1: "height", 2: "width"},), (randn(2, 5, 7, 6),), [(randn(1, 4, 4, 6),), (randn(3, 9, 2, 6),)]),
    ),
    "head of parts": (lambda: Classifier((3, 2)), (({0: "batch"},), (randn(2, 5, 7, 6),), [(randn(3, 5, 7, 6),)])),
    "lines": (Lines, (({0: "batch", 1: "seq"},), (randn(2, 5, 6),), [(randn(1, 8, 6),)])),
    "orthogonal": (Orthogonal, (({0: "batch"},), (randn(3, 6),), [(randn(1, 6),), (randn(4, 6),)])),
    "classes": (
        Classes,
        (
            (None, {0: "batch", 1: "seq"}),
            (randn(5, 4), torch.tensor([[1, 2, 3], [0, 4, 2]])),
            [(randn(5, 4), torch.tensor([[1, 4, 0, 2]]))],
        ),
    ),
}
FULL = ("convnext", "swin", "swinv2")  # of which "head" and "lines" are the ends


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.full) if name in FULL else name for name in MODELS])
def test_parity_at_other_sizes(name: str, tmp_path: Path) -> None:
    factory, (axes, example, others) = MODELS[name]
    module = seeded(factory)
    graph = trace(module, example, axes)
    verify(graph)
    export_onnx(graph, tmp_path, Export())
    running = session(tmp_path / "model.onnx")
    for inputs in others:
        assert difference(running.run(None, feeds(running, inputs)), answers(module, inputs)) <= PARITY


class Passed(nn.Module):
    """Decompositions that give an operand back, or several results under names of their own."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (*torch.broadcast_tensors(x, y), torch.ops.aten.resolve_conj(x), *torch.ops.aten.aminmax(x, dim=1))


def test_results_of_decompositions_are_found_by_their_names(tmp_path: Path) -> None:
    inputs = (randn(3, 4), randn(1, 4))
    export_onnx(trace(Passed(), inputs), tmp_path, Export())
    running = session(tmp_path / "model.onnx")
    assert difference(running.run(None, feeds(running, inputs)), answers(Passed(), inputs)) == 0.0
