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

from matmorph.exporters.vectors import Case, widened
from matmorph.ir.core import Graph, Node, Value
from matmorph.ir.evaluate import evaluate, run_node

NBITS = "matmorph.matmul_nbits.default"
LEVELS = 127


def rounds_activations(graph: Graph) -> bool:
    """Whether the graph has a product that MatMulNBits would compute in 8 bits."""
    return any(map(_is_rounded, graph.nodes))


def rounded_answers(graph: Graph, case: Case, precision: str) -> dict[str, Tensor]:
    """By output name, the answers of the graph where every such product rounds its activations; `precision`: of the export."""
    running = graph if precision == "keep" else widened(graph)
    named = [(entry.name, entry.value) for entry in running.signature.inputs if entry.value is not None]
    inputs = [torch.from_numpy(case.inputs[name]).to(running.device, value.tensor.torch_dtype) for name, value in named]
    with torch.no_grad():
        results = evaluate(running, inputs, run=_run)
    outputs = zip(running.signature.outputs, results, running.outputs, strict=True)
    return {name: result.float().cpu() for name, result, output in outputs if isinstance(output, Value) and isinstance(result, Tensor)}


def round_int8(x: Tensor, block: int) -> Tensor:
    """x [.., n] with each block of its last axis on the 255 levels from -absmax to absmax; in the type of x."""
    size = x.shape[-1]
    blocks = functional.pad(x.float(), (0, -size % block)).reshape(*x.shape[:-1], -1, block)
    scale = blocks.abs().amax(-1, keepdim=True) / LEVELS
    rounded = torch.where(scale > 0, (blocks / scale).round() * scale, blocks)
    return rounded.flatten(-2)[..., :size].to(x.dtype)


def _run(node: Node, read: Callable[[Value], Any]) -> tuple[Any, ...]:
    if not _is_rounded(node):
        return run_node(node, read)
    x, block = node.args[0], node.args[8]
    return run_node(node, lambda value: round_int8(read(value), block) if value is x else read(value))


def _is_rounded(node: Node) -> bool:
    """The kernel computes with floating-point zero points in float32 whatever the level."""
    zeros = node.args[3] if node.op == NBITS else None
    return node.op == NBITS and not (isinstance(zeros, Value) and zeros.tensor.torch_dtype.is_floating_point)
