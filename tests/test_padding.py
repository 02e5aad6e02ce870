"""Padding on either side and rows of padding alone: attention has rows without any key then. At sizes that the trace did not see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from exporting import answers, difference, feeds, randn, session
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from zoo import ZOO

import matmorph as mm
from matmorph.exporters.onnx.onnx_model import export_onnx
from matmorph.exporters.vectors import check_vectors
from matmorph.ir.sites.attention_masks import attention_masks
from matmorph.ir.tracing.trace import trace
from matmorph.runtime.check import check
from matmorph.specs.schema import Export

PARITY = 1e-4
"""The tolerance of an artefact; a row without keys that is taken for one with all of them differs by 0.1 and more."""

VARIANTS = ("llama-eager", "gpt2", "opt", "t5", "bart", "mistral")
MODELS = [("llama", 21), ("bert", 21)]
FULL = [*((name, 21) for name in VARIANTS), *((name, opset) for name in ("llama", "bert") for opset in (18, 23))]


def padded(batch: int, seq: int, side: str) -> Tensor:
    """Rows with 0, 1, 2 ... places of padding; `whole`: the last row is nothing but padding."""
    mask = torch.ones(batch, seq, dtype=torch.int64)
    for row in range(batch):
        mask[row, slice(0, row) if side == "left" else slice(seq - row, seq)] = 0
    if side == "whole":
        mask[-1] = 0
    return mask


@pytest.mark.parametrize(("name", "opset"), [*MODELS, *(pytest.param(*one, marks=pytest.mark.full) for one in FULL)])
def test_a_padded_batch(name: str, opset: int, tmp_path: Path) -> None:
    entry = ZOO[name]
    module, inputs, axes = entry.build()
    assert isinstance(inputs, dict)
    graph = trace(module, inputs, axes)
    export_onnx(graph, tmp_path, Export(opset=opset))
    running = session(tmp_path / "model.onnx")
    for example in entry.more_inputs():
        assert isinstance(example, dict)
        for side in ("left", "right", "whole"):
            batch = {**example, "attention_mask": padded(*example["attention_mask"].shape, side)}
            assert difference(running.run(None, feeds(running, batch)), answers(module, batch)) <= PARITY


class Attends(nn.Module):
    """`seen`, `bias` and `count` reach a mask; `ids` and `times` do not, though they are integers of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)

    def forward(self, ids: Tensor, seen: Tensor, times: Tensor, bias: Tensor, blocks: Tensor) -> tuple[Tensor, ...]:
        x = self.table(ids) * times.unsqueeze(-1)
        first = sdpa(x, x, x, attn_mask=(seen.unsqueeze(1) > 0).expand(-1, x.shape[1], -1))
        scores = first @ first.mT + bias
        same = blocks.unsqueeze(1) == blocks.unsqueeze(2)
        return torch.softmax(scores.masked_fill(~same, -1e9), -1) @ x, times.sum(-1)


def attends() -> tuple[nn.Module, tuple[Tensor, ...]]:
    ids = torch.arange(18).reshape(3, 6) % 9
    blocks = torch.tensor([[1, 1, 1, 2, 2, 2]] * 3)
    return Attends().eval(), (ids, torch.ones_like(ids), torch.ones_like(ids), randn(3, 6, 6), blocks)


def test_masks_are_found_by_what_they_do() -> None:
    module, inputs = attends()
    graph = trace(module, inputs)
    assert [value.name for value in attention_masks(graph)] == ["seen", "blocks"]


def test_check_vectors_pad_masks_and_nothing_else() -> None:
    """Not `times`, which is no mask, and not `blocks`, which are no zeros and ones."""
    module, inputs = attends()
    found = check_vectors(trace(module, inputs), list(inputs))
    assert len(found.cases) == 2
    plain, padding = (case.inputs for case in found.cases)
    np.testing.assert_array_equal(padding["seen"], [[0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]])
    assert all(np.array_equal(plain[name], padding[name]) for name in plain if name != "seen")
    expected = module(*(torch.from_numpy(padding[name]) for name in ("ids", "seen", "times", "bias", "blocks")))
    np.testing.assert_array_equal(found.cases[1].outputs["output_0"], expected[0].detach().numpy())  # the same kernels on the same numbers


class Hides(nn.Module):
    """A boolean mask that is True where nothing is seen, as nn.MultiheadAttention takes it; without any key its softmax is NaN."""

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        scores = (x @ x.mT).masked_fill(hidden.unsqueeze(1), -torch.inf)
        return torch.softmax(scores, -1) @ x


def test_a_mask_may_be_the_other_way_round() -> None:
    x, hidden = randn(1, 5, 4), torch.zeros(1, 5, dtype=torch.bool)
    found = check_vectors(trace(Hides(), (x, hidden)), [x, hidden])
    assert [case.inputs["hidden"].astype(int).tolist() for case in found.cases[1:]] == [[[1, 1, 0, 0, 0]], [[0, 0, 0, 1, 1]]]


def test_padding_at_which_the_model_itself_fails_is_noted() -> None:
    class Causal(nn.Module):
        def forward(self, x: Tensor, seen: Tensor) -> Tensor:
            visible = seen.bool().unsqueeze(1) & torch.ones(5, 5).tril().bool()
            return torch.softmax((x @ x.mT).masked_fill(~visible, -torch.inf), -1) @ x

    x, seen = randn(2, 5, 4), torch.ones(2, 5, dtype=torch.int64)
    found = check_vectors(trace(Causal(), (x, seen)), [x, seen])
    assert len(found.cases) == 1
    assert found.notes == ("not checked with padding: the model itself answers NaN or infinity there",)


@pytest.mark.full
def test_training_is_checked_on_padding_too(tmp_path: Path) -> None:
    """The gradient graph of a left-padded Llama, whose first rows see no key, against torch's autograd, which the check vectors hold."""
    module, inputs, axes = ZOO["llama"].build()
    assert isinstance(inputs, dict)
    rule = {"name": "v", "match": {"role": "attention.v"}, "rewrite": {"lora": {"rank": 2, "alpha": 2}}}
    spec = {"version": 1, "name": "padded", "rules": [rule], "train": {"loss": "cross_entropy"}}
    folder = mm.compile(module, spec, inputs, dynamic_shapes=axes).save(tmp_path / "out")
    result = check(folder)
    assert result.ok, result.problems
    assert any(line.startswith("training: 4 cases") for line in result.lines)
