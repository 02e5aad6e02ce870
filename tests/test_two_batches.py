"""A model of two batches (images and texts, as CLIP): labels lie along one. What torch raises on calibration data is an InputError."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import matmorph as mm
from matmorph.errors import InputError
from matmorph.ir.sites.matmuls import find_sites
from matmorph.passes.statistics.taylor import taylor
from matmorph.specs.schema import MethodUse, Train


class Pairs(nn.Module):
    """Logits [images, texts]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.texts = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        self.images = nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 8))

    def forward(self, texts: Tensor, images: Tensor) -> dict[str, Tensor]:
        return {"logits": self.images(images) @ self.texts(texts).T}


def batches(number: int, texts: int = 3, images: int = 5) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [
        {
            "texts": torch.randn(texts, 8, generator=g),
            "images": torch.randn(images, 6, generator=g),
            "labels": torch.randint(0, texts, (images,), generator=g),
        }
        for _ in range(number)
    ]


INPUTS = {name: value for name, value in batches(1)[0].items() if name != "labels"}
AXES = {"texts": {0: "texts"}, "images": {0: "images"}}
TAYLOR: dict[str, Any] = {"transact": {"width": "50%", "score": "taylor"}}
SPEC = {"version": 1, "rules": [{"match": {"block": "mlp"}, "rewrite": TAYLOR}], "train": {"loss": "cross_entropy", "output": "logits"}}


def test_scores_are_those_of_all_labels() -> None:
    """Oracle: autograd through the module, the loss summed over the images."""
    model, data = Pairs(), batches(4)
    graph = mm.trace(model, INPUTS, AXES)
    sites = {site.path: site for site in find_sites(graph)}
    train = Train("cross_entropy", "logits")
    found = taylor(graph, [sites["images.2"], sites["texts.2"]], data, 10**6, train, MethodUse("transact", None, None))
    for side in ("images", "texts"):
        expected = torch.zeros(32, dtype=torch.float64)
        for batch in data:
            hidden = getattr(model, side)[1](getattr(model, side)[0](batch[side])).detach().requires_grad_()
            other = "texts" if side == "images" else "images"
            features = {side: getattr(model, side)[2](hidden), other: getattr(model, other)(batch[other])}
            nn.functional.cross_entropy(features["images"] @ features["texts"].T, batch["labels"], reduction="sum").backward()
            expected += (hidden * hidden.grad).detach().double().abs().sum(0)
        torch.testing.assert_close(found[sites[f"{side}.2"]][0], expected, rtol=1e-4, atol=1e-6)  # float32 of another order


def test_it_compiles() -> None:
    compiled = mm.compile(Pairs(), SPEC, INPUTS, AXES, calibration=batches(6))
    assert [row.parameters for row in compiled.report.sites if row.path.endswith(".2")] == [(256, 128)] * 2


def test_a_class_that_a_cut_batch_lacks_is_no_bare_error() -> None:
    """16 samples of three texts end within the sixth batch: of its texts one is left, and labels name three."""
    data = batches(6)
    data[5]["labels"][:] = 2
    with pytest.raises(InputError, match=r"calibration batch 6: the model fails on it: Target 2 is out of bounds|calibration batch 6: .*2"):
        mm.compile(Pairs(), {**SPEC, "calibration": {"samples": 16}}, INPUTS, AXES, calibration=data)


def test_a_token_outside_of_the_vocabulary() -> None:
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 4))
    spec = {"version": 1, "rules": [{"match": {"op": "linear"}, "rewrite": {"low_rank": {"rank": 1, "whiten": True}}}]}
    data = [(torch.tensor([[1, 2]]),), (torch.tensor([[1, 7]]),)]
    with pytest.raises(InputError, match="calibration batch 2: the model fails on it: index out of range"):
        mm.compile(model, spec, (torch.randint(0, 7, (2, 2)),), ({0: "batch"},), calibration=data)
