"""Numeric precision of an exported graph.

`keep` writes the stored dtypes. `fp32` writes every half-precision weight and computation as float32. `fp16` and `bf16` follow autocast:
matrix products (and what has only their results as inputs) run in half precision, norms, softmax and reductions in float32, inputs and
outputs stay float32 (but for a key/value cache, which fp16 keeps in fp16), and Casts are written where the two meet. An operator whose
inputs disagree runs in float32, and so does one that ONNX does not define for the type in the graph's opset (a convolution on bfloat16
before opset 22).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir

from matmorph.errors import ExportError
from matmorph.exporters.onnx.bare import bare_proto
from matmorph.exporters.onnx.cleanup import unique
from matmorph.runtime.format.cases import Array
from matmorph.runtime.targets import TARGETS, chosen_targets

Precision = Literal["fp32", "fp16", "bf16", "keep"]

HALF: Mapping[str, ir.DataType] = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_STORED: Mapping[str, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_HALVES = frozenset(HALF.values())
_FLOAT = ir.DataType.FLOAT

PARITY_TOLERANCE: Mapping[str, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""Largest |ONNX Runtime - torch| / max(1, |torch|) accepted: 1000 roundings of float32 (6e-8), 40 of fp16 (5e-4), 25 of bf16 (4e-3)."""

INT8_TOLERANCE = 1e-1
"""The same with activations rounded to 8 bits, at the least: one product errs by up to 1e-2 of its largest result, a hundred of them by
chance by ten times as much. A model that feels more of it has what `rounding` foresees."""

LOWER = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose", "MatMulNBits", "MatMulBnb4", "GroupQueryAttention"})
"""Operators that run in half precision whatever comes in: they carry the cost, and accumulate in float32."""

# fmt: off
UPPER = frozenset([
    "LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization", "BatchNormalization",
    "LpNormalization", "Softmax", "LogSoftmax", "ReduceMax", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2",
    "ReduceProd", "ReduceLogSumExp", "ReduceLogSum", "CumSum", "Pow", "Exp", "Log", "Sqrt", "Reciprocal", "Softplus", "Sin", "Cos", "Tan",
    "Asin", "Acos", "Sinh", "Cosh", "Einsum", "Attention", "Resize", "GridSample", "TopK", "SplitToSequence", "SequenceAt",
    "ConcatFromSequence", "SequenceConstruct", "DynamicQuantizeLinear", "MatMulIntegerToFloat",
])
# fmt: on
"""Operators that stay in float32: sums over many terms, functions that leave the range of half precision, sequences of tensors, the
largest of an axis, for which CUDA has no kernel in bf16, and what takes numbers to integers and back, whose steps are float32."""


@dataclass(frozen=True, slots=True)
class CachePorts:
    """Where a graph has its key/value cache: names of inputs, positions of outputs."""

    pasts: frozenset[str] = frozenset()
    presents: frozenset[int] = frozenset()


_NO_CACHE = CachePorts()


def check_target(precision: str, target: Sequence[str], dtypes: Iterable[str]) -> None:
    """Raises ExportError where a target has no kernel for the precision. `dtypes`: the stored dtypes of the weights ("bfloat16" ...)."""
    needed = computed_in(precision, dtypes)
    for device in chosen_targets(target):
        if needed in device.lacks:
            has = f" (the model's weights are {_STORED[needed]})" if precision == "keep" else ""
            others = ", ".join(other.name for other in TARGETS.values() if needed not in other.lacks)
            wide = " or ".join(one for one in PARITY_TOLERANCE if one not in device.lacks)
            raise ExportError(
                f"export.precision {precision}{has} does not run on target {device.name}: {device.lacks[needed]}",
                [(f"set export.target to [{others}], or export.precision to " if others else "set export.precision to ") + wide],
            )


def parity_tolerance(precision: str, dtypes: Iterable[str], int8: bool = False) -> float:
    """The tolerance of an export; under `keep` that of the coarsest weight. `int8`: some products round their activations."""
    return max(PARITY_TOLERANCE[computed_in(precision, dtypes)], INT8_TOLERANCE if int8 else 0.0)


