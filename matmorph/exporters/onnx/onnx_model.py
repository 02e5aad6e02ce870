"""A Graph as `model.onnx` + `model.onnx.data`: the skeleton is built on fake weights, then each weight is loaded, cast, hashed and
written in turn, so memory never holds more than one of them and the data file may be of any size."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
import sympy

from matmorph.errors import ExportError, VerifyError
from matmorph.exporters.adapters import expose_adapters
from matmorph.exporters.data_file import DataFile, WeightProgress, data_file
from matmorph.exporters.onnx.attention import attention_lowerings
from matmorph.exporters.onnx.cached_attention import cache_lowerings
from matmorph.exporters.onnx.cleanup import clean, name_everything, remove_unused, unique
from matmorph.exporters.onnx.coded_cache import coded_cache_lowerings
from matmorph.exporters.onnx.embedding_bags import embedding_bag_lowerings
from matmorph.exporters.onnx.gradient_ops import backward_lowerings
from matmorph.exporters.onnx.joined import Joined, join_projections
from matmorph.exporters.onnx.lowering import Lowerings, lower, translated
from matmorph.exporters.onnx.norms import fuse_norms
from matmorph.exporters.onnx.placement import placements
from matmorph.exporters.onnx.precision import CachePorts, check_target, convert, parity_tolerance
from matmorph.exporters.onnx.quantized import check_kernels, expose_codes, multiplies_in_int8, quantized_lowerings
from matmorph.exporters.onnx.quantized_gradients import gradient_lowerings, has_gradients
from matmorph.ir.cache import find_slots
from matmorph.ir.computed import settled
from matmorph.ir.core import Const, Graph, Value
from matmorph.ir.to_export import to_exported_program
from matmorph.ir.types import TensorType, format_dim
from matmorph.runtime.format.artifact import DATA, MODEL, FileRecord, TensorInfo, file_record
from matmorph.runtime.targets.placement import Placement

if TYPE_CHECKING:
    from matmorph.specs.schema import Export


@dataclass(frozen=True, slots=True)
class OnnxInfo:
    """What was written. `bytes`: of all weights in the data file, padding not counted; `tolerance`: of a parity check, relative to
    max(1, |reference|). `placements`: on each target that hands nodes back to the CPU."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    opset: int
    precision: str
    tolerance: float
    bytes: int
    nodes: int
    files: Mapping[str, FileRecord]
    placements: tuple[Placement, ...] = ()


def export_onnx(
    graph: Graph, folder: Path, export: Export, onnx_lowerings: Lowerings | None = None, progress: WeightProgress | None = None
) -> OnnxInfo:
    """Writes `model.onnx` and `model.onnx.data` into an existing folder; equal graphs give equal bytes. Raises as `write_model`."""
    with data_file(folder) as data:
        info = write_model(graph, folder / MODEL, data, export, onnx_lowerings, progress)
    return replace(info, files={**info.files, DATA: data.info()})


def write_model(
    graph: Graph,
    path: Path,
    data: DataFile,
    export: Export,
    onnx_lowerings: Lowerings | None = None,
    progress: WeightProgress | None = None,
    join: bool = False,
) -> OnnxInfo:
    """Writes one graph, its weights into the data file beside it; `files` of the result lists the graph's own file alone.

    Raises ExportError for a precision, opset, operator or weight that cannot be written, VerifyError where ONNX's own checker refuses the
    result, OSError from the file system.
    """
    _refuse_complex(graph)
    stored = [const.tensor.dtype for const in graph.used_state()]
    check_target(export.precision, export.target, stored)
    known = translated(export.written_opset, _lowerings(graph, export, onnx_lowerings))
    graph = settled(graph, lambda op: not known(op))
    model = skeleton(graph, export, onnx_lowerings)
    check_kernels(model, export.target)
    joined = join_projections(model) if join and export.fuse == "auto" else {}
    placed = placements(model, export.target, path.name)
    total = data.attach(_weights(model, graph, joined), progress)
    inputs = tuple(_port(value) for value in model.graph.inputs if value.name not in model.graph.initializers)
    outputs = tuple(map(_port, model.graph.outputs))
    _name_totals(model, graph)
    text = _serialized(model)
    path.write_bytes(text)
    _check(path)
    return OnnxInfo(
        inputs=inputs,
        outputs=outputs,
        opset=export.written_opset,
        precision=export.precision,
        tolerance=parity_tolerance(export.precision, stored, int8=multiplies_in_int8(model)),
        bytes=total,
        nodes=len(model.graph),
        files={path.name: file_record(text)},
        placements=placed,
    )


