"""A functional ExportedProgram translated to onnx_ir, operator by operator, with the translations of onnxscript's torchlib.

Only this file and `prepare` touch torch's private exporter; torch.onnx.export(optimize=False) gives the same graph and takes several times
as long.
"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch
import torch.fx
from onnxscript import version_converter
from onnxscript.function_libs.torch_lib import ops as _torchlib_ops
from onnxscript.function_libs.torch_lib.registration import default_registry
from torch.export import ExportedProgram
from torch.onnx._internal.exporter import _core, _registration
from torch.onnx._internal.exporter._torchlib import _torchlib_registry

from matmorph.errors import ExportError
from matmorph.exporters.onnx.prepare import decompose_unknown, promote_types, remove_checks
from matmorph.ir.core import Origin
from matmorph.ir.ops import resolve

OPSETS = range(18, 24)
"""ONNX opsets an export may ask for: torchlib writes 18 and later; ONNX Runtime's kernels and the converter are complete up to 23."""

Lowerings = Mapping[Any, Callable[..., Any]]
"""Translations of a user's own operators: torch operator (overload, or packet for its default overload) -> onnxscript function."""


def lower(program: ExportedProgram, opset: int = 21, onnx_lowerings: Lowerings | None = None) -> ir.Model:
    """The ONNX form of a program that went through `run_decompositions({})`. The program is changed and must not be used afterwards.

    Weights become initializers under their dotted names with the program's own (real or fake) tensors; values keep the names of the fx
    nodes; every ONNX node has its module path in `metadata_props["matmorph.path"]` and its fx node in `meta["node"]`.
    Raises ExportError for an opset out of range and for an operator that has no translation (naming it and its module).
    """
    if opset not in OPSETS:
        raise ExportError(
            f"opset {opset} is not possible; export.opset takes {OPSETS.start} to {OPSETS.stop - 1} (21 is the tested default)"
        )
    library = _Library(opset, onnx_lowerings or {})
    with _quiet(), torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        module = program.graph_module
        remove_checks(module)
        stuck = decompose_unknown(module, library.knows)
        if stuck:
            raise _no_translation(stuck)
        _name_results(program)
        promote_types(module)
        model = _translate(program, library.registry(_targets(module)))
    _describe(model)
    try:
        version_converter.convert_version(model, opset)
    except Exception as error:
        raise ExportError(f"the graph cannot be written in opset {opset}", _chain(error)) from error
    return model


def translated(opset: int, onnx_lowerings: Lowerings) -> Callable[[str], bool]:
    """Says of an operator's name whether it has a translation of its own."""
    library = _Library(opset, onnx_lowerings)

    def known(op: str) -> bool:
        target = resolve(op)
        return library.knows(target) or not isinstance(target, torch._ops.OpOverload)

    return known


def record(node: ir.Node) -> None:
    """Adds a node from within a translation: for operators that onnxscript has no schema of."""
    if _core.current_tracer is None:
        raise ExportError(f"{node.op_type} can only be made while a graph is translated")
    _core.current_tracer.nodes.append(node)


class _Library:
    """torchlib's translations by operator. Signatures are computed only for the operators in use: for all of them it takes a second."""

    def __init__(self, opset: int, own: Lowerings) -> None:
        self.opset = opset
        self.own = {op.default if isinstance(op, torch._ops.OpOverloadPacket) else op: function for op, function in own.items()}
        self.modern = [meta for meta in _torchlib_registry.get_torchlib_ops() if meta.opset_introduced <= opset]
        _ = _torchlib_ops  # importing it fills `default_registry`
        self.names = {*map(_key, self.own), *(_key(meta.fx_target) for meta in self.modern), *default_registry}

    def knows(self, target: Any) -> bool:
        return _key(target) in self.names

    def registry(self, targets: set[Any]) -> _registration.ONNXRegistry:
        """A registry with the operators in use: torchlib's newest translation for the opset, a user's own before it."""
        registry = _registration.ONNXRegistry()
        registry._opset_version = self.opset
        keys = {_key(target): target for target in targets}
        for meta in self.modern:
            if _key(meta.fx_target) in keys:
                registry._register(meta.fx_target, meta)
        for key, target in keys.items():
            if key in default_registry:
                found = default_registry[key]
                for function, is_complex in [*((f, False) for f in found.overloads), *((f, True) for f in found.complex)]:
                    registry._register(target, _registration.OnnxDecompMeta(function, target, signature=None, is_complex=is_complex))
        registry._cleanup_registry_based_on_opset_version()
        for op, function in self.own.items():
            registry.register_op(op, function)
            signature = registry.get_decomps(op)[0].signature
            if signature is not None and not signature.outputs:
                raise ExportError(
                    f"onnx_lowerings: the translation of {op} has no annotated result",
                    ["annotate its arguments and its result, as in `def f(x: FLOAT) -> FLOAT` with onnxscript's types"],
                )
        return registry


