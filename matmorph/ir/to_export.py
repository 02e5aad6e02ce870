"""A Graph as a `torch.export.ExportedProgram` on fake weights: the form that ONNX lowering takes. No weight is loaded.

Only constants that a node reads become placeholders. `node.meta` carries what the ONNX exporter looks at: `val` (a fake tensor or a
symbolic number), `nn_module_stack` (module scopes) and our own `matmorph_origin`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)

from matmorph.ir.core import Const, Graph, Node, Origin, Value
from matmorph.ir.infer import Inference, propagate
from matmorph.ir.ops import resolve
from matmorph.ir.tracing.trace import quiet

_KINDS = {"parameter": InputKind.PARAMETER, "buffer": InputKind.BUFFER, "constant": InputKind.CONSTANT_TENSOR}


def to_exported_program(graph: Graph) -> ExportedProgram:
    """Placeholders: used constants in `state` order (PARAMETER, BUFFER, CONSTANT_TENSOR; target = `Const.path`), then inputs in order
    (None for an input that was a literal). Symbols are those of a new shape environment; `graph.inputs` name them."""
    inference = Inference(graph.ranges, graph.device)
    writer = _Writer(inference, propagate(graph, inference))
    consts = graph.used_state()
    specs = [writer.const(const) for const in consts]
    specs += [writer.entry(entry.name, entry.value, entry.literal) for entry in graph.signature.inputs]
    writer.write(graph.nodes)
    # A result that is a plain number has no place in a file of tensors; the manifest lists what there is.
    results = tuple(writer.argument(output) if isinstance(output, Value) else None for output in graph.outputs)
    writer.fx.output(results).meta["val"] = tuple(_meta(result) for result in results)
    module = torch.fx.GraphModule(writer.root, writer.fx)
    signature = ExportGraphSignature(specs, [OutputSpec(OutputKind.USER_OUTPUT, _output(result), None) for result in results])
    calls = ModuleCallSignature(
        inputs=[spec.arg for spec in specs if spec.kind is InputKind.USER_INPUT],
        outputs=[spec.arg for spec in signature.output_specs],
        in_spec=graph.signature.in_spec,
        out_spec=graph.signature.out_spec,
    )
    fakes = {const.path: writer.values[const].meta["val"] for const in consts}
    with quiet():
        return ExportedProgram(
            root=module,
            graph=writer.fx,
            graph_signature=signature,
            state_dict={const.path: _held(const, fakes[const.path]) for const in consts if const.kind != "constant" and const.persistent},
            range_constraints=dict(inference.value_ranges()),
            module_call_graph=[ModuleCallEntry("", calls)],
            constants={const.path: fakes[const.path] for const in consts if const.kind == "constant" or not const.persistent},
        )


class _Writer:
    """Writes IR nodes into one fx graph, sub-graphs of higher-order operators into sub-modules of `root`."""

    def __init__(self, inference: Inference, fakes: Mapping[Value, Any]) -> None:
        self.inference = inference
        self.fakes = fakes
        self.fx = torch.fx.Graph()
        self.root = torch.nn.Module()
        self.values: dict[Value, torch.fx.Node] = {}

    def const(self, const: Const) -> InputSpec:
        node = self._placeholder(const, f"{const.kind[0]}_{_identifier(const.path)}")
        return InputSpec(_KINDS[const.kind], TensorArgument(node.name), const.path, const.persistent if const.kind == "buffer" else None)

    def entry(self, name: str, value: Value | None, literal: Any) -> InputSpec:
        if value is None:
            node = self.fx.placeholder(_identifier(name))
            node.meta["val"] = literal
            return InputSpec(InputKind.USER_INPUT, ConstantArgument(node.name, literal), None)
        return InputSpec(InputKind.USER_INPUT, TensorArgument(self._placeholder(value, _identifier(name)).name), None)

    def _placeholder(self, value: Value, name: str) -> torch.fx.Node:
        node = self.fx.placeholder(name)
        # Fakes of equal type are one object; a retrace would take two such placeholders for one tensor.
        node.meta["val"] = self.inference.fresh(value.type)
        self.values[value] = node
        return node

    def write(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            self._write(node)

    def _write(self, node: Node) -> None:
        args = tuple(self.argument(arg) for arg in node.args)
        attrs = {name: self.argument(arg) for name, arg in node.attrs.items()}
        several = len(node.outputs) != 1 or _returns_list(node.op)
        made = self.fx.call_function(resolve(node.op), args, attrs)
        values = [self.fakes[value] for value in node.outputs]
        made.meta.update(val=values if several else values[0], nn_module_stack=_stack(node.origin), matmorph_origin=node.origin)
        if not several:
            self.values[node.output] = made
            return
        for index, value in enumerate(node.outputs):
            part = self.fx.call_function(operator.getitem, (made, index))
            part.meta.update(made.meta, val=values[index])
            self.values[value] = part

    def argument(self, arg: Any) -> Any:
        if isinstance(arg, Value):
            return self.values[arg]
        if isinstance(arg, Graph):
            return self._body(arg)
        if isinstance(arg, tuple | list):
            return type(arg)(self.argument(item) for item in arg)
        return arg

    def _body(self, body: Graph) -> torch.fx.Node:
        inner = _Writer(self.inference, propagate(body, self.inference))
        for entry in body.signature.inputs:
            if entry.value is not None:
                inner._placeholder(entry.value, entry.name)
        inner.write(body.nodes)
        results = tuple(inner.argument(output) for output in body.outputs)
        inner.fx.output(results).meta["val"] = tuple(_meta(result) for result in results)
        name = f"body_{len(self.root._modules)}"
        self.root.add_module(name, torch.fx.GraphModule(inner.root, inner.fx))
        return self.fx.get_attr(name)


def _identifier(name: str) -> str:
    """A Python name: slices of a weight have brackets in theirs."""
    return re.sub(r"\W", "_", name)


def _held(const: Const, fake: torch.Tensor) -> torch.Tensor:
    return torch.nn.Parameter(fake, requires_grad=False) if const.kind == "parameter" else fake


def _returns_list(op: str) -> bool:
    """Whether the operator gives a list or a tuple even when that has one entry (split into one part, cond)."""
    target = resolve(op)
    schema = getattr(target, "_schema", None)
    if schema is None:
        return op.startswith("higher_order.")
    return len(schema.returns) != 1 or str(schema.returns[0].type).startswith("List")


def _stack(origin: Origin) -> dict[str, tuple[str, str]]:
    return {f"L__self__{path}": (path, kind) for path, kind in origin.scopes}


def _meta(result: Any) -> Any:
    return result.meta["val"] if isinstance(result, torch.fx.Node) else result


def _output(result: Any) -> Any:
    if not isinstance(result, torch.fx.Node):
        return ConstantArgument("", result)
    kind = SymIntArgument if isinstance(result.meta["val"], torch.SymInt | int) else TensorArgument
    return kind(name=result.name)