def _refuse_complex(graph: Graph) -> None:
    """ExportError for a complex input or output: a translation has pairs of real numbers in its place, on an axis more."""
    entries = [(entry.name, entry.value) for entry in graph.signature.inputs]
    entries += graph.results
    for name, value in entries:
        if value is not None and isinstance(value.type, TensorType) and value.tensor.torch_dtype.is_complex:
            raise ExportError(
                f"{name} is {value.tensor.dtype}, and ONNX Runtime takes and gives real numbers",
                ["inside of the model complex numbers are translated: let it take and return torch.view_as_real(x)"],
            )


def skeleton(graph: Graph, export: Export, onnx_lowerings: Lowerings | None = None) -> ir.Model:
    """The ONNX graph without weight data: every weight is an initializer with name, dtype and shape but no value."""
    training = has_gradients(graph)
    model = lower(to_exported_program(graph), export.written_opset, _lowerings(graph, export, onnx_lowerings))
    for value in model.graph.initializers.values():
        value.const_value = None
    _name_ports(model, graph)
    clean(model)
    convert(model, export.precision, _cache_ports(graph), export.target)
    remove_unused(model.graph)
    if export.fuse == "auto" and not training:
        fuse_norms(model, export.target)
    _separate_outputs(model.graph)
    _name_axes(model, graph)
    fixed = [*(str(value.name) for value in (*model.graph.inputs, *model.graph.outputs)), *model.graph.initializers]
    name_everything(model, fixed)
    model.producer_name, model.producer_version = "matmorph", ""
    model.graph.name = "main"
    if export.codebook == "packed" and not training:
        expose_codes(model, graph)
    if export.adapters == "inputs" and not training:
        expose_adapters(model, graph)
    return model


def _cache_ports(graph: Graph) -> CachePorts:
    slots = find_slots(graph)
    places = {name: k for k, (name, _) in enumerate(graph.results)}
    return CachePorts(frozenset(slot.input for slot in slots), frozenset(places[slot.output] for slot in slots))


def _lowerings(graph: Graph, export: Export, own: Lowerings | None) -> Lowerings:
    """Translations beside torchlib's, the user's own last."""
    codes = quantized_lowerings(export.activations, integer=export.integer_products, packed=has_gradients(graph))
    products = {**codes, **gradient_lowerings()}
    attention = {**attention_lowerings(export.written_opset), **cache_lowerings(export.written_opset), **coded_cache_lowerings()}
    return {**products, **backward_lowerings(), **attention, **embedding_bag_lowerings(), **(own or {})}


def _name_ports(model: ir.Model, graph: Graph) -> None:
    """Inputs and outputs get the names of the signature, and exactly its dims."""
    entries = [entry for entry in graph.signature.inputs if entry.value is not None]
    weights = set(model.graph.initializers)
    for value, entry in zip(model.graph.inputs, entries, strict=True):
        if entry.name in weights:
            raise ExportError(
                f"input {entry.name} has the name of a weight, and ONNX has one name space for both",
                ["rename the argument of forward, or wrap the model in a module of its own"],
            )
        value.name = entry.name