def computed_in(precision: str, dtypes: Iterable[str]) -> str:
    """fp32, fp16 or bf16: the coarsest type in which an export computes; under `keep` that of the weights (their stored `dtypes`)."""
    stored = set(dtypes)
    kept = "bf16" if "bfloat16" in stored else "fp16" if "float16" in stored else "fp32"
    return kept if precision == "keep" else precision


def convert(model: ir.Model, precision: str, cache: CachePorts = _NO_CACHE, target: Sequence[str] = ()) -> None:
    """Changes the computation and the dtypes of initializers in place; weights have no data yet, so whoever writes them casts them.
    The `cache` is kept in fp16 where the products are: it is as large as the text is long. numpy has no bf16, so there it stays float32.
    A product that a `target` has kernels for, but none in half precision, stays in float32 too.

    Raises ExportError for half precision on a graph with control flow, whose bodies are not converted.
    """
    if precision == "keep":
        _bridge(model)
        return
    settle_types(model)
    _widen(model)
    _drop_casts(model.graph)
    if precision in HALF:
        _narrow(model, HALF[precision], cache if precision == "fp16" else _NO_CACHE, target)


def settle_types(model: ir.Model) -> None:
    """Fills in the element type of every value of the main graph, by ONNX's own type inference on the graph without its weights."""
    inferred = onnx.shape_inference.infer_shapes(bare_proto(model))
    types = {info.name: info.type.tensor_type.elem_type for info in (*inferred.graph.value_info, *inferred.graph.output)}
    for node in model.graph:
        for value in node.outputs:
            if value.dtype is None and types.get(str(value.name)):
                value.dtype = ir.DataType(types[str(value.name)])


def _widen(model: ir.Model) -> None:
    """Every half-precision value, constant and cast becomes float32; bodies of control flow included."""
    nodes = list(model.graph.all_nodes())
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *(v for node in nodes for v in node.outputs)):
        if value.dtype in _HALVES:
            value.dtype = _FLOAT
            if value.const_value is not None:
                value.const_value = ir.Tensor(value.const_value.numpy().astype(np.float32), name=value.name)
    for node in nodes:
        for name, attribute in list(node.attributes.items()):
            if attribute.type is ir.AttributeType.TENSOR and attribute.as_tensor().dtype in _HALVES:
                node.attributes[name] = ir.AttrTensor(name, ir.Tensor(attribute.as_tensor().numpy().astype(np.float32)))
            elif name in ("to", "dtype", "stash_type") and attribute.value in {half.value for half in _HALVES}:
                node.attributes[name] = ir.AttrInt64(name, _FLOAT.value)


def _bridge(model: ir.Model) -> None:
    """Nodes of a model in half precision that ONNX does not define there compute in float32, between Casts."""
    graph, opset = model.graph, model.opset_imports[""]
    if not any(value.dtype in _HALVES for value in (*graph.inputs, *graph.initializers.values())):
        return
    settle_types(model)
    for node in list(graph):
        half = next((value.dtype for value in node.inputs if value is not None and value.dtype in _HALVES), None)
        if half is None or node.op_type == "Cast" or _is_defined(node, half, opset):
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == half:
                cast = ir.node("Cast", [value], attributes={"to": _FLOAT.value}, metadata_props=dict(node.metadata_props))
                cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(_FLOAT), value.shape
                graph.insert_before(node, cast)
                node.replace_input_with(index, cast.outputs[0])
        for value in node.outputs:
            if value.dtype == half:
                _cast_back(graph, node, value, half)


def _cast_back(graph: ir.Graph, node: ir.Node, value: ir.Value, half: ir.DataType) -> None:
    cast = ir.node("Cast", [value], attributes={"to": half.value}, metadata_props=dict(node.metadata_props))
    result = cast.outputs[0]
    value.dtype, result.type, result.shape = _FLOAT, ir.TensorType(half), value.shape
    value.replace_all_uses_with(result, replace_graph_outputs=True)
    cast.replace_input_with(0, value)
    graph.insert_after(node, cast)


