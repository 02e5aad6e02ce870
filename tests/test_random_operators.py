"""Operators that draw random numbers are named where a file is to be written; what only looks like one is not. Oracle: two runs differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

import matmorph as mm
from matmorph.errors import ExportError, TraceError
from matmorph.ir.randomness import drawing

SPEC = {"version": 1, "rules": [{"match": {"op": "linear"}, "rewrite": "keep"}]}


class Net(nn.Module):
    def __init__(self, tail: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 4))
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.inner(x))


DRAW: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.5, training=True),
    "randn_like": lambda x: x + torch.randn_like(x),
    "rand": lambda x: x + torch.rand(4),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
    "rrelu": lambda x: F.rrelu(x, training=True),
}
CALM: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout in inference": lambda x: F.dropout(x, 0.5, training=False),
    "dropout of nothing": lambda x: F.dropout(x, 0.0, training=True),
    "attention": lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], dropout_p=0.0)[0, 0],
    "rrelu in inference": lambda x: F.rrelu(x, training=False),
}


def compiled(tail: Callable[[Tensor], Tensor]) -> mm.Compiled:
    return mm.compile(Net(tail), SPEC, (torch.randn(3, 8),), ({0: "batch"},))


@pytest.mark.parametrize("name", DRAW)
def test_the_operator_is_named(name: str, tmp_path: Path) -> None:
    found = compiled(DRAW[name])
    x = torch.randn(3, 8)
    assert not torch.equal(found(x), found(x))
    wanted = rf"the model draws random numbers when it runs \(aten\.\w*{name}\.\w+ in the model itself\)"
    with pytest.raises(ExportError, match=wanted) as caught:
        found.save(tmp_path / "out")
    assert "take noise as an input" in caught.value.details[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", CALM)
def test_what_draws_nothing_is_none(name: str) -> None:
    found = compiled(CALM[name])
    x = torch.randn(3, 8)
    assert torch.equal(found(x), found(x))
    assert list(drawing(mm.trace(Net(CALM[name]), (x,), ({0: "batch"},)))) == []


def test_a_mask_that_torch_compares_names_the_argument() -> None:
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 1)
    inputs = {"tgt": torch.randn(2, 3, 8), "memory": torch.randn(2, 4, 8), "tgt_mask": nn.Transformer.generate_square_subsequent_mask(3)}
    axes = {"tgt": {0: "batch"}, "memory": {0: "batch"}, "tgt_mask": None}
    with pytest.raises(TraceError) as caught:
        mm.trace(model, inputs, axes)
    assert "tgt_is_causal (memory_is_causal) of a TransformerDecoder" in caught.value.details[-1]
    mm.trace(model, {**inputs, "tgt_is_causal": True}, {**axes, "tgt_is_causal": None})
