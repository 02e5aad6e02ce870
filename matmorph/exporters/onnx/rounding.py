"""What ONNX Runtime's rounding of products does to a model's answers, foreseen in torch.

Two of ONNX Runtime's products round their activations to 8 bits as they run:

| product                     | what shares a scale                  | levels                                                          |
|-----------------------------|--------------------------------------|-----------------------------------------------------------------|
| MatMulNBits, level 4        | `block_size` inputs of one row       | 255, from -absmax to absmax                                     |
| MatMulIntegerToFloat behind | all that goes into the product, every| 256, from min(x, 0) to max(x, 0), with a zero point that is one  |
| DynamicQuantizeLinear       | row of it                            | of them                                                         |

Any kernel sums up a product in an order of its own besides. How far that moves the answers depends on the model, so the tolerance of an
export is taken from here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from matmorph.ir.core import Graph, Node, Value
from matmorph.ir.evaluate import Runner, run_node
from matmorph.ir.op_table import OPERATORS, of_kind
from matmorph.ir.ops import base_name
from matmorph.ir.quantised.ops import NBITS

LEVELS = 127
TOP = 255

Round = Callable[[Tensor], Tensor]
_SUMMED = of_kind("linear", "matmul")

ORDERS: tuple[Callable[[Tensor], Tensor], ...] = (lambda places: places < len(places) // 2, lambda places: places % 2 == 0)
"""Which terms of a sum, by their places, are added up apart from the others: the first half, every other one."""


def rounds_activations(graph: Graph, integer: bool) -> bool:
    """Whether the graph has a product that would be computed in 8 bits. `integer`: those with a scale per row are multiplied so."""
    return any(_rounding(node, integer) is not None for node in graph.nodes)


def round_int8(x: Tensor, block: int) -> Tensor:
    """x [.., n] with each block of its last axis on the 255 levels from -absmax to absmax; in the type of x."""
    size = x.shape[-1]
    blocks = functional.pad(x.float(), (0, -size % block)).reshape(*x.shape[:-1], -1, block)
    scale = blocks.abs().amax(-1, keepdim=True) / LEVELS
    rounded = torch.where(scale > 0, (blocks / scale).round() * scale, blocks)
    return rounded.flatten(-2)[..., :size].to(x.dtype)


def round_uint8(x: Tensor) -> Tensor:
    """x on 256 levels, one scale and zero point for all of it, as ONNX defines DynamicQuantizeLinear; in the type of x."""
    if x.numel() == 0:
        return x
    wide = x.float()
    low, high = wide.amin().clamp(max=0), wide.amax().clamp(min=0)
    scale = (high - low) / TOP
    if float(scale) == 0:
        return x
    zero = (-low / scale).round().clamp(0, TOP)
    return (((wide / scale).round() + zero).clamp(0, TOP).sub(zero) * scale).to(x.dtype)


def runs_rounded(integer: bool) -> Runner:
    """`run_node`, but that such products round their activations."""

    def run(node: Node, read: Callable[[Value], Any]) -> tuple[Any, ...]:
        rounding = _rounding(node, integer)
        if rounding is None:
            return run_node(node, read)
        x = node.args[0]
        return run_node(node, lambda value: rounding(read(value)) if value is x else read(value))

    return run


def _rounding(node: Node, integer: bool) -> Round | None:
    """The kernel of blocks computes with floating-point zero points in float32 whatever the level."""
    if node.op != NBITS:
        return None
    scales, zeros, block = node.args[2], node.args[3], node.args[8]
    if len(scales.tensor.shape) == 1:
        return round_uint8 if integer else None
    floating = isinstance(zeros, Value) and zeros.tensor.torch_dtype.is_floating_point
    return None if floating else lambda x: round_int8(x, block)


def run_apart(chosen: Callable[[Tensor], Tensor], node: Node, read: Callable[[Value], Any]) -> tuple[Any, ...]:
    """`run_node`, but that a product is the sum of two: of the `chosen` features of its rows, and of the others.

    Exact but for float32's rounding, which is another one of the same size. A product of a tensor with itself is left as it is.
    """
    name = base_name(node.op)
    x = node.args[OPERATORS[name].operands[0]] if name in _SUMMED else None
    if not isinstance(x, Value) or list(node.inputs()).count(x) != 1:
        return run_node(node, read)
    rows = read(x)
    some = chosen(torch.arange(rows.shape[-1], device=rows.device))

    def product(part: Tensor) -> Tensor:
        (y,) = run_node(node, lambda value: part if value is x else read(value))
        return cast(Tensor, y)

    return (product(rows * some) + (product(rows * ~some) - product(torch.zeros_like(rows))),)  # the last one: what is added to a product
