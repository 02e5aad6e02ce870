"""An ExportedProgram, already functional, read into the IR: placeholders become inputs and Consts, `getitem` becomes tuple outputs,
run-time assertions become ranges. Nothing is computed and no weight is copied."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import sympy
import torch
import torch.fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.utils._pytree import TreeSpec

from matmorph.errors import TraceError
from matmorph.ir.core import Const, Graph, Input, Node, Origin, Range, Signature, Value
from matmorph.ir.ops import normalize, op_name
from matmorph.ir.rewiring import needed
from matmorph.ir.tracing.normal_form import Same, normal
from matmorph.ir.types import Dim, ScalarType, TensorType, Type, as_dim, dtype_name

CHECKS = frozenset(
    f"aten.{name}"
    for name in (
        "_assert_tensor_metadata.default",
        "_assert_scalar.default",
        "_assert_async.msg",
        "_assert_async.default",
        "sym_constrain_range.default",
        "sym_constrain_range_for_size.default",
    )
)
"""Operators that only assert; what they say about symbols is in the program's range constraints."""

FUNCTIONAL = {
    OutputKind.BUFFER_MUTATION: "writes to its buffer",
    OutputKind.PARAMETER_MUTATION: "writes to its parameter",
    OutputKind.USER_INPUT_MUTATION: "writes to its input",
}


@dataclass(frozen=True, slots=True)
class Names:
    """How the caller names what a program does not name itself.

    `symbols`: by the program's symbol, the symbol of the axis or what it is over others. `state`: Consts of the model in state_dict order.
    `inputs`: a name per flat input. `empty`: axes that may be of size 0.
    """

    symbols: Mapping[str, Dim]
    state: tuple[Const, ...]
    inputs: tuple[str, ...]
    empty: frozenset[str] = frozenset()


def read_program(program: ExportedProgram, names: Names, device: str, notes: tuple[str, ...]) -> Graph:
    """The Graph of a functional program. Raises TraceError for a forward that mutates state or whose shapes depend on data."""
    reader = _Reader(names)
    inputs = reader.read_placeholders(program)
    reader.read_nodes(program.graph_module)
    outputs = reader.read_outputs(program)
    spec = program.call_spec
    in_spec, out_spec = cast(TreeSpec, spec.in_spec), cast(TreeSpec, spec.out_spec)
    signature = Signature(inputs, in_spec, output_names(out_spec), out_spec)
    known = {const.path for const in names.state}
    lifted = tuple(const for const in reader.consts.values() if const.path not in known)
    # Everything here is functional, so what the outputs do not need is dead.
    return Graph(signature, needed(reader.nodes, outputs), outputs, (*names.state, *lifted), _ranges(program, names), device, notes)


