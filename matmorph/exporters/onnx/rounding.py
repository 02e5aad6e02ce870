"""What products with 8-bit activations do to a model's answers, foreseen in torch.

ONNX Runtime's MatMulNBits with accuracy level 4 rounds each block of its activations to 8 bits (absmax over 127, the kernel's own block of
`block_size` inputs). How far that moves the answers depends on the model, so the tolerance of such an export is taken from here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from matmorph.ir.core import Graph, Node, Value
from matmorph.ir.evaluate import run_node
from matmorph.ir.quantised.ops import NBITS

LEVELS = 127


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
