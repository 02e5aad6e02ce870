"""ONNX forms of the operators on quantised weights, and the refusal of what a target has no kernel for.

| operator                  | ONNX                                                                                       |
|---------------------------|--------------------------------------------------------------------------------------------|
| matmul_nbits              | com.microsoft.MatMulNBits, the bias its sixth input                                        |
| the same, scale per row   | see `channels`                                                                             |
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

import onnx_ir as ir
import torch

from matmorph.errors import ExportError
from matmorph.exporters.onnx import emit
from matmorph.exporters.onnx.channels import INTEGER_PRODUCT, channels_product, integer_product
from matmorph.exporters.onnx.emit import DOMAIN
from matmorph.exporters.onnx.lowering import Lowerings
from matmorph.exporters.onnx.placement import element_name
from matmorph.ir.core import Const, Graph, Node
from matmorph.ir.quantised.dense import TABLES, byte_levels, stored_bits
from matmorph.runtime.targets import TARGETS, chosen_targets
from matmorph.runtime.targets.target import Target

ACCURACY: Mapping[str, int] = {"fp32": 1, "int8": 4}
"""MatMulNBits's `accuracy_level` by `export.activations`. The CPU provider alone looks at it."""

_FLOAT = ir.DataType.FLOAT


def quantized_lowerings(activations: str = "fp32", *, integer: bool = False, packed: bool = False) -> Lowerings:
    """Translations of the operators on quantised weights. `activations`: a key of `ACCURACY`. `integer`: codes with a scale per row are
    multiplied in integers. `packed`: tables, and codes that are made dense, stay so in any session."""
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
        if len(codes_shape(scales)) == 1:
            return integer_product(x, codes, scales, bias) if integer else channels_product(x, codes, scales, bias, packed)
        numbers = {"K": in_features, "N": out_features, "bits": bits, "block_size": block_size, "accuracy_level": accuracy}
        inputs = [
            x,
            codes,
            emit.cast(scales, x.dtype),
            typed_zeros(zero_points, x),
            None,
            bias if bias is None else emit.cast(bias, x.dtype),
        ]
        return emit.contrib("MatMulNBits", inputs, numbers, x)

    ours = torch.ops.matmorph
    codebook = _packed_codebook if packed else _codebook
    return {ours.matmul_nbits.default: nbits, ours.matmul_codebook.default: codebook, ours.gather_nbits.default: _gather}


def typed_zeros(zero_points: ir.Value | None, x: ir.Value) -> ir.Value | None:
    """Packed ones as they are, numbers in the type of the activations."""
    return zero_points if zero_points is None or zero_points.dtype == ir.DataType.UINT8 else emit.cast(zero_points, x.dtype)


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
        y = emit.contrib("MatMulBnb4", [x, codes, emit.cast(absmax, x.dtype)], numbers, x)
    else:
        y = _times_transposed(x, rebuilt(codes, absmax, table, (out_features, in_features), block_size))
    return y if bias is None else emit.node("Add", [y, emit.cast(bias, x.dtype)], x.dtype)


def _packed_codebook(
    x: ir.Value,
    codes: ir.Value,
    absmax: ir.Value,
    bias: ir.Value | None,
    table: str,
    in_features: int,
    out_features: int,
    block_size: int,
) -> ir.Value:
    """The same, with codes that no session folds."""
    held = codes if table == "nf4" else emit.held(codes, codes_shape(codes), x)
    return _codebook(x, held, absmax, bias, table, in_features, out_features, block_size)


def _times_transposed(x: ir.Value, dense: ir.Value) -> ir.Value:
    return emit.node("MatMul", [x, emit.node("Transpose", [emit.cast(dense, x.dtype)], x.dtype, perm=(1, 0))], x.dtype)


def codes_shape(codes: ir.Value) -> tuple[int, ...]:
    """Of a constant, whose sizes are numbers."""
    return ir.Shape(codes.shape or ()).numpy()


