"""What the tests of pruning share: an oracle that knows nothing of blocks.

Which features stayed is read off the pruned weights, by comparing their rows and columns with the source's; the original model then runs
with all other features set to zero by hooks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from zoo import ZOO, Inputs

import matmorph as mm
from matmorph.ir.core import Graph
from matmorph.ir.to_torch import to_torch
from matmorph.ir.tracing.trace import trace
from matmorph.passes.methods import method_table
from matmorph.passes.methods.protocol import Method
from matmorph.passes.pipeline import compile_graph, plan_graph
from matmorph.report.model import Report


class Pruned:
    """A compiled graph and its module."""

    def __init__(self, graph: Graph, report: Report) -> None:
        self.graph, self.report, self.module = graph, report, to_torch(graph)


def spec_of(block: str | list[str], **settings: Any) -> dict[str, Any]:
    return {"version": 1, "name": "t", "rules": [{"name": "prune", "match": {"block": block}, "rewrite": {"transact": settings}}]}


def pruned(graph: Graph, spec: Any, calibration: Any) -> Pruned:
    """What `mm.compile` does once the model is traced."""
    found = compile_graph(graph, mm.load_spec(spec), methods(), "t", calibration=calibration)
    return Pruned(found.graph, found.report)


def planned(graph: Graph, spec: Any) -> Report:
    """What `mm.plan` does once the model is traced."""
    return plan_graph(graph, mm.load_spec(spec), methods(), "t")


def methods() -> dict[str, Method]:
    return {name: method() for name, method in method_table().items()}


def compiled(name: str, block: str | list[str], **settings: Any) -> tuple[nn.Module, Pruned, Inputs]:
    """A model of the zoo in float64, the same pruned, and example inputs."""
    model, inputs, graph = traced(name)
    return model, pruned(graph, spec_of(block, **settings), batches(name)), inputs


@cache
def traced(name: str) -> tuple[nn.Module, Inputs, Graph]:
    """Traced once for all tests: the slowest step by far."""
    model, inputs, shapes = exact_model(name)
    return model, inputs, trace(model, inputs, shapes)


def double(inputs: Inputs) -> Inputs:
    """Floating inputs in float64."""
    if isinstance(inputs, dict):
        return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    return tuple(value.double() if value.is_floating_point() else value for value in inputs)


def exact_model(name: str) -> tuple[nn.Module, Inputs, Any]:
    """A model of the zoo in float64, biases included that are not zero."""
    model, inputs, shapes = ZOO[name].build()
    return model.double(), double(inputs), shapes


def batches(name: str) -> list[Inputs]:
    return [double(inputs) for inputs in (ZOO[name].build()[1], *ZOO[name].more_inputs())]


def positions_of(part: torch.Tensor, whole: torch.Tensor) -> list[int]:
    """For each row of `part` the row of `whole` that it is; every row must be there exactly once."""
    found = []
    for row in part:
        hits = (whole == row).all(1).nonzero().flatten().tolist()
        assert len(hits) == 1, f"a row is there {len(hits)} times"
        found.append(hits[0])
    return found


def matrix(weight: torch.Tensor, io: bool) -> torch.Tensor:
    """[out, in] of a stored weight; GPT-2 stores [in, out]."""
    return weight.T if io else weight


def run(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        found = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return found if isinstance(found, torch.Tensor) else found[0]


@contextlib.contextmanager
def silenced(model: nn.Module, inputs: Mapping[str, list[int]], outputs: Mapping[str, list[int]]) -> Iterator[None]:
    """The model with zeros at all but these features of the inputs and outputs of modules."""

    def before(kept: list[int]) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            mask = torch.zeros(args[0].shape[-1], dtype=args[0].dtype)
            mask[kept] = 1
            return (args[0] * mask, *args[1:])

        return hook

    def after(kept: list[int]) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            mask = torch.zeros(output.shape[-1], dtype=output.dtype)
            mask[kept] = 1
            return output * mask

        return hook

    handles = [model.get_submodule(path).register_forward_pre_hook(before(kept)) for path, kept in inputs.items()]
    handles += [model.get_submodule(path).register_forward_hook(after(kept)) for path, kept in outputs.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
