"""A torch function written out as ATen operators that write to nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx


def written_out(
    function: Callable[..., Any], inputs: Sequence[Any], table: Mapping[Any, Callable[..., Any]] | None = None
) -> torch.fx.GraphModule:
    """The operators of a function on these (fake) inputs. `table`: decompositions to take apart by, None = none.

    Some of torch's formulas fill their own scratch tensors: those are traced a second time. Raises whatever the function raises.
    """

    def trace(traced: Callable[..., Any]) -> torch.fx.GraphModule:
        return make_fx(traced, decomposition_table=table, tracing_mode="real", _allow_non_fake_inputs=True)(*inputs)

    module = trace(function)
    return trace(functionalize(module, remove="mutations")) if any(map(writes, module.graph.nodes)) else module


def writes(node: torch.fx.Node) -> bool:
    """Whether an operator changes what it is given."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
