"""RMS norms of a translated graph as one operator each, where every target has its kernel.

| pattern                                             | becomes                                                              |
|-----------------------------------------------------|----------------------------------------------------------------------|
| y = x / sqrt(mean(x^2) + eps) * gain                | RMSNormalization, from opset 23 on: ONNX has no such operator before |
| s = a + b, then y of s; s may be read by others too | com.microsoft.SkipSimplifiedLayerNormalization, s its fourth result  |

A norm in half precision that computes in float32 between two Casts is one operator as well: its kernels compute so. What is matched is
exact to rounding whatever the numbers are: axis, exponent, eps and the shapes of both operands are read from the graph, and every value
in between has no other reader. What differs in one of them stays written out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from matmorph.exporters.onnx.cleanup import remove_unused
from matmorph.exporters.onnx.emit import DOMAIN
from matmorph.exporters.onnx.placement import element_name
from matmorph.runtime.targets import TARGETS

RMS, SKIP = "RMSNormalization", "SkipSimplifiedLayerNormalization"
_NATIVE = 23
"""The first opset with an operator for the RMS norm."""

_FLOAT = ir.DataType.FLOAT
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def fuse_norms(model: ir.Model, target: Sequence[str]) -> None:
    """Replaces the patterns in the main graph in place; the results keep their names. `target`: names of execution providers."""
    graph, opset = model.graph, model.opset_imports[""]
    changed = False
    for node in list(graph):  # matched one after the other: two norms may read one sum
        norm = _native(node) if node.op_type == RMS else _written_out(node)
        if norm is None:
            continue
        total = _sum(norm.x, norm.gain) if _has_kernel(target, norm.x.dtype) else None
        if total is not None:
            _write(graph, norm, SKIP, [*total.inputs, norm.gain], {"epsilon": norm.eps}, norm.x)
            model.opset_imports.setdefault(DOMAIN, 1)
        elif opset >= _NATIVE and node.op_type != RMS:
            _write(graph, norm, RMS, [norm.x, norm.gain], {"epsilon": norm.eps, "axis": -1, "stash_type": _FLOAT.value})
        changed = True
    if changed:
        graph.sort()
        remove_unused(graph)


@dataclass(frozen=True, slots=True)
class _Norm:
    """y = x / sqrt(mean(x^2) + eps) * gain over the last axis of x; `last`: the node that makes y."""

    x: ir.Value
    gain: ir.Value
    eps: float
    last: ir.Node


def _native(node: ir.Node) -> _Norm | None:
    x, gain = node.inputs[:2]
    if x is None or gain is None or node.attributes.get_int("stash_type", 1) != _FLOAT.value or not _fits(x, gain, node.outputs[0]):
        return None
    over_last = node.attributes.get_int("axis", -1) in (-1, len(x.shape or ()) - 1)
    return _Norm(x, gain, node.attributes.get_float("epsilon", 1e-5), node) if over_last else None


def _written_out(last: ir.Node) -> _Norm | None:
    if last.op_type != "Mul":
        return None
    for scaled, gain in _both_orders(last):
        narrow = _inner(scaled, "Cast")
        normal = narrow.inputs[0] if narrow is not None else scaled
        found = _normalised(normal)
        if found is None or gain is None:
            continue
        x = _before_cast(found[0]) if narrow is not None else found[0]
        if x is not None and _fits(x, gain, last.outputs[0]):
            return _Norm(x, gain, found[1], last)
    return None


def _normalised(value: ir.Value | None) -> tuple[ir.Value, float] | None:
    """(x, eps) of x / sqrt(mean(x^2) + eps), written as a quotient or as a product with the reciprocal; computed in float32."""
    if (quotient := _inner(value, "Div")) is not None:
        pairs = [(quotient.inputs[0], _inner(quotient.inputs[1], "Sqrt"))]
    elif (product := _inner(value, "Mul")) is not None:
        pairs = [(x, _root(_inner(inverse, "Reciprocal"))) for x, inverse in _both_orders(product)]
    else:
        return None
    for x, root in pairs:
        mean = _inner(root.inputs[0], "Add") if root is not None else None
        for middle, small in _both_orders(mean) if mean is not None else ():
            eps, square = _scalar(small), _mean_of(middle)
            if eps is not None and eps >= 0 and x is not None and x.dtype == _FLOAT and _is_square(square, x):
                return x, eps
    return None


def _root(reciprocal: ir.Node | None) -> ir.Node | None:
    return None if reciprocal is None else _inner(reciprocal.inputs[0], "Sqrt")


def _mean_of(value: ir.Value | None) -> ir.Value | None:
    """What a mean over the last axis, which stays, is taken of."""
    mean = _inner(value, "ReduceMean")
    if mean is None or mean.attributes.get_int("keepdims", 1) != 1 or len(mean.inputs) != 2:
        return None
    source, axes = mean.inputs[0], _constant(mean.inputs[1])
    if source is None or source.shape is None or axes is None or axes.size != 1:
        return None
    return source if int(axes.reshape(())) in (-1, len(source.shape) - 1) else None


def _is_square(square: ir.Value | None, x: ir.Value) -> bool:
    power = _inner(square, "Pow")
    if power is not None:
        return power.inputs[0] is x and _scalar(power.inputs[1]) == 2.0
    product = _inner(square, "Mul")
    return product is not None and product.inputs[0] is x and product.inputs[1] is x


def _before_cast(x: ir.Value) -> ir.Value | None:
    """The value in half precision that x is a copy of in float32."""
    cast = x.producer()
    source = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
    return source if source is not None and source.dtype in _HALVES else None


def _fits(x: ir.Value, gain: ir.Value, y: ir.Value) -> bool:
    """One factor per feature, all in one type."""
    if x.shape is None or gain.shape is None or len(x.shape) < 2 or len(gain.shape) != 1:
        return False
    return isinstance(x.shape[-1], int) and gain.shape[0] == x.shape[-1] and x.dtype == gain.dtype == y.dtype


def _sum(x: ir.Value, gain: ir.Value) -> ir.Node | None:
    """The addition of two computed tensors of equal shape that makes x [batch, rows, features]."""
    total = x.producer()
    if total is None or total.op_type != "Add" or total.domain or x.shape is None or len(x.shape) != 3 or x.is_graph_output():
        return None
    shapes = [None if value is None or value.shape is None else list(value.shape) for value in total.inputs]
    known = all(isinstance(dim, int) or dim.value is not None for dim in x.shape)
    return total if known and all(shape == list(x.shape) for shape in shapes) else None


def _write(
    graph: ir.Graph,
    norm: _Norm,
    operator: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any],
    total: ir.Value | None = None,
) -> None:
    """Puts the operator in the place of the last node, which nothing reads any more."""
    y = norm.last.outputs[0]
    results = [_like(y)] if total is None else [_like(y), ir.Value(name=""), ir.Value(name=""), _like(total)]
    domain = DOMAIN if operator == SKIP else ""
    made = ir.node(operator, inputs, attributes, domain=domain, outputs=results, metadata_props=dict(norm.last.metadata_props))
    graph.insert_after(norm.last, made)
    y.replace_all_uses_with(results[0], replace_graph_outputs=True)
    if total is not None:
        for user, index in list(total.uses()):
            user.replace_input_with(index, results[-1])


def _like(value: ir.Value) -> ir.Value:
    return ir.Value(name=value.name, type=value.type, shape=value.shape)


def _has_kernel(target: Sequence[str], dtype: ir.DataType | None) -> bool:
    if dtype is None:
        return False
    name = element_name(dtype.value)
    return all(device in TARGETS and TARGETS[device].missing(DOMAIN, SKIP, 1, [name] * 3, [name]) is None for device in target)


def _inner(value: ir.Value | None, operator: str) -> ir.Node | None:
    """The node of ONNX's `operator` that makes a value which one node alone reads."""
    node = value.producer() if value is not None else None
    if value is None or node is None or node.op_type != operator or node.domain not in ("", "ai.onnx") or value.is_graph_output():
        return None
    return node if len({use.node for use in value.uses()}) == 1 else None


def _both_orders(node: ir.Node) -> tuple[tuple[ir.Value | None, ir.Value | None], ...]:
    first, second = node.inputs
    return (first, second), (second, first)


def _constant(value: ir.Value | None) -> Any:
    return None if value is None or value.const_value is None or value.is_graph_input() else value.const_value.numpy()


def _scalar(value: ir.Value | None) -> float | None:
    array = _constant(value)
    return float(array.reshape(())) if array is not None and array.size == 1 and array.ndim <= 1 else None
