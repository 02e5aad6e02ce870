"""What the tests of training graphs share: models made of one line, torch's own gradients in float64, and runs of a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exporting import session
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from matmorph.exporters.onnx.onnx_model import export_onnx
from matmorph.ir.core import Const, Graph
from matmorph.ir.evaluate import evaluate
from matmorph.ir.tracing.trace import trace
from matmorph.ir.training.gradient import gradient_graph
from matmorph.ir.training.losses import Loss, label_inputs
from matmorph.runtime.format.artifact import MODEL
from matmorph.specs.schema import Export

EXACT = 1e-10
"""Of the largest gradient, in float64: sums of at most 1e4 terms, each rounded to 1e-16, through some tens of operators."""

SINGLE = 5e-6
"""Of the largest gradient, in float32 on ONNX Runtime: 80 roundings of 6e-8."""

WIDTH = 6
AXES = ({0: "batch", 1: {"name": "seq", "min": 3}},)


class Op(nn.Module):
    """`f(x, *parameters)` with x [batch, seq, 6]; parameters are drawn once, away from 0 and of both signs."""

    def __init__(self, f: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.f = f
        g = torch.Generator().manual_seed(5)
        drawn = [torch.randn(shape, generator=g) for shape in shapes]
        self.p = nn.ParameterList([nn.Parameter(0.8 * x + 0.2 * x.sign()) for x in drawn])

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x, *self.p)


def x_of(batch: int, seq: int) -> Tensor:
    return torch.randn(batch, seq, WIDTH, generator=torch.Generator().manual_seed(10 * batch + seq))


def double(inputs: Any) -> Any:
    """Floating-point tensors of a dict or tuple in float64."""

    def widen(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    return {name: widen(x) for name, x in inputs.items()} if isinstance(inputs, dict) else tuple(map(widen, inputs))


def parameters_of(graph: Graph, keep: Callable[[str], bool] = lambda path: True) -> list[Const]:
    """The parameters that the graph reads, by path."""
    return [const for const in graph.used_state() if const.kind == "parameter" and keep(const.path)]


def flat(consts: Sequence[Const]) -> Tensor:
    return torch.cat([const.load().detach().reshape(-1) for const in consts])


def ordered(graph: Graph, inputs: Any) -> list[Tensor]:
    """Inputs in the order of the graph."""
    return [inputs[entry.name] for entry in graph.signature.inputs if entry.value is not None] if isinstance(inputs, dict) else list(inputs)


def labels_for(loss: Loss, graph: Graph, inputs: Sequence[Tensor], classes: int = 3) -> dict[str, Tensor]:
    """Random labels of the right kind; about one in five is ignored where labels are classes."""
    pairs = [pair for value, x in zip(graph.inputs, inputs, strict=True) for pair in zip(value.tensor.shape, x.shape, strict=True)]
    sizes = {dim: size for dim, size in pairs if not isinstance(dim, int)}
    g = torch.Generator().manual_seed(7)
    found = {}
    for name, kind in label_inputs(loss, graph):
        shape = [dim if isinstance(dim, int) else int(dim.subs(sizes)) for dim in kind.shape]
        if kind.dtype == "int64":
            drawn = torch.randint(0, classes, shape, generator=g)
            drawn.view(-1)[1::5] = loss.ignore_index
            found[name] = drawn
        else:
            found[name] = torch.randn(shape, generator=g, dtype=kind.torch_dtype)
    return found


def torch_loss(name: str, output: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """The losses in torch's own words."""
    functional = nn.functional
    if name == "causal_lm":
        output, labels = output[:, :-1], labels[:, 1:]
    if name in ("causal_lm", "cross_entropy"):
        return functional.cross_entropy(output.reshape(-1, output.shape[-1]), labels.reshape(-1), ignore_index=ignore_index)
    if name == "mse":
        return functional.mse_loss(output, labels)
    return (1 - functional.cosine_similarity(output, labels, dim=-1)).mean()


