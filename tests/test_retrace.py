"""A compiled module that is compiled again: its own graph with the weights that it holds, axes and paths as they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pruning import spec_of
from torch import nn
from zoo import ZOO

import matmorph as mm
from matmorph.errors import InputError

X = torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(0))
AXES = ({0: "batch", 1: "seq"},)


class Doubled(nn.Module):
    """Keyword arguments, and two inputs of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + self.down(torch.relu(self.up(b)))


def half(model: nn.Module, width: str = "50%") -> mm.Compiled:
    return mm.compile(model, spec_of("mlp", width=width, multiple_of=2), (X,), AXES, calibration=[(X,)])


def test_it_is_pruned_again() -> None:
    first = half(ZOO["transformer-encoder"].build()[0])
    second = half(first.module)
    widths = [next(row.rank for row in one.report.sites if row.rank) for one in (first, second)]
    assert widths == [22, 12]  # of 44; 11 is odd
    rows = [(row.path, row.layer, row.role) for row in first.report.sites]
    assert [(row.path, row.layer, row.role) for row in second.report.sites] == rows, "scopes and layers are those of the first trace"
    assert second.module(X[:1, :3]).shape == (1, 3, 32)


def test_it_is_what_the_module_holds_now() -> None:
    first = half(ZOO["transformer-encoder"].build()[0])
    with torch.no_grad():
        for parameter in first.module.parameters():
            parameter += 0.1
    again = mm.compile(first.module, spec_of("mlp", width=2, multiple_of=2, score="weight", compensate="none"), (X,), AXES)
    unchanged = mm.trace(first.module, (X,), AXES)
    for const in unchanged.state:
        assert torch.equal(const.load(), first.module.state_dict()[const.path])
    assert torch.equal(again.source.state[0].load(), first.module.state_dict()[again.source.state[0].path])


def test_trained_values_go_into_the_next_one() -> None:
    first = half(ZOO["transformer-encoder"].build()[0])
    values = {name: value.detach().numpy() + np.float32(0.25) for name, value in first.module.named_parameters()}
    loaded = first.load_trained(values).module
    for const in mm.trace(loaded, (X,), AXES).state:
        if const.path in values:
            np.testing.assert_array_equal(const.load().numpy(), values[const.path])


def test_keyword_arguments_and_equal_examples() -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    inputs, axes = {"a": x, "b": x}, {"a": {0: "rows"}, "b": {0: "rows"}}
    first = mm.compile(Doubled().eval(), spec_of("mlp", width="50%"), inputs, axes, calibration=[inputs])
    graph = mm.trace(first.module, {"b": x, "a": x}, {"b": {0: {"name": "rows", "max": 9}}})
    assert (graph.ranges["rows"].low, graph.ranges["rows"].high) == (1, 9)
    assert mm.trace(first.module, None).ranges == first.graph.ranges


def test_what_does_not_fit() -> None:
    module = half(ZOO["transformer-encoder"].build()[0]).module
    with pytest.raises(InputError, match="axis 1 of 0 was seq when this compiled model was traced; it cannot become length"):
        mm.trace(module, (X,), ({0: "batch", 1: "length"},))
    with pytest.raises(InputError, match="axis 2 of 0 was 32 when this compiled model was traced; it cannot become width"):
        mm.trace(module, (X,), ({2: "width"},))
    with pytest.raises(InputError, match="0 positional arguments given, but the model was traced with 1 positional arguments"):
        mm.trace(module, {"src": X})
    with pytest.raises(InputError, match=r"the compiled module was made for .* as float32 on cpu, it is float64 on cpu now: move it back"):
        mm.trace(module.double(), (X,), AXES)
