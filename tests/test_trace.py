"""Tracing: what comes out, what the model is spared, and what a user is told when it cannot be done."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from matmorph.errors import InputError, TraceError
from matmorph.ir.core import Range
from matmorph.ir.evaluate import bind, evaluate
from matmorph.ir.tracing.trace import trace

NAMED = ({0: "batch"},)


class Net(nn.Module):
    """Kwargs, a literal input, tied weights, a hidden buffer, nested outputs, an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.embed.weight
        self.spare = nn.Linear(3, 3)
        self.register_buffer("shift", torch.arange(6.0), persistent=False)

    def forward(self, ids: torch.Tensor, scale: torch.Tensor | None = None, flag: bool = True) -> dict[str, object]:
        hidden = self.norm(self.embed(ids) + self.shift)
        first, second = hidden.split(3, dim=-1)
        return {"logits": self.head(hidden), "parts": (first if flag else second, None)}


def ids(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % 13


def test_graph_of_a_small_net() -> None:
    net = Net()
    graph = trace(net, {"ids": ids(2, 5), "scale": None}, {"ids": {0: "batch", 1: "seq"}})
    assert [str(value.type) for value in graph.inputs] == ["int64[batch, seq]"]
    assert [entry.name for entry in graph.signature.inputs] == ["ids", "scale"]
    assert graph.signature.outputs == ("logits", "parts.0", "parts.1")
    assert graph.outputs[2] is None
    assert [const.names for const in graph.state][:2] == [("shift",), ("embed.weight", "head.weight")]
    assert {const.path for const in graph.used_state()} == {"embed.weight", "norm.weight", "norm.bias", "shift"}
    assert "spare.weight" in {const.path for const in graph.state}
    assert graph.ranges == {"batch": Range(1, None), "seq": Range(1, None)}
    split = next(node for node in graph.nodes if node.op.startswith("aten.split"))
    assert [str(value.type) for value in split.outputs] == ["float32[batch, seq, 3]"] * 2
    assert "getitem" not in {node.op for node in graph.nodes}


def test_evaluates_like_the_model_at_other_shapes() -> None:
    net = Net().eval()
    graph = trace(net, {"ids": ids(2, 5)}, {"ids": {0: "batch", 1: "seq"}})
    for shape in ((2, 5), (1, 1), (7, 3)):
        logits, part, _ = evaluate(graph, bind(graph, (), {"ids": ids(*shape)}))
        expected = net(ids(*shape))
        assert torch.equal(logits, expected["logits"])  # the same kernels on the same numbers: exact
        assert torch.equal(part, expected["parts"][0])


def test_train_mode_and_cache_are_restored_and_noted() -> None:
    class Config:
        use_cache = True

    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    net.config = Config()
    net[0].eval()
    graph = trace(net, (torch.ones(3, 4),), NAMED)
    assert [module.training for module in net.modules()] == [True, False, True]
    assert net.config.use_cache is True
    assert [note.split(" switched")[0] for note in graph.notes] == ["train mode", "config.use_cache"]
    assert all("native_dropout" not in node.op for node in graph.nodes)


def test_manners_are_kept_when_the_trace_fails() -> None:
    class Bad(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.sum() > 0 else x

    net = Bad(4, 4)
    with pytest.raises(TraceError) as error:
        trace(net, (torch.ones(3, 4),), NAMED)
    assert net.training
    assert "test_trace.py" in str(error.value)
    assert "x.sum() > 0" in str(error.value)
    assert "torch.where or torch.cond" in str(error.value)


def test_a_range_the_model_demands_is_adopted_and_noted() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(12, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.table[: x.shape[1]]

    graph = trace(Positions(), (torch.ones(2, 5, 4),), ({0: "batch", 1: "seq"},))
    assert graph.ranges["seq"] == Range(1, 12)
    assert "seq must be in 1..12: the model itself demands it" in graph.notes


def test_given_limits_are_kept() -> None:
    graph = trace(nn.Linear(4, 4), (torch.ones(3, 4),), ({0: {"name": "batch", "min": 2, "max": 64}},))
    assert graph.ranges == {"batch": Range(2, 64)}
    with pytest.raises(InputError, match=r"batch must be in 2\.\.64, got 65"):
        bind(graph, (torch.ones(65, 4),), {})


def test_one_name_is_one_symbol() -> None:
    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + b

    graph = trace(Two(), (torch.ones(3, 4), torch.ones(3, 4)), ({0: "batch"}, {0: "batch"}))
    assert graph.symbols() == ("batch",)


def test_graph_module_and_exported_program() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    symbolic = trace(torch.fx.symbolic_trace(net), (x,), NAMED)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},), strict=False)
    exported = trace(program, None, NAMED)
    for graph in (symbolic, exported):
        assert [str(value.type) for value in graph.inputs] == ["float32[batch, 4]"]
        assert [const.path for const in graph.state] == ["0.weight", "0.bias", "2.weight", "2.bias"]
        assert torch.equal(evaluate(graph, [x])[0], net(x))  # the same kernels on the same numbers: exact