@dataclass(slots=True)
class _Reader:
    """Working state of one reading: values by fx node, nodes so far."""

    names: Names
    values: dict[torch.fx.Node, Any] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    consts: dict[str, Const] = field(default_factory=dict)
    dims: dict[Any, Dim] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def read_placeholders(self, program: ExportedProgram) -> tuple[Input, ...]:
        by_name = {name: const for const in self.names.state for name in const.names}
        self.taken.update(by_name)
        found: list[Input] = []
        placeholders = (node for node in program.graph_module.graph.nodes if node.op == "placeholder")
        for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
            if spec.kind is InputKind.USER_INPUT:
                found.append(self._input(node, spec.arg, self.names.inputs[len(found)]))
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                self.values[node] = self._const(program, str(spec.target), by_name)
            else:
                raise TraceError(f"the model takes {spec.target or node.name}, a {spec.kind.name.lower()}, which cannot be compiled")
        return tuple(found)

    def _input(self, node: torch.fx.Node, arg: Any, name: str) -> Input:
        if isinstance(arg, ConstantArgument):
            return Input(name, None, arg.value)
        if not isinstance(arg, TensorArgument):
            raise TraceError(f"input {name} is a symbolic number; pass a tensor or a plain Python value")
        value = Value(self._unique(node.name), self._type(node.meta["val"], node))
        self.values[node] = value
        return Input(name, value)

    def _const(self, program: ExportedProgram, target: str, by_name: Mapping[str, Const]) -> Const:
        if target in by_name:
            return by_name[target]
        tensor = program.constants[target] if target in program.constants else program.state_dict[target]
        const = constant(tensor, (target,), kind="constant")
        self.taken.add(target)
        return self.consts.setdefault(target, const)

    def read_nodes(self, module: torch.fx.GraphModule) -> None:
        for node in module.graph.nodes:
            if node.op == "get_attr":
                self.values[node] = self._attribute(module, node)
            elif node.op == "call_function":
                self._call(node)

    def _attribute(self, module: torch.fx.GraphModule, node: torch.fx.Node) -> Any:
        target = module
        for part in str(node.target).split("."):
            target = getattr(target, part)
        if isinstance(target, torch.fx.GraphModule):
            return self._body(target)
        if isinstance(target, torch.Tensor):
            name = self._unique(str(node.target))
            return self.consts.setdefault(name, constant(target, (name,), kind="constant"))
        raise TraceError(f"the trace refers to {node.target}, a {type(target).__name__}, which cannot be compiled")

    def _body(self, module: torch.fx.GraphModule) -> Graph:
        """The sub-graph of a higher-order operator; what it captures arrives as its inputs."""
        inner = _Reader(self.names, taken=self.taken, dims=self.dims)
        inputs = []
        for node in module.graph.find_nodes(op="placeholder"):
            value = Value(self._unique(node.name), self._type(node.meta["val"], node))
            inner.values[node] = value
            inputs.append(Input(node.name, value))
        inner.read_nodes(module)
        result = next(iter(module.graph.find_nodes(op="output"))).args[0]
        flat = tuple(inner.argument(item) for item in (result if isinstance(result, tuple | list) else (result,)))
        in_spec = torch.utils._pytree.tree_structure((tuple(0 for _ in inputs), {}))
        out_spec = torch.utils._pytree.tree_structure(tuple(0 for _ in flat))
        signature = Signature(tuple(inputs), in_spec, output_names(out_spec), out_spec)
        return Graph(signature, needed(inner.nodes, flat), flat)

    def _call(self, node: torch.fx.Node) -> None:
        if node.target is operator.getitem and isinstance(self.values[cast(torch.fx.Node, node.args[0])], tuple):
            self.values[node] = self.values[cast(torch.fx.Node, node.args[0])][cast(int, node.args[1])]
            return
        op = op_name(node.target)
        if op in CHECKS:
            return
        result = node.meta.get("val")
        if result is None:
            raise TraceError(f"{op} gives no value and cannot be compiled", [f"at {where(node)}"])
        form = normal(node)
        if isinstance(form, Same):
            self.values[node] = self.values[form.value]
            return
        several = isinstance(result, tuple | list)
        outputs = tuple(self._output(node, item, i if several else None) for i, item in enumerate(result if several else (result,)))
        op, raw, named = (form.op, form.args, form.attrs) if form is not None else (op, node.args, node.kwargs)
        args, attrs = normalize(op, tuple(self.argument(a) for a in raw), {k: self.argument(a) for k, a in named.items()})
        self.nodes.append(Node(op, args, outputs, attrs, origin(node)))
        self.values[node] = outputs if several else outputs[0]

    def _output(self, node: torch.fx.Node, result: Any, index: int | None) -> Value:
        if result is None:
            raise TraceError(f"result {index} of {op_name(node.target)} is None, which cannot be compiled", [f"at {where(node)}"])
        name = node.name if index is None else f"{node.name}.{index}"
        return Value(self._unique(name), self._type(result, node))

    def argument(self, arg: Any) -> Any:
        if isinstance(arg, torch.fx.Node):
            return self.values[arg]
        if isinstance(arg, list | tuple):
            return type(arg)(self.argument(item) for item in arg) if type(arg) in (list, tuple) else [self.argument(item) for item in arg]
        return arg

    def read_outputs(self, program: ExportedProgram) -> tuple[Any, ...]:
        node = next(iter(program.graph_module.graph.find_nodes(op="output")))
        found = []
        for arg, spec in zip(node.args[0], program.graph_signature.output_specs, strict=True):
            if spec.kind in FUNCTIONAL:
                raise TraceError(
                    f"the model {FUNCTIONAL[spec.kind]} {spec.target} in forward, so a compiled copy would not answer the same twice",
                    ["compute the new value and return it, or keep that state outside of the model"],
                )
            found.append(self.argument(arg))
        return tuple(found)

    def _unique(self, name: str) -> str:
        candidate, number = name, 1
        while candidate in self.taken:
            candidate, number = f"{name}_{number}", number + 1
        self.taken.add(candidate)
        return candidate

    def _type(self, value: Any, node: torch.fx.Node) -> Type:
        if isinstance(value, torch.Tensor):
            return TensorType(dtype_name(value.dtype), tuple(self.dim(d, node) for d in value.shape))
        for kind, python, symbolic in _SCALARS:
            if isinstance(value, python):
                return ScalarType(kind, as_dim(value) if kind != "bool" else None)
            if isinstance(value, symbolic):
                return ScalarType(kind, self.dim(value, node) if kind == "int" else None)
        raise TraceError(f"{op_name(node.target)} gives a {type(value).__name__}, which cannot be compiled", [f"at {where(node)}"])

    def dim(self, value: Any, node: torch.fx.Node) -> Dim:
        if isinstance(value, int):
            return value
        expression = value.node.expr
        if expression not in self.dims:
            self.dims[expression] = self._rename(expression, node)
        return self.dims[expression]

    def _rename(self, expression: sympy.Expr, node: torch.fx.Node) -> Dim:
        unknown = sorted(str(s) for s in expression.free_symbols if str(s) not in self.names.symbols)
        if unknown:
            raise TraceError(
                f"the shape of {node.name} depends on the values of a tensor ({expression})",
                [f"at {where(node)}", "give the operation a fixed output size (torch.topk, padding, a mask) instead of selecting by value"],
            )
        return as_dim(expression.xreplace({s: self.names.symbols[str(s)] for s in expression.free_symbols}))


