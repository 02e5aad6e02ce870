"""ONNX forms of the operators on quantised weights, and which providers of ONNX Runtime have kernels for them.

| operator                  | ONNX                                                                                       |
|---------------------------|--------------------------------------------------------------------------------------------|
| matmul_nbits              | com.microsoft.MatMulNBits, the bias its sixth input                                        |
| matmul_codebook nf4       | com.microsoft.MatMulBnb4, then Add                                                         |
| matmul_codebook nf3, nf2  | Gather from a table of what each byte stands for, times absmax, then MatMul and Add        |
| gather_nbits              | com.microsoft.GatherBlockQuantized                                                         |

The codes are initializers as the operators of the IR hold them. ONNX Runtime multiplies packed codes in the first two and the last; the
table of the third it folds to a dense weight when the session loads, unless the codes are inputs of the graph (`expose_codes`), because an
input may be overridden. Bit operations would say the same as the table, but have no CUDA kernel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from matmorph.errors import ExportError
from matmorph.exporters.lowering import Lowerings, record
from matmorph.ir.core import Const, Graph, Node
from matmorph.ir.quant_dense import TABLES, byte_levels, stored_bits

DOMAIN = "com.microsoft"

ACCURACY: Mapping[str, int] = {"fp32": 1, "int8": 4}
"""MatMulNBits's `accuracy_level` by `export.activations`. The CPU provider alone looks at it."""

_FLOAT, _HALF, _BFLOAT = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
_BLOCKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Kernel:
    """What one provider runs: types of the activations (of the result of a gather), block sizes, bits of a code."""

    dtypes: tuple[ir.DataType, ...]
    blocks: tuple[int, ...] = _BLOCKS
    bits: tuple[int, ...] = (2, 4, 8)


KERNELS: Mapping[str, Mapping[str, Kernel]] = {
    "MatMulNBits": {"cpu": Kernel((_FLOAT, _HALF)), "cuda": Kernel((_FLOAT, _HALF, _BFLOAT))},
    # On the CPU the kernel is float's; ONNX Runtime writes Casts around it for fp16.
    "MatMulBnb4": {"cpu": Kernel((_FLOAT, _HALF), bits=(4,)), "cuda": Kernel((_FLOAT, _HALF, _BFLOAT), bits=(4,))},
    "GatherBlockQuantized": {"cpu": Kernel((_FLOAT, _HALF)), "cuda": Kernel((_FLOAT, _HALF, _BFLOAT))},
}
"""By operator of com.microsoft and export target, as registered in ONNX Runtime 1.31."""


def quantized_lowerings(activations: str = "fp32") -> Lowerings:
    """Translations of the operators on quantised weights. `activations`: a key of `ACCURACY`."""
    accuracy = ACCURACY[activations]

    def nbits(
        x: ir.Value,
        codes: ir.Value,
        scales: ir.Value,
        zero_points: ir.Value | None,
        bias: ir.Value | None,
        in_features: int,
        out_features: int,
        bits: int,
        block_size: int,
    ) -> ir.Value:
        numbers = {"K": in_features, "N": out_features, "bits": bits, "block_size": block_size, "accuracy_level": accuracy}
        inputs = [x, codes, _cast(scales, x.dtype), zero_points, None, bias if bias is None else _cast(bias, x.dtype)]
        return _contrib("MatMulNBits", inputs, numbers, x)

    ours = torch.ops.matmorph
    return {ours.matmul_nbits.default: nbits, ours.matmul_codebook.default: _codebook, ours.gather_nbits.default: _gather}


def _codebook(
    x: ir.Value,
    codes: ir.Value,
    absmax: ir.Value,
    bias: ir.Value | None,
    table: str,
    in_features: int,
    out_features: int,
    block_size: int,
) -> ir.Value:
    if table == "nf4":
        numbers = {"K": in_features, "N": out_features, "block_size": block_size, "quant_type": 1}
        y = _contrib("MatMulBnb4", [x, codes, _cast(absmax, x.dtype)], numbers, x)
    else:
        dense = _rebuilt(codes, absmax, table, (out_features, in_features), block_size)
        y = _node("MatMul", [x, _node("Transpose", [_cast(dense, x.dtype)], x.dtype, perm=(1, 0))], x.dtype)
    return y if bias is None else _node("Add", [y, _cast(bias, x.dtype)], x.dtype)


def _rebuilt(codes: ir.Value, absmax: ir.Value, table: str, shape: tuple[int, int], block: int) -> ir.Value:
    """W [out, in], float32: levels in half precision would not be those of the codebook."""
    numel = math.prod(shape)
    levels = byte_levels(torch.tensor(TABLES[table], dtype=torch.float32), stored_bits(table)).numpy()
    places = _node("Cast", [codes], ir.DataType.INT32, to=ir.DataType.INT32.value)  # Gather takes no uint8
    taken = _node("Gather", [_constant(ir.Tensor(levels)), places], _FLOAT, axis=0)
    columns = _node("Unsqueeze", [_cast(absmax, _FLOAT), _ints(1)], _FLOAT)
    flat = _node("Mul", [_node("Reshape", [taken, _ints(-1, block)], _FLOAT), columns], _FLOAT)
    if numel % block:  # the rest of the last block
        flat = _node("Slice", [_node("Reshape", [flat, _ints(-1)], _FLOAT), _ints(0), _ints(numel), _ints(0)], _FLOAT)
    return _node("Reshape", [flat, _ints(*shape)], _FLOAT)


