"""The compiled module: called and answering like the source, with its own weights, picklable, trainable; and the ExportedProgram form."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from zoo import ZOO

from matmorph.errors import InputError
from matmorph.ir.core import Graph
from matmorph.ir.evaluate import evaluate
from matmorph.ir.to_export import to_exported_program
from matmorph.ir.to_torch import CompiledModule, to_torch
from matmorph.ir.tracing.trace import trace


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.small = nn.Linear(4, 2)
        self.register_buffer("scale", torch.full((4,), 2.0))
        self.register_buffer("hidden", torch.ones(4), persistent=False)
        self.spare = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.second(torch.relu(self.first(x)) * self.scale + self.hidden)
        return h + torch.arange(4, device=x.device), self.small(h)


@dataclass(frozen=True)
class Case:
    source: Tied
    graph: Graph
    module: CompiledModule


@pytest.fixture
def tied() -> Case:
    source = Tied().eval()
    graph = trace(source, (random(3, 4),), ({0: "batch"},))
    return Case(source, graph, to_torch(graph))


def test_state_dict_has_the_keys_of_the_source(tied: Case) -> None:
    assert list(tied.module.state_dict()) == list(tied.source.state_dict())
    assert [name for name, _ in tied.module.named_parameters()] == [name for name, _ in tied.source.named_parameters()]
    tied.module.load_state_dict(tied.source.state_dict())
    assert tied.module.get_submodule("first").weight is tied.module.get_submodule("second").weight


def test_answers_like_the_source(tied: Case) -> None:
    for rows in (1, 3, 8):
        x = random(rows, 4, seed=rows)
        for got, expected in zip(tied.module(x), tied.source(x), strict=True):
            assert torch.equal(got, expected)  # the same kernels on the same numbers: exact


def test_training_it_leaves_the_source_alone(tied: Case) -> None:
    before = {name: tensor.clone() for name, tensor in tied.source.state_dict().items()}
    optimizer = torch.optim.SGD(tied.module.parameters(), lr=0.1)
    x, losses = random(8, 4), []
    for _ in range(5):
        optimizer.zero_grad()
        loss = sum(output.square().mean() for output in tied.module(x))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in tied.source.state_dict().items())


@pytest.mark.parametrize("copier", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_copies(tied: Case, copier: object) -> None:
    with torch.no_grad():
        tied.module.get_parameter("small.bias").add_(1)  # trained state travels, not the weights of compile time
    tied.module.get_parameter("first.bias").requires_grad_(False)
    twin = copier(tied.module)  # type: ignore[operator]
    x = random(5, 4)
    assert all(torch.equal(a, b) for a, b in zip(twin(x), tied.module(x), strict=True))
    assert list(twin.state_dict()) == list(tied.module.state_dict())
    assert twin.get_submodule("first").weight is twin.get_submodule("second").weight
    assert not twin.get_parameter("first.bias").requires_grad
    assert twin.get_parameter("small.bias").requires_grad
    assert not twin.training


def test_moves_to_another_device(tied: Case) -> None:
    # "meta" stands in for an accelerator: the literal device of `arange` must follow.
    assert tied.module.to("meta")(torch.empty(3, 4, device="meta"))[0].is_meta


def test_calls_unlike_the_example(tied: Case) -> None:
    with pytest.raises(InputError, match="axis 1 of input x must be 4, got 5"):
        tied.module(random(3, 5))
    with pytest.raises(InputError, match="traced with 1 positional arguments"):
        tied.module(x=random(3, 4))


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_model_outputs_keep_their_class(name: str) -> None:
    module, inputs, axes = ZOO[name].build()
    compiled = to_torch(trace(module, inputs, axes))
    module.eval()
    for example in ZOO[name].more_inputs():
        with torch.no_grad():
            got, expected = compiled(**example), module(**example)
        assert type(got) is type(expected)
        for key, value in expected.items():
            if isinstance(value, torch.Tensor):
                # the same kernels in the same order, but on views of other strides here and there: a few ulp
                torch.testing.assert_close(got[key], value, rtol=1e-6, atol=1e-6)


def test_exported_program_runs_like_the_graph(tied: Case) -> None:
    program = to_exported_program(tied.graph)
    assert list(program.state_dict) == ["scale", "first.weight", "first.bias", "second.bias", "small.weight", "small.bias"]
    assert all(isinstance(tensor, torch._subclasses.FakeTensor) for tensor in program.state_dict.values())
    weights = [const.load() for const in tied.graph.used_state()]
    x = random(5, 4)
    results = torch.fx.Interpreter(program.graph_module).run(*weights, x)
    for got, expected in zip(results, evaluate(tied.graph, [x]), strict=True):
        assert torch.equal(got, expected)  # the same kernels on the same numbers: exact