def _separate_outputs(graph: ir.Graph) -> None:
    """A result that is an input, a weight or another output too gets a node of its own, because ONNX wants distinct names."""
    seen: set[ir.Value] = set()
    for index, value in enumerate(list(graph.outputs)):
        if value in seen or value.producer() is None:
            copy = ir.Value(name=None, type=value.type, shape=value.shape)
            graph.append(ir.node("Identity", [value], outputs=[copy]))
            graph.outputs[index] = copy
        seen.add(value)


def _name_axes(model: ir.Model, graph: Graph) -> None:
    """Replaces the symbols of the translation by axis names everywhere, and names the outputs."""
    names: dict[str, str] = {}
    for value, source in zip(model.graph.inputs, graph.inputs, strict=True):
        for dim, wanted in zip(value.shape or (), source.tensor.shape, strict=True):
            if isinstance(dim, ir.SymbolicDim) and isinstance(wanted, sympy.Symbol):
                names[str(dim.value)] = str(wanted)
    values = [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, names) for dim in value.shape])
    for value, source in zip(model.graph.inputs, graph.inputs, strict=True):
        value.shape = _shape(source)
    taken = {str(value.name) for value in model.graph.inputs} | set(model.graph.initializers)
    for value, (name, source) in zip(model.graph.outputs, graph.results, strict=True):
        value.name = unique(name, taken)
        value.shape = _shape(source)


_TOTAL = "total_sequence_length"
"""What other runtimes call the past and the new tokens together, in a file alone: a manifest says what it is a sum of."""


def _name_totals(model: ir.Model, graph: Graph) -> None:
    """The axis of all tokens of a cache gets a name of its own in the place of a sum."""
    names = {format_dim(slot.total): _TOTAL for slot in find_slots(graph)}
    if not names or _TOTAL in graph.symbols():
        return
    for value in (*model.graph.inputs, *model.graph.outputs, *(value for node in model.graph.all_nodes() for value in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([dim if isinstance(dim, int) else names.get(str(dim.value), dim.value) for dim in value.shape])


def _shape(value: Value) -> ir.Shape:
    dims = value.type.shape if isinstance(value.type, TensorType) else ()
    return ir.Shape([dim if isinstance(dim, int) else format_dim(dim) for dim in dims])


def _renamed(dim: int | ir.SymbolicDim, names: Mapping[str, str]) -> int | str | None:
    """A dim over axis names, None (unknown) where it depends on a symbol that no input carries."""
    if isinstance(dim, int) or dim.value is None:
        return dim if isinstance(dim, int) else None
    symbols = re.findall(r"\b[su]\d+\b", dim.value)
    if any(symbol not in names for symbol in symbols):
        return None
    return re.sub(r"\b[su]\d+\b", lambda match: names[match.group()], dim.value)


def _weights(model: ir.Model, graph: Graph, joined: Joined) -> list[tuple[ir.Value, tuple[Const, ...]]]:
    """Initializers that await data with the Consts that they are made of, in `state` order."""
    waiting = {name: value for name, value in model.graph.initializers.items() if value.const_value is None}
    state = {const.path: const for const in graph.used_state()}
    first = {parts[0]: name for name, parts in joined.items()}
    found = []
    for path in state:
        name = first.get(path, path)
        if name in waiting:
            found.append((waiting.pop(name), tuple(state[part] for part in joined.get(name, (path,)))))
    if waiting:
        raise VerifyError(f"the translation made weights that the graph does not have: {', '.join(waiting)}")
    return found


def _serialized(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise VerifyError("the exported file is not valid ONNX", str(error).splitlines()[:10]) from error


def _port(value: ir.Value) -> TensorInfo:
    dims = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or ())
    return TensorInfo(str(value.name), _dtype(value).numpy().name, dims)


def _dtype(value: ir.Value) -> ir.DataType:
    if value.dtype is None:
        raise VerifyError(f"{value.name} has no element type in the translated graph")
    return value.dtype