def _is_defined(node: ir.Node, half: ir.DataType, opset: int) -> bool:
    """Whether ONNX has the operator on a half precision for every float that the node reads; what is not ONNX's own says so itself."""
    if node.domain not in ("", "ai.onnx"):
        return True
    schema = onnx.defs.get_schema(node.op_type, opset)
    types = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    floats = {
        schema.inputs[min(index, len(schema.inputs) - 1)].type_str
        for index, value in enumerate(node.inputs)
        if value is not None and value.dtype in (_FLOAT, half)
    }
    return all(f"tensor({half.name.lower()})" in types.get(name, [name]) for name in floats)


def _narrow(model: ir.Model, half: ir.DataType, cache: CachePorts, target: Sequence[str]) -> None:
    for node in model.graph:
        if any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()):
            raise ExportError(
                f"export.precision {half.name.lower()} is not possible for a model with control flow ({node.op_type} at {node.name})",
                ["set export.precision to fp32 or keep"],
            )
    _Narrowing(model.graph, half, model.opset_imports[""], cache, target).run()


class _Narrowing:
    """One forward walk: the precision of each node by its operator and inputs, Casts between neighbours that differ, one per value."""

    def __init__(self, graph: ir.Graph, half: ir.DataType, opset: int, cache: CachePorts, target: Sequence[str]) -> None:
        self.kernels = [device.kernels() for device in chosen_targets(target) if device.hands_back]
        self.graph = graph
        self.half = half
        self.pasts = {value for value in graph.inputs if value.name in cache.pasts and value.dtype == _FLOAT}
        self.presents = cache.presents
        self.opset = opset
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.taken = {str(value.name) for node in graph for value in node.outputs} | {str(v.name) for v in graph.inputs}
        self.taken |= set(graph.initializers)
        self.initializers = set(graph.initializers.values())
        self.of_weights = set(self.initializers)

    def run(self) -> None:
        self._store_weights()
        for past in self.pasts:
            past.dtype = self.half
        for node in list(self.graph):
            wanted = self._precision(node)
            if wanted is None:
                continue
            for index, value in enumerate(node.inputs):
                if value is not None and value.dtype in (_FLOAT, self.half) and value.dtype != wanted:
                    node.replace_input_with(index, self._cast(value, wanted, node))
            for value in node.outputs:
                if value.dtype == _FLOAT:
                    value.dtype = wanted
        for index, value in enumerate(self.graph.outputs):
            kept = self.half if index in self.presents else _FLOAT
            if value.dtype in (_FLOAT, self.half) and value.dtype != kept:
                self.graph.outputs[index] = self._cast(value, kept, None)

    def _store_weights(self) -> None:
        """A float weight is stored in half precision where only operators in half precision read it; a scalar stays exact."""
        for value in self.initializers:
            if value.dtype == _FLOAT and value.const_value is None and self._only_products(value):
                value.dtype = self.half

    def _only_products(self, value: ir.Value) -> bool:
        """Whether every reader, through changes of layout, is a matrix product, a table look-up or the addition of a bias to a product."""
        readers = [usage.node for usage in value.uses()]
        return bool(readers) and all(
            (node.op_type in LOWER and self._runs(node))
            or (node.op_type == "Gather" and node.inputs[0] is value)
            or node.op_type == "GatherBlockQuantized"  # its scales
            or (node.op_type in _LAYOUT and self._only_products(node.outputs[0]))
            or (node.op_type == "Add" and any(_is_product(other) for other in node.inputs if other is not value))
            for node in readers
        )

    def _precision(self, node: ir.Node) -> ir.DataType | None:
        """Precision of a node, None where it computes no float. A node that makes floats of no floats (a mask) stays in float32."""
        if node.op_type in ("Cast", "ConstantOfShape", "Constant"):
            return None
        data = [value for value in node.inputs if value is not None and value.dtype in (_FLOAT, self.half)]
        if not data:
            return None
        if any(value in self.pasts for value in data):
            return self.half
        if self._is_of_weights(node) or not self._runs(node):
            return _FLOAT
        if node.op_type in LOWER:
            return self.half
        if node.op_type in UPPER:
            return _FLOAT
        if any(value.const_value is not None and not self._representable(value.const_value.numpy()) for value in data):
            return _FLOAT
        computed = [value for value in data if value not in self.initializers]
        if not computed:
            return self.half if all(value.dtype == self.half for value in data) else _FLOAT
        return self.half if all(value.dtype == self.half for value in computed) else _FLOAT

    def _runs(self, node: ir.Node) -> bool:
        """Whether ONNX defines the node in half precision, and no target has it in other types alone."""
        if not _is_defined(node, self.half, self.opset):
            return False
        found = [kernels.results(node.domain, node.op_type) for kernels in self.kernels] if node.op_type in LOWER else []
        return all(not results or self.half.numpy().name in results for results in found)

    def _is_of_weights(self, node: ir.Node) -> bool:
        """Whether it computes with weights alone: the session does that once, when it loads, and only on kernels that half precision has
        not. Changes of layout take what they get."""
        if not all(value is None or value in self.of_weights for value in node.inputs):
            return False
        self.of_weights.update(node.outputs)
        return node.op_type not in _LAYOUT

    def _representable(self, array: Array) -> bool:
        """No finite number overflows and none but zero vanishes (an eps of 1e-12 is 0 in fp16)."""
        smallest, largest = _limits(self.half)
        size = np.abs(array[np.isfinite(array) & (array != 0)].astype(np.float64))
        return bool(np.all(size <= largest) and np.all(size >= smallest))

    def _cast(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node | None) -> ir.Value:
        if (value, dtype) in self.casts:
            return self.casts[value, dtype]
        name = unique(f"{value.name}:{dtype.name.lower()}", self.taken)
        made = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape)
        self.casts[value, dtype] = made
        if value in self.of_weights:
            self.of_weights.add(made)
        if value.const_value is not None:
            made.const_value = ir.Tensor(value.const_value.numpy().astype(dtype.numpy()), name=name)
            self.graph.register_initializer(made)
            self.initializers.add(made)
            return made
        producer = value.producer()
        source = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else None
        if source is None or source.dtype in (_FLOAT, self.half):
            source = value  # else codes and masks go to half precision in one step
        path = {"matmorph.path": reader.metadata_props["matmorph.path"]} if reader and "matmorph.path" in reader.metadata_props else {}
        cast = ir.node("Cast", [source], attributes={"to": dtype.value}, outputs=[made], metadata_props=path)
        if producer is not None:
            self.graph.insert_after(producer, cast)
        else:
            self.graph.insert_before(self.graph[0], cast)
        return made


_LAYOUT = frozenset({"Transpose", "Reshape", "Unsqueeze", "Squeeze", "Slice", "Identity", "Split", "Expand", "Gather"})


def _limits(dtype: ir.DataType) -> tuple[float, float]:
    """(smallest normal, largest finite) magnitude."""
    return (2.0**-14, 65504.0) if dtype is ir.DataType.FLOAT16 else (2.0**-126, 3.3895313892515355e38)


def _is_product(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type in LOWER


def _drop_casts(graph: ir.Graph) -> None:
    """Removes Casts that no longer change anything."""
    for node in list(graph):
        source, result = (node.inputs[0], node.outputs[0]) if node.op_type == "Cast" else (None, None)
        if source is None or result is None or source.dtype != node.attributes["to"].value:
            continue
        if result.is_graph_output():
            if source.producer() is None or source.is_graph_output():
                continue
            for index, output in enumerate(graph.outputs):
                if output is result:
                    graph.outputs[index] = source
        result.replace_all_uses_with(source)
        graph.remove(node, safe=True)
