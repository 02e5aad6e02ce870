"""What a reader of the module tree, or an eager run, says of a model's weights: the oracle for matmul sites.

It knows module classes and `aten.embedding` calls, nothing of traces or graphs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


def call(module: nn.Module, inputs: Any) -> Any:
    return module(**inputs) if isinstance(inputs, Mapping) else module(*inputs)


def spread(module: nn.Module) -> None:
    """Weights of a size that makes every part matter (initialisers leave biases at 0 and outputs near 0)."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
            else:
                parameter.add_(0.1 * noise)


class GatherLog(TorchDispatchMode):
    """Data pointers of all tables that `aten.embedding` reads."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[int, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default:
            self.tables[args[0].data_ptr()] = None
        return func(*args, **(kwargs or {}))


def first_names(module: nn.Module) -> dict[int, str]:
    found: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), name)
    return found


def tree_matmuls(module: nn.Module) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(parameter, its matrix [..., out, in]) of every weight that a module of a known class multiplies its input with."""
    return [(child.get_parameter(name), matrix) for child in module.modules() for name, matrix in _own_matmuls(child)]


def tree_kernels(module: nn.Module) -> dict[str, str]:
    """Form by path of every weight that a module multiplies with and that is no plain matmul: kernels, weights of recurrent layers."""
    taken = {id(parameter) for parameter, _ in tree_matmuls(module)}
    first, found = first_names(module), dict[str, str]()
    for child in module.modules():
        form = (
            "conv"
            if isinstance(child, nn.modules.conv._ConvNd)
            else "recurrent"
            if isinstance(child, nn.RNNBase | nn.RNNCellBase)
            else None
        )
        for parameter in child.parameters() if form is not None else ():
            if parameter.dim() > 1 and id(parameter) not in taken:
                found[first[id(parameter)].removesuffix(".weight")] = form
    return found


def _own_matmuls(child: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """(attribute, matrix) of the weights that this module itself holds and multiplies with."""
    kind = type(child).__name__
    if isinstance(child, nn.Linear) or kind.endswith("TopKRouter"):
        return [("weight", child.weight)]
    if kind == "Conv1D":  # transformers' GPT-2 layer: [in, out]
        return [("weight", child.weight.T)]
    if isinstance(child, nn.Conv1d | nn.Conv2d):
        ones = (1,) * len(child.kernel_size)
        plain = (child.kernel_size, child.groups) == (ones, 1)
        return [("weight", child.weight.flatten(1))] if plain else []
    if isinstance(child, nn.MultiheadAttention):
        return [("in_proj_weight", child.in_proj_weight)]
    if kind.endswith("Experts"):
        return [(name, stack) for name, stack in child.named_parameters(recurse=False) if stack.dim() == 3]
    return []