_SCALARS: tuple[tuple[Any, type, type], ...] = (
    ("bool", bool, torch.SymBool),
    ("int", int, torch.SymInt),
    ("float", float, torch.SymFloat),
)


def constant(tensor: torch.Tensor, names: tuple[str, ...], kind: Any = "parameter", persistent: bool = True) -> Const:
    """A Const over a live tensor: `load` gives the tensor itself, detached, without a copy."""
    held = tensor.detach()
    return Const(
        name=names[0],
        type=TensorType(dtype_name(tensor.dtype), tuple(tensor.shape)),
        load=lambda: held,
        names=names,
        kind=kind,
        trainable=kind == "parameter" and tensor.requires_grad,
        persistent=persistent,
        storage=names[0],
    )


def origin(node: torch.fx.Node) -> Origin:
    """Module scopes, layer index and source line from what the exporter recorded."""
    stack = node.meta.get("nn_module_stack") or {}
    scopes = tuple(
        (re.sub(r"@\d+", "", path), kind.rsplit(".", 1)[-1] if isinstance(kind, str) else kind.__name__)
        for path, kind in stack.values()
        if not str(path).startswith("_empty_nn_module_stack")
    )
    return Origin(scopes=scopes, layer=layer_of(scopes[-1][0]) if scopes else None, source=where(node) or None)


def layer_of(path: str) -> int | None:
    """Index in the outermost numbered container of a dotted path: "encoder.layer.3.output.dense" -> 3."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def where(node: torch.fx.Node) -> str:
    """`file.py:12: code` of the model's own line, without the folder; empty where it is unknown."""
    found = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', node.stack_trace or "")
    own = [entry for entry in found if "/torch/nn/" not in entry[0].replace(chr(92), "/") and not entry[0].startswith("<")]
    if not own:
        return ""
    file, line, code = own[-1]
    return f"{file.replace(chr(92), '/').rsplit('/', 1)[-1]}:{line}: {code.strip()}"


def output_names(spec: TreeSpec) -> tuple[str, ...]:
    """A name per flat output: the model's own keys joined by dots; "output" for a lone tensor, "output_0" ... in a plain tuple."""
    if spec.is_leaf():
        return ("output",)
    return tuple(_leaf_names(spec, ""))


def _leaf_names(spec: TreeSpec, prefix: str) -> Iterable[str]:
    for key, child in zip(_child_keys(spec), spec.children(), strict=True):
        name = f"{prefix}.{key}" if prefix else (str(key) if isinstance(key, str) else f"output_{key}")
        if child.is_leaf():
            yield name
        else:
            yield from _leaf_names(child, name)


def _child_keys(spec: TreeSpec) -> list[Any]:
    count = len(spec.children())
    if spec.type in (tuple, list):
        return list(range(count))
    fields = getattr(spec.context, "_fields", None)
    candidates = [spec.context, fields, *(spec.context if isinstance(spec.context, tuple | list) else ())]
    for candidate in candidates:
        if isinstance(candidate, tuple | list) and len(candidate) == count and all(isinstance(key, str) for key in candidate):
            return list(candidate)
    return list(range(count))


def _ranges(program: ExportedProgram, names: Names) -> dict[str, Range]:
    found: dict[str, Range] = {}
    for key, limits in program.range_constraints.items():
        axis = names.symbols.get(str(key))
        if isinstance(axis, sympy.Symbol):
            least = 0 if str(axis) in names.empty else 1
            found[str(axis)] = Range(max(least, _finite(limits.lower, None) or least), _finite(limits.upper, None))
    return {name: found[name] for name in map(str, dict.fromkeys(names.symbols.values())) if name in found}


def _finite(limit: Any, otherwise: int | None) -> int | None:
    """An integer limit, or `otherwise` for an infinity (or the largest representable size, which means the same)."""
    if not getattr(limit, "is_Integer", isinstance(limit, int)):
        return otherwise
    return int(limit) if abs(int(limit)) < 2**62 else otherwise
