"""Trained numbers put into a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from matmorph.errors import InputError, did_you_mean
from matmorph.ir.core import Const, Graph
from matmorph.ir.rewiring import exchanged, loaded

NEAREST = 5


def with_values(graph: Graph, values: Mapping[str, Any], where: str = "the values") -> Graph:
    """The graph with other numbers in some of its parameters, in their own type. `values`: torch or numpy arrays by dotted name.

    InputError for a name that is no parameter, another shape (for factors: another rank) and for NaN or infinity, naming `where`.
    """
    known = {name: const for const in graph.state for name in const.names}
    for name in values:
        if name not in known or known[name].kind != "parameter":
            factors = [path for path in known if known[path].trainable and known[path].rule is not None]
            raise InputError(
                f"{where}: the model has no parameter {name}{did_you_mean(name, known)}; these are values of another model",
                [f"parameters that rules put in: {', '.join(factors[:NEAREST])}{' ...' if len(factors) > NEAREST else ''}"]
                if factors
                else [],
            )
    given = {known[name]: _fitted(known[name], value, where) for name, value in values.items()}
    return exchanged(graph, {const: loaded(const, tensor) for const, tensor in given.items()})


def _fitted(const: Const, value: Any, where: str) -> Tensor:
    tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)
    shape = tuple(int(dim) for dim in const.tensor.shape)
    if tuple(tensor.shape) != shape:
        kind = "another rank" if const.rule is not None and len(tensor.shape) == len(shape) else "another base"
        raise InputError(f"{where}: {const.path} is {list(tensor.shape)} there and {list(shape)} in this model: an adapter of {kind}")
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{where}: {const.path} has NaN or infinity")
    return tensor.to(const.tensor.torch_dtype)