def rebuilt(codes: ir.Value, absmax: ir.Value, table: str, shape: tuple[int, int], block: int) -> ir.Value:
    """W [out, in], float32: levels in half precision would not be those of the codebook. `codes` of nf4 as rows of bytes [.., n]."""
    numel, width = math.prod(shape), stored_bits(table)
    levels = byte_levels(torch.tensor(TABLES[table], dtype=torch.float32), width, high_first=table == "nf4").numpy()
    places = emit.cast(codes, ir.DataType.INT32)  # Gather takes no uint8
    taken = emit.node("Gather", [emit.constant(ir.Tensor(levels)), places], _FLOAT, axis=0)
    missing = -numel % block - (numel % 2) if table == "nf4" else 0  # nf4 ends with the last byte, the others with a block
    if missing > 0:
        taken = emit.node("Pad", [emit.node("Reshape", [taken, emit.ints(-1)], _FLOAT), emit.ints(0, missing)], _FLOAT)
    columns = emit.node("Unsqueeze", [emit.cast(absmax, _FLOAT), emit.ints(1)], _FLOAT)
    flat = emit.node("Mul", [emit.node("Reshape", [taken, emit.ints(-1, block)], _FLOAT), columns], _FLOAT)
    if numel % block:  # the rest of the last block
        whole = emit.node("Reshape", [flat, emit.ints(-1)], _FLOAT)
        flat = emit.node("Slice", [whole, emit.ints(0), emit.ints(numel), emit.ints(0)], _FLOAT)
    return emit.node("Reshape", [flat, emit.ints(*shape)], _FLOAT)


def _gather(
    indices: ir.Value, codes: ir.Value, scales: ir.Value, zero_points: ir.Value | None, width: int, bits: int, block_size: int
) -> ir.Value:
    count, *row = codes_shape(codes)
    rows = codes if len(row) == 1 else emit.node("Reshape", [codes, emit.ints(count, math.prod(row))], codes.dtype)
    return looked_up(indices, rows, scales, zero_points, (math.prod(row), width), bits, block_size)


def looked_up(
    indices: ir.Value,
    rows: ir.Value,
    scales: ir.Value,
    zero_points: ir.Value | None,
    sizes: tuple[int, int],
    bits: int,
    block_size: int,
) -> ir.Value:
    """Dequantised rows [.., width] in the type of the scales. `sizes`: bytes of a row, width."""
    numbers = {"bits": bits, "block_size": block_size, "gather_axis": 0, "quantize_axis": 1}
    found = emit.contrib("GatherBlockQuantized", [rows, indices, scales, zero_points], numbers, scales)
    stored, width = sizes
    whole = stored * 8 // bits  # the width that the kernel reads off the codes
    return found if whole == width else emit.node("Slice", [found, emit.ints(0), emit.ints(width), emit.ints(-1)], scales.dtype)


def check_kernels(model: ir.Model, target: Sequence[str]) -> None:
    """Raises ExportError for a node of com.microsoft that a provider of `target` has no kernel for, naming both and the node's module."""
    for node in model.graph.all_nodes():
        if node.domain != DOMAIN:
            continue
        for device in target:
            reason = _obstacle(node, TARGETS[device]) if device in TARGETS else "at all"
            if reason is not None:
                path = node.metadata_props.get("matmorph.path", "")
                raise ExportError(
                    f"export.target {device} has no {node.op_type} {reason}" + (f", used in {path}" if path else ""),
                    [_kernels_of(node.op_type), _ADVICE.get(node.op_type, _OTHER)],
                )


_OTHER = "choose another quantiser, block size or export.precision, or leave the target out"
_ADVICE: Mapping[str, str] = {
    "GroupQueryAttention": "leave the target out (export.target: [cpu]), or choose another export.attention or precision"
}


def _obstacle(node: ir.Node, target: Target) -> str | None:
    """What of the node no kernel of the target does."""
    inputs, outputs = ([kernel_type(value) for value in side] for side in (node.inputs, node.outputs))
    missing = target.missing(DOMAIN, node.op_type, 1, inputs, outputs)
    if missing is not None:
        has = target.results(node.op_type)
        return f"for {outputs[0]}" if has and outputs[0] is not None and outputs[0] not in has else missing
    limits = target.limits.get(node.op_type)
    if limits is None:
        return None
    block, bits = node.attributes.get_int("block_size"), node.attributes.get_int("bits", 4)
    if block not in limits.blocks:
        return f"with blocks of {block}"
    return None if bits in limits.bits else f"with {bits} bits"


def kernel_type(value: ir.Value | None) -> str | None:
    """The element type as the list of kernels writes it, None where it is not known."""
    return None if value is None or value.dtype is None else element_name(value.dtype.value)


def _kernels_of(name: str) -> str:
    described = []
    for target in chosen_targets(TARGETS):
        if types := target.results(name):
            limits = target.limits.get(name)
            sizes = "" if limits is None else f", blocks of {', '.join(map(str, limits.blocks))}, {', '.join(map(str, limits.bits))} bits"
            described.append(f"{target.name}: {', '.join(types)}{sizes}")
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
    return any(
        node.op_type == INTEGER_PRODUCT or (node.op_type == "MatMulNBits" and node.attributes.get_int("accuracy_level", 0) == 4)
        for node in model.graph.all_nodes()
    )