def test_meta_model_keeps_its_device() -> None:
    with torch.device("meta"):
        net = nn.Linear(4, 8)
    graph = trace(net, (torch.ones(3, 4),), NAMED)
    assert graph.device == "meta"
    assert graph.state[0].load().is_meta


def test_conditional_holds_sub_graphs() -> None:
    class Cond(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda a: a + 1, lambda a: a * 2, (x,))

    graph = trace(Cond(), (torch.ones(3, 4),), NAMED)
    for x in (torch.ones(2, 4), -torch.ones(5, 4)):
        assert torch.equal(evaluate(graph, [x])[0], Cond()(x))  # one addition or product: exact


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        return x + self.count


class Fixed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(3, 4) + 1


class Pairs(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, 2, 4)


class ByValue(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x > 0]


@pytest.mark.parametrize(
    ("model", "inputs", "axes", "message"),
    [
        (Writes(), (torch.ones(3, 4),), NAMED, r"writes to its buffer count in forward"),
        (Fixed(), (torch.ones(3, 4),), NAMED, r"works only with batch = 3|fixes that axis"),
        (Pairs(), (torch.ones(6, 4),), NAMED, r"needs batch to be a multiple of 2"),
        (ByValue(), (torch.ones(3, 4),), NAMED, r"depends on the values of a tensor"),
        (nn.Linear(5, 4), (torch.ones(3, 4),), NAMED, r"cannot be traced: .*"),
    ],
)
def test_untraceable_models(model: nn.Module, inputs: object, axes: object, message: str) -> None:
    with pytest.raises(TraceError, match=message) as error:
        trace(model, inputs, axes)
    assert error.value.exit_code == 2
    assert error.value.details


@pytest.mark.parametrize(
    ("inputs", "axes", "message"),
    [
        ((torch.ones(3, 4), torch.ones(1)), None, "do not fit the model"),
        ({"input": torch.ones(3, 4)}, {"imput": {0: "batch"}}, "did you mean input?"),
        ({"inptu": torch.ones(3, 4)}, None, "do not fit the model"),
        ("text", None, "must be a dict .* or a tuple"),
        ({}, None, "non-empty"),
        ((torch.ones(1, 4),), NAMED, "size 1 on the dynamic axis batch"),
        ((torch.ones(3, 4),), ({2: "batch"},), r"names axis 2, but its example has 2 axes \(0 to 1\)"),
        ((torch.ones(3, 4),), ({0: 7.5},), "needs a name"),
        ((torch.ones(3, 4),), ({0: 7},), "is given as 7, but its example has 3"),
        ((torch.ones(3, 4),), ({0: {"name": "b", "max": 1}},), "0 <= min < max"),
        ((torch.ones(3, 4),), ({0: "batch", 1: "batch"},), "disagree on batch: 3 at axis 0 of 0, 4 at axis 1 of 0"),
        ((torch.ones(3, 4),), {"inputs": {0: "batch"}}, r"no example input \(input\); did you mean input"),
        ((torch.ones(3, 4),), (NAMED[0], NAMED[0]), "must be a tuple of 1 dicts"),
    ],
)
def test_inputs_that_do_not_fit(inputs: object, axes: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        trace(nn.Linear(4, 4), inputs, axes)


def test_parameters_on_several_devices() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    with pytest.raises(InputError, match="on 2 devices") as error:
        trace(net, (torch.ones(3, 4),), NAMED)
    assert re.search(r"1\.weight is on meta", str(error.value))


def test_calls_unlike_the_example_are_refused() -> None:
    graph = trace(Net(), {"ids": ids(2, 5), "flag": False}, {"ids": {0: "batch", 1: "seq"}})
    for args, kwargs, message in (
        ((ids(2, 5),), {}, "traced with keyword arguments ids, flag"),
        ((), {"idz": ids(2, 5)}, "no input is named idz; .*did you mean ids?"),
        ((), {"flag": False}, "input ids is missing"),
        ((), {"ids": ids(2, 5), "flag": True}, "flag was traced as False"),
        ((), {"ids": ids(2, 5).float()}, r"must be int64\[batch, seq\], got float32\[2, 5\]"),
        ((), {"ids": ids(5)}, r"must be int64\[batch, seq\]"),
        ((), {"ids": 3}, r"must be a tensor int64\[batch, seq\], got int"),
        ((), {"ids": [1, 2]}, "nested differently"),
    ):
        with pytest.raises(InputError, match=message):
            bind(graph, args, kwargs)
