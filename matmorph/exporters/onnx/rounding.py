"""What ONNX Runtime's rounding of products does to a model's answers, foreseen in torch.

MatMulNBits with accuracy level 4 rounds each block of its activations to 8 bits (absmax over 127, the kernel's own block of `block_size`
inputs), and any kernel sums up a product in an order of its own. How far that moves the answers depends on the model, so the tolerance of
an export is taken from here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from matmorph.ir.core import Graph, Node, Value
from matmorph.ir.evaluate import run_node
from matmorph.ir.op_table import OPERATORS, of_kind
from matmorph.ir.ops import base_name
from matmorph.ir.quantised.ops import NBITS

LEVELS = 127

_SUMMED = of_kind("linear", "matmul")

ORDERS: tuple[Callable[[Tensor], Tensor], ...] = (lambda places: places < len(places) // 2, lambda places: places % 2 == 0)
"""Which terms of a sum, by their places, are added up apart from the others: the first half, every other one."""


def rounds_activations(graph: Graph) -> bool:
    """Whether the graph has a product that MatMulNBits would compute in 8 bits."""
    return any(map(_is_rounded, graph.nodes))


def round_int8(x: Tensor, block: int) -> Tensor:
    """x [.., n] with each block of its last axis on the 255 levels from -absmax to absmax; in the type of x."""
    size = x.shape[-1]
    blocks = functional.pad(x.float(), (0, -size % block)).reshape(*x.shape[:-1], -1, block)
    scale = blocks.abs().amax(-1, keepdim=True) / LEVELS
    rounded = torch.where(scale > 0, (blocks / scale).round() * scale, blocks)
    return rounded.flatten(-2)[..., :size].to(x.dtype)


def run_rounded(node: Node, read: Callable[[Value], Any]) -> tuple[Any, ...]:
    """`run_node`, but that such a product rounds its activations."""
    if not _is_rounded(node):
        return run_node(node, read)
    x, block = node.args[0], node.args[8]
    return run_node(node, lambda value: round_int8(read(value), block) if value is x else read(value))


def _is_rounded(node: Node) -> bool:
    """The kernel computes with floating-point zero points in float32 whatever the level."""
    if node.op != NBITS:
        return False
    zeros = node.args[3]
    return not (isinstance(zeros, Value) and zeros.tensor.torch_dtype.is_floating_point)


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
