"""Which nodes of an ONNX graph a provider hands back to the CPU, looked up in ONNX Runtime's own list of its kernels: nothing is run.

A node is looked up as ONNX Runtime does it: by its operator, the version of that which the file's opset means, and the types of its inputs
and outputs. Bodies of control flow are walked too, functions of the file are written out first, and so are operators that no provider has a
kernel for and that ONNX defines by others. What is computed from constants alone the session computes once, on the CPU, when it loads. What
ONNX Runtime fuses, or writes in when it loads (Casts and copies), is not in the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import onnx_ir as ir

from matmorph.errors import ExportError
from matmorph.exporters.onnx.bare import bare_proto, fixed_names
from matmorph.runtime.targets import TARGETS, chosen_targets
from matmorph.runtime.targets.placement import HandedBack, Placement
from matmorph.runtime.targets.target import Target

_WIDTHS = {"float": "float32", "double": "float64"}
_WHOLE = ("int", "uint", "bool")
_RANDOM = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"})
_PATH = "matmorph.path"


def placement_of(file: Path, target: Target) -> Placement:
    """The placement of a file's graph; its external data is not read. Raises what `onnx.load` raises for a file that is no model."""
    return placement(onnx.load(str(file), load_external_data=False), target, file.name)


def placement(model: onnx.ModelProto, target: Target, name: str, constants: Iterable[str] = ()) -> Placement:
    """`constants`: inputs of the graph that stand for weights. Types that neither the file nor ONNX's inference knows fit every kernel."""
    weights = frozenset(constants)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    written_out: set[str] = set()
    while True:
        found = _looked_up(model, target, weights)
        new = {one.operator for one in found.handed if one.nowhere and _is_defined_by_others(one.operator, found.opset)} - written_out
        if not new:
            return found.placement(target, name)
        written_out |= new
        for operator in sorted(new):
            model = _inlined(model, operator)


def _inlined(model: onnx.ModelProto, operator: str) -> onnx.ModelProto:
    """With an operator of ONNX as what its definition says; the model itself where ONNX cannot write that out, for want of a type inside a
    loop or of another definition: then the operator is looked up as itself."""
    try:
        return onnx.inliner.inline_selected_functions(model, [("", operator)], inline_schema_functions=True)
    except RuntimeError:
        return model


def placements(model: ir.Model, targets: Iterable[str], name: str) -> tuple[Placement, ...]:
    """Of a model whose weights have no data yet, on each target that hands nodes back.

    Raises ExportError, naming the node, where a matrix product, an attention or a norm is among them.
    """
    chosen = [target for target in chosen_targets(targets) if target.hands_back]
    if not chosen:
        return ()
    bare, fixed = bare_proto(model), fixed_names(model)
    found = tuple(placement(bare, target, name, fixed) for target in chosen)
    for one in found:
        _refuse_heavy(one)
    return found


def _refuse_heavy(found: Placement) -> None:
    first, *others = found.heavy() or (None,)
    if first is None:
        return
    more = f", and {len(others)} more" if others else ""
    types = ", ".join(first.types)
    domain, _, operator = first.operator.rpartition(".")
    has = TARGETS[found.target].kernels().results(domain, operator)
    raise ExportError(
        f"export.target {found.target}: {found.title} would hand {first.operator} of {types} back to the CPU "
        f"({first.node} in {first.path or 'the model itself'}{more}): it has no kernel {first.reason}",
        [
            f"it has kernels of {operator} for {', '.join(has)}" if has else f"it has no kernel of {operator} for any type",
            "choose another export.precision or export.opset, write the model without it, or leave the target out of export.target",
            *(one.line() for one in others[:_SHOWN]),
        ],
    )


_SHOWN = 4


def _is_defined_by_others(operator: str, opset: int) -> bool:
    if not onnx.defs.has(operator):
        return False
    schema: Any = onnx.defs.get_schema(operator, opset)
    return bool(schema.has_function or schema.has_context_dependent_function)


def _looked_up(model: onnx.ModelProto, target: Target, weights: frozenset[str]) -> _Walk:
    inferred = onnx.shape_inference.infer_shapes(model)
    walk = _Walk(target, {entry.domain: entry.version for entry in inferred.opset_import})
    fixed = {tensor.name for tensor in inferred.graph.initializer} - {info.name for info in inferred.graph.input}
    walk.visit(inferred.graph, _Scope({}, set(fixed | weights), set()))
    return walk