_SHIFTS: Mapping[Any, str] = {operator.lshift: "_operator::__lshift__", operator.rshift: "_operator::__rshift__"}
"""Operators that torchlib calls by their other name."""


def _key(target: Any) -> Any:
    """The name torchlib uses: "aten::add.Tensor", "aten::linear", "_operator::mul"; another callable stands for itself."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target.name()).removesuffix(".default")  # type: ignore[no-untyped-call]
    module = getattr(target, "__module__", None)
    if module in ("_operator", "math"):
        return _SHIFTS.get(target, f"{module}::{target.__name__}")
    return target


def _targets(module: torch.fx.GraphModule) -> set[Any]:
    parts = (part for part in module.modules() if isinstance(part, torch.fx.GraphModule))
    return {node.target for part in parts for node in part.graph.nodes if node.op == "call_function"}


def _name_results(program: ExportedProgram) -> None:
    """The signature calls its results as the graph does: what a decomposition puts in a result's place may have had a name before."""
    results: Any = next(iter(program.graph.find_nodes(op="output"))).args[0]
    for spec, result in zip(program.graph_signature.output_specs, results, strict=True):
        if isinstance(result, torch.fx.Node):
            spec.arg.name = result.name


def _translate(program: ExportedProgram, registry: _registration.ONNXRegistry) -> ir.Model:
    try:
        return _core._exported_program_to_onnx_program(program, registry=registry).model
    except Exception as error:
        reasons = list(_chain(error))
        raise ExportError("the graph cannot be translated to ONNX", [*reasons, *_ADVICE]) from error


def _chain(error: BaseException) -> Iterator[str]:
    """First line of each exception, outermost first."""
    current: BaseException | None = error
    while current is not None:
        yield str(current).splitlines()[0] if str(current) else type(current).__name__
        current = current.__cause__


_ADVICE = ("pass onnx_lowerings={torch.ops.<namespace>.<name>.default: <onnxscript function>}, or replace the operator in the model",)


def _no_translation(nodes: tuple[torch.fx.Node, ...]) -> ExportError:
    first = nodes[0]
    others = sorted({str(node.target) for node in nodes} - {str(first.target)})
    details = [f"also without one: {', '.join(others)}"] if others else []
    where = module_path(first)
    return ExportError(f"operator {first.target} has no ONNX translation" + (f", used in {where}" if where else ""), [*details, *_ADVICE])


def module_path(node: torch.fx.Node) -> str:
    """Dotted path of the module whose forward made the node; empty for the root or where the trace does not know it."""
    origin = node.meta.get("matmorph_origin")
    if isinstance(origin, Origin):
        return origin.path
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path).split("@", 1)[0] for path, _ in stack.values()]
    return next((path for path in reversed(paths) if not path.startswith("_empty_nn_module_stack")), "")


def _describe(model: ir.Model) -> None:
    """Replaces the exporter's metadata (stack traces, class hierarchies: half of a small file) by module path, rule and spec position."""
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *model.graph.outputs):
        value.metadata_props.clear()
    nodes = [*model.graph.all_nodes(), *(node for function in model.functions.values() for node in function.all_nodes())]
    for node in nodes:
        node.metadata_props.clear()
        source = node.meta.get("node")
        if not isinstance(source, torch.fx.Node):
            continue
        origin = source.meta.get("matmorph_origin", Origin())
        facts = {"matmorph.path": module_path(source), "matmorph.rule": origin.rule, "matmorph.origin": origin.location}
        node.metadata_props.update({key: fact for key, fact in facts.items() if fact})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter logs what it skips (constant outputs, torchvision); none of that concerns a user, errors are raised anyway."""
    logger = logging.getLogger("torch.onnx._internal.exporter")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