def _gather(
    indices: ir.Value, codes: ir.Value, scales: ir.Value, zero_points: ir.Value | None, width: int, bits: int, block_size: int
) -> ir.Value:
    count, *row = ir.Shape(codes.shape or ()).numpy()
    rows = codes if len(row) == 1 else _node("Reshape", [codes, _ints(count, math.prod(row))], codes.dtype)
    numbers = {"bits": bits, "block_size": block_size, "gather_axis": 0, "quantize_axis": 1}
    found = _contrib("GatherBlockQuantized", [rows, indices, scales, zero_points], numbers, scales)
    whole = math.prod(row) * 8 // bits  # the width that the kernel reads off the codes
    return found if whole == width else _node("Slice", [found, _ints(0), _ints(width), _ints(-1)], scales.dtype)


def _contrib(name: str, inputs: Sequence[ir.Value | None], numbers: Mapping[str, int], like: ir.Value) -> ir.Value:
    """The result of an operator of com.microsoft, in the element type of `like`: ONNX's own inference knows nothing of it."""
    given = list(inputs)
    while given[-1] is None:
        given.pop()
    return _node(name, given, like.dtype, DOMAIN, 1, **numbers)


def _node(
    name: str,
    inputs: Sequence[ir.Value | None],
    dtype: ir.DataType | None,
    domain: str = "",
    version: int | None = None,
    **attributes: Any,
) -> ir.Value:
    node = ir.node(name, inputs, attributes, domain=domain, version=version)
    if dtype is not None:
        node.outputs[0].dtype = dtype
    record(node)
    return node.outputs[0]


def _cast(value: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """In the type of its neighbours, which ONNX does not do by itself."""
    return value if dtype is None or value.dtype == dtype else _node("Cast", [value], dtype, to=dtype.value)


def _constant(tensor: ir.Tensor[Any]) -> ir.Value:
    return _node("Constant", [], tensor.dtype, value=tensor)


def _ints(*numbers: int) -> ir.Value:
    return _constant(ir.Tensor(np.asarray(numbers, np.int64)))


def check_kernels(model: ir.Model, target: Sequence[str]) -> None:
    """Raises ExportError for a node of com.microsoft that a provider of `target` has no kernel for, naming both and the node's module."""
    for node in model.graph.all_nodes():
        if node.domain != DOMAIN:
            continue
        for device in target:
            reason = _obstacle(node, KERNELS.get(node.op_type, {}).get(device))
            if reason is not None:
                path = node.metadata_props.get("matmorph.path", "")
                raise ExportError(
                    f"export.target {device} has no {node.op_type} {reason}" + (f", used in {path}" if path else ""),
                    [_kernels_of(node.op_type), "choose another quantiser, block size or export.precision, or leave the target out"],
                )


def _obstacle(node: ir.Node, kernel: Kernel | None) -> str | None:
    """What of the node the kernel does not do."""
    if kernel is None:
        return "at all"
    dtype = node.outputs[0].dtype
    block, bits = node.attributes.get_int("block_size"), node.attributes.get_int("bits", 4)
    if dtype is not None and dtype not in kernel.dtypes:
        return f"for {dtype.numpy().name}"
    if block not in kernel.blocks:
        return f"with blocks of {block}"
    return None if bits in kernel.bits else f"with {bits} bits"


def _kernels_of(name: str) -> str:
    kernels = KERNELS.get(name, {})
    described = [
        f"{device}: {', '.join(dtype.numpy().name for dtype in kernel.dtypes)}, blocks of {', '.join(map(str, kernel.blocks))}, "
        f"{', '.join(map(str, kernel.bits))} bits"
        for device, kernel in kernels.items()
    ]
    return f"{name} has kernels on " + ("; ".join(described) or "no target")


def expose_codes(model: ir.Model, graph: Graph) -> None:
    """Makes the codes of table codebooks inputs of the graph with their initializers as defaults: they stay packed in a session."""
    for path in dict.fromkeys(node.args[1].path for node in graph.nodes if _is_table(node)):
        value = model.graph.initializers.get(path)
        if value is not None:
            model.graph.inputs.append(value)


def _is_table(node: Node) -> bool:
    return node.op == "matmorph.matmul_codebook.default" and node.args[4] != "nf4" and isinstance(node.args[1], Const)


def multiplies_in_int8(model: ir.Model) -> bool:
    """Whether a product rounds its activations to 8 bits."""
    return any(node.op_type == "MatMulNBits" and node.attributes.get_int("accuracy_level", 0) == 4 for node in model.graph.all_nodes())