def autograd(module: nn.Module, inputs: Any, loss: Loss, labels: Mapping[str, Tensor], consts: Sequence[Const]) -> tuple[float, Tensor]:
    """(loss, flat gradient) by torch.autograd; zeros for what the loss does not reach."""
    answer = module(**inputs) if isinstance(inputs, dict) else module(*inputs)
    output = answer if isinstance(answer, Tensor) else answer[loss.output] if loss.output else tree_leaves(answer)[0]
    value = torch_loss(loss.name, output, labels["labels"], loss.ignore_index)
    named = dict(module.named_parameters(remove_duplicate=False))
    parameters = [named[const.path].requires_grad_() for const in consts]
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    pairs = zip(parameters, found, strict=True)
    return float(value.detach()), torch.cat([(torch.zeros_like(p) if gradient is None else gradient).reshape(-1) for p, gradient in pairs])


def evaluated(graph: Graph, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs by name of a graph on inputs by name."""
    with torch.no_grad():
        results = evaluate(graph, [named[entry.name] for entry in graph.signature.inputs if entry.value is not None])
    return dict(zip(graph.signature.outputs, results, strict=True))


def feeds_of(
    graph: Graph, consts: Sequence[Const], inputs: Sequence[Tensor], labels: Mapping[str, Tensor], scale: float = 1.0
) -> dict[str, Tensor]:
    """Inputs by name of a gradient graph."""
    names = [entry.name for entry in graph.signature.inputs if entry.value is not None]
    theta = flat(consts)
    return {"theta": theta, **dict(zip(names, inputs, strict=True)), **labels, "loss_scale": torch.tensor(scale, dtype=theta.dtype)}


def check(module: nn.Module, samples: Sequence[Any], axes: Any, loss: Loss, keep: Callable[[str], bool] = lambda path: True) -> Graph:
    """The gradient graph of a module in float64, held against torch.autograd on each sample; the first is traced."""
    module = module.double().eval()
    samples = [double(sample) for sample in samples]
    graph = trace(module, samples[0], axes)
    consts = parameters_of(graph, keep)
    found = gradient_graph(graph, consts, loss)
    for sample in samples:
        inputs = ordered(graph, sample)
        labels = labels_for(loss, graph, inputs)
        results = evaluated(found, feeds_of(graph, consts, inputs, labels))
        value, gradient = autograd(module, sample, loss, labels, consts)
        assert abs(float(results["loss"]) - value) <= EXACT * max(1.0, abs(value))
        assert distance(results["grad"], gradient) <= EXACT
    return found


def check_onnx(
    module: nn.Module, samples: Sequence[Any], axes: Any, loss: Loss, folder: Path, keep: Callable[[str], bool] = lambda path: True
) -> None:
    """The float32 gradient graph in ONNX Runtime, at both ends of its optimiser, held against torch.autograd in float64."""
    graph = trace(module.float().eval(), samples[0], axes)
    consts = parameters_of(graph, keep)
    export_onnx(gradient_graph(graph, consts, loss), folder, Export())
    single = [feeds_of(graph, consts, ordered(graph, sample), labels_for(loss, graph, ordered(graph, sample))) for sample in samples]
    answers = {level: [run(folder, feeds, level) for feeds in single] for level in ("plain", "optimised")}
    module = module.double()
    for number, sample in enumerate(samples):
        labels = {entry: x.double() if x.is_floating_point() else x for entry, x in single[number].items()}
        value, gradient = autograd(module, double(sample), loss, labels, consts)
        for results in answers.values():
            assert abs(float(results[number]["loss"]) - value) <= SINGLE * max(1.0, abs(value))
            assert distance(torch.from_numpy(results[number]["grad"]), gradient) <= SINGLE


def run(folder: Path, feeds: Mapping[str, Tensor], level: str = "optimised") -> dict[str, np.ndarray]:
    running = session(folder / MODEL, level)
    names = [entry.name for entry in running.get_outputs()]
    given = {entry.name: feeds[entry.name].numpy() for entry in running.get_inputs()}
    return dict(zip(names, running.run(None, given), strict=True))


def distance(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected|; NaN counts as infinite."""
    assert actual.shape == expected.shape
    found = float((actual.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    return found if found == found else float("inf")