@dataclass(slots=True)
class _Scope:
    """What is known of values by name: their types, which are constant, which are sizes."""

    types: dict[str, str]
    constants: set[str]
    sizes: set[str]

    def inner(self, graph: onnx.GraphProto) -> _Scope:
        """That of a body, which sees what is around it."""
        fixed = {tensor.name for tensor in graph.initializer}
        return _Scope(dict(self.types), self.constants | fixed, set(self.sizes))

    def settle(self, graph: onnx.GraphProto) -> None:
        for info in (*graph.input, *graph.value_info, *graph.output):
            if (found := _type(info.type)) is not None:
                self.types[info.name] = found
        self.types |= {tensor.name: element_name(tensor.data_type) for tensor in graph.initializer}

    def of(self, names: Iterable[str]) -> list[str | None]:
        return [self.types.get(name) if name else None for name in names]


@dataclass(slots=True)
class _Walk:
    target: Target
    opsets: Mapping[str, int]
    nodes: int = 0
    sizes: int = 0
    handed: list[HandedBack] = field(default_factory=list)
    unknown: dict[str, None] = field(default_factory=dict)

    @property
    def opset(self) -> int:
        return self.opsets.get("", 1)

    def placement(self, target: Target, name: str) -> Placement:
        source = target.kernels().source
        return Placement(target.name, target.title, name, self.nodes, tuple(self.handed), self.sizes, tuple(self.unknown), source)

    def visit(self, graph: onnx.GraphProto, scope: _Scope) -> None:
        scope.settle(graph)
        for node in graph.node:
            bodies = [body for attribute in node.attribute for body in _bodies(attribute)]
            if (node.op_type == "Constant" and not node.domain) or (not bodies and self._folds(node, scope)):
                scope.constants.update(node.output)
            else:
                self._look_up(node, scope)
            for body in bodies:
                self.visit(body, scope.inner(body))

    def _folds(self, node: onnx.NodeProto, scope: _Scope) -> bool:
        """Whether the session computes it when it loads, which it does on kernels of the CPU."""
        fixed = bool(node.input) and all(not name or name in scope.constants for name in node.input)
        return fixed and node.op_type not in _RANDOM and self._missing(node, scope, TARGETS["cpu"]) is None

    def _look_up(self, node: onnx.NodeProto, scope: _Scope) -> None:
        self.nodes += 1
        types = scope.of(node.output)
        whole = bool(types) and all(one is not None and one.startswith(_WHOLE) for one in types)
        sizes = whole and (
            node.op_type in ("Shape", "Size") or all(not name or name in scope.sizes or name in scope.constants for name in node.input)
        )
        if sizes:
            scope.sizes.update(node.output)
        domain = _domain(node)
        name = f"{domain}.{node.op_type}" if domain else node.op_type
        if not self.target.kernels().knows(domain, node.op_type):
            self.unknown[name] = None
            return
        reason = self._missing(node, scope, self.target) or self._declined(node)
        if reason is not None and sizes:
            self.sizes += 1
        elif reason is not None:
            path = next((entry.value for entry in node.metadata_props if entry.key == _PATH), "")
            inputs = tuple(one or "?" for one, given in zip(scope.of(node.input), node.input, strict=True) if given)
            nowhere = self._missing(node, scope, TARGETS["cpu"]) is not None
            self.handed.append(HandedBack(node.name or node.output[0], name, reason, inputs, path, nowhere, whole))

    def _missing(self, node: onnx.NodeProto, scope: _Scope, target: Target) -> str | None:
        domain = _domain(node)
        return target.missing(domain, node.op_type, self.opsets.get(domain, 1), scope.of(node.input), scope.of(node.output))

    def _declined(self, node: onnx.NodeProto) -> str | None:
        look = self.target.declines.get(node.op_type) if not _domain(node) else None
        return None if look is None else look({one.name: _plain(one) for one in node.attribute})


def _domain(node: onnx.NodeProto) -> str:
    return "" if node.domain == "ai.onnx" else node.domain


def _bodies(attribute: onnx.AttributeProto) -> Iterator[onnx.GraphProto]:
    if attribute.type == onnx.AttributeProto.GRAPH:
        yield attribute.g
    yield from attribute.graphs


def _plain(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    decode = partial(bytes.decode, errors="replace")
    if isinstance(value, bytes):
        return decode(value)
    return [decode(one) if isinstance(one, bytes) else one for one in value] if isinstance(value, list) else value


def element_name(number: int) -> str:
    """An element type of ONNX as the list of kernels writes it."""
    name = str(onnx.TensorProto.DataType.Name(number)).lower()
    return _WIDTHS.get(name, name)


def _type(proto: onnx.TypeProto) -> str | None:
    """As the list of kernels writes it, None where it is not known."""
    kind = proto.WhichOneof("value")
    if kind == "tensor_type":
        return element_name(proto.tensor_type.elem_type) if proto.tensor_type.elem_type else None
    if kind in ("sequence_type", "optional_type"):
        inner = _type(getattr(proto, kind).elem_type)
        return None if inner is None else f"{'seq' if kind == 'sequence_type' else 'optional'}({inner})"
    return None
