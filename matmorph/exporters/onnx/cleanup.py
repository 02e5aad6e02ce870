"""Our own clean-up of a translated graph. Weights are never renamed, folded, transposed or merged, and no float arithmetic is simplified
(dropping `x + 1e-8` as a no-op is how a general optimiser loses an optimizer's eps).

One forward walk folds shape arithmetic, removes copies and casts to the same type, and merges equal shape computations; then unused
nodes go, and the constants that remain become small initializers named by their value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from matmorph.exporters.onnx.folding import constant_value, fold
from matmorph.runtime.format.cases import Array

# fmt: off
_MERGED = frozenset([
    "Shape", "Squeeze", "Unsqueeze", "Reshape", "Concat", "Cast", "Range", "Gather", "Slice", "Add", "Sub", "Mul", "Div", "Mod",
    "Neg", "Expand", "Transpose", "And", "Or", "Not", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Max", "Min",
    "ConstantOfShape", "Size",
])
# fmt: on
"""Operators of shape and mask arithmetic: two equal ones are one, as long as no float is computed."""


def clean(model: ir.Model) -> None:
    """Cleans the main graph in place; bodies of control flow keep their nodes. Values and weights that remain mean what they meant."""
    graph = model.graph
    walk = _Walk(graph, frozenset(graph.initializers.values()))
    for node in list(graph):
        walk.visit(node)
    walk.place_constants()
    remove_unused(graph)


class _Walk:
    """State of the forward walk: known constants, and nodes by what they compute."""

    def __init__(self, graph: ir.Graph, weights: frozenset[ir.Value]) -> None:
        self.graph = graph
        self.weights = weights
        self.fixed = set(weights)  # and what is computed from nothing but weights and constants
        self.known: dict[ir.Value, Array] = {}
        self.seen: dict[Any, ir.Node] = {}
        self.splits: dict[ir.Node, ir.Node] = {}

    def visit(self, node: ir.Node) -> None:
        if node.op_type == "Constant" and (value := constant_value(node)) is not None:
            self.known[node.outputs[0]] = value
            return
        if any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()):
            return
        self._settle_type(node)
        inputs = [self.known.get(value) if value is not None else None for value in node.inputs]
        constant = node.inputs and all(found is not None for found, value in zip(inputs, node.inputs, strict=True) if value is not None)
        if constant and (value := fold(node, inputs)) is not None:
            self.known[node.outputs[0]] = value
            return
        if node.op_type == "Concat":
            self._join_constants(node)
        if node.op_type == "SequenceAt" and (part := self._part_of_split(node)) is not None:
            self._replace(node.outputs[0], part)
            return
        for rule in _COPIES.get(node.op_type, ()):
            source = rule(node, self.known)
            if source is not None and self._replace(node.outputs[0], source):
                return
        if node.op_type == "Shape" and (value := _static_shape(node)) is not None:
            self.known[node.outputs[0]] = value
            return
        self._merge(node)

    def _settle_type(self, node: ir.Node) -> None:
        """CastLike becomes a Cast, which folds and reads better."""
        target = self._dtype(node.inputs[1]) if node.op_type == "CastLike" else None
        if target is not None:
            node.op_type = "Cast"
            node.resize_inputs(1)
            node.attributes.add(ir.AttrInt64("to", target.value))

    def _dtype(self, value: ir.Value | None) -> ir.DataType | None:
        if value is None:
            return None
        return ir.DataType.from_numpy(self.known[value].dtype) if value in self.known else value.dtype

    def _join_constants(self, node: ir.Node) -> None:
        """Neighbouring constants of a Concat become one: `[batch, seq, 12, 64]` is three inputs, not four."""
        runs: list[list[ir.Value]] = []
        for value in node.inputs:
            if value is None:
                return
            if runs and value in self.known and runs[-1][0] in self.known:
                runs[-1].append(value)
            else:
                runs.append([value])
        if len(runs) == len(node.inputs):
            return
        merged = [run[0] if len(run) == 1 else self._constant(np.concatenate([self.known[v] for v in run], _axis(node))) for run in runs]
        node.resize_inputs(len(merged))
        for index, value in enumerate(merged):
            node.replace_input_with(index, value)

    def _part_of_split(self, node: ir.Node) -> ir.Value | None:
        """`SequenceAt(SplitToSequence(x), i)` is output i of a Split, which every provider runs and which needs no sequence type."""
        sequence = node.inputs[0].producer() if node.inputs[0] is not None else None
        index = self.known.get(node.inputs[1]) if node.inputs[1] is not None else None
        if sequence is None or index is None or sequence.op_type != "SplitToSequence":
            return None
        if sequence not in self.splits:
            sizes = self._split_sizes(sequence)
            if sizes is None:
                return None
            inputs = [sequence.inputs[0], self._constant(np.asarray(sizes, np.int64))]
            attributes = {"axis": sequence.attributes["axis"].value if "axis" in sequence.attributes else 0}
            split = ir.node("Split", inputs, attributes, num_outputs=len(sizes), metadata_props=dict(sequence.metadata_props))
            self.graph.insert_after(sequence, split)
            self.splits[sequence] = split
        return self.splits[sequence].outputs[int(index)]

    def _split_sizes(self, sequence: ir.Node) -> list[int] | None:
        """Sizes of the parts, where they are constants and the parts keep the axis."""
        data, keeps = sequence.inputs[0], sequence.attributes.get("keepdims")
        given = self.known.get(sequence.inputs[1]) if len(sequence.inputs) > 1 and sequence.inputs[1] is not None else None
        if given is None or data is None or (keeps is not None and not keeps.value):
            return None
        if given.ndim == 1:
            return [int(size) for size in given]
        axis = sequence.attributes["axis"].value if "axis" in sequence.attributes else 0
        whole = data.shape[axis] if data.shape is not None else None
        if not isinstance(whole, int):
            return None
        size = int(given)
        return [min(size, whole - start) for start in range(0, whole, size)]

    def _constant(self, array: Array) -> ir.Value:
        """A new known value; `place_constants` gives it its name and storage."""
        value = ir.Value(name=None, type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=ir.Shape(array.shape))
        self.known[value] = array
        return value

    def _replace(self, old: ir.Value, new: ir.Value) -> bool:
        """Lets `new` stand for `old`; an output of the graph stays where its source is an input, a weight, a constant or an output."""
        if old.is_graph_output():
            if new.producer() is None or new.is_graph_output() or new in self.known:
                return False
            for index, output in enumerate(self.graph.outputs):
                if output is old:
                    self.graph.outputs[index] = new
        if new.dtype is None and old.dtype is not None:
            new.dtype = old.dtype
        if new.shape is None and old.shape is not None:
            new.shape = old.shape
        old.replace_all_uses_with(new)
        return True

    def _merge(self, node: ir.Node) -> None:
        if node.op_type not in _MERGED or len(node.outputs) != 1:
            return
        if all(value is None or value in self.fixed or value in self.known for value in node.inputs):
            self.fixed.add(node.outputs[0])
        if not self._mergeable(node):
            return
        key = (
            node.op_type,
            node.domain,
            tuple(map(self._identity, node.inputs)),
            tuple(sorted(map(_attribute_key, node.attributes.values()))),
        )
        first = self.seen.setdefault(key, node)
        if first is not node:
            self._replace(node.outputs[0], first.outputs[0])

    def _mergeable(self, node: ir.Node) -> bool:
        """Not a float computation, or one of weights alone (one weight applied several times)."""
        if node.op_type == "Shape" or node.outputs[0] in self.fixed:
            return True
        known = [dtype for value in (*node.inputs, *node.outputs) if (dtype := self._dtype(value)) is not None]
        return node.op_type != "Transpose" and bool(known) and not any(dtype.is_floating_point() for dtype in known)

    def _identity(self, value: ir.Value | None) -> Any:
        return _array_key(self.known[value]) if value in self.known else id(value)

    def place_constants(self) -> None:
        """Known values that are still read become initializers, one per distinct value: `int64[0,-1]`, `float32(0.5)`."""
        for value in self.known:
            node = value.producer()
            if node is not None:
                for index in range(len(node.inputs)):
                    node.replace_input_with(index, None)
                self.graph.remove(node, safe=False)
        made: dict[Any, ir.Value] = {}
        taken = set(self.graph.initializers)
        for value, array in self.known.items():
            if not value.uses() and not value.is_graph_output():
                continue
            key = _array_key(array)
            if key not in made:
                made[key] = _initializer(self.graph, array, taken)
            if value.is_graph_output():
                self.graph.append(ir.node("Identity", [made[key]], outputs=[_fresh_output(self.graph, value)]))
            value.replace_all_uses_with(made[key])


def _fresh_output(graph: ir.Graph, old: ir.Value) -> ir.Value:
    new = ir.Value(name=old.name, type=old.type, shape=old.shape)
    for index, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[index] = new
    return new


def _initializer(graph: ir.Graph, array: Array, taken: set[str]) -> ir.Value:
    name = unique(_constant_name(array), taken)
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=ir.Shape(array.shape))
    value.const_value = ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
    graph.register_initializer(value)
    return value


def _constant_name(array: Array) -> str:
    dtype = array.dtype.name
    items = ",".join(str(item) for item in array.ravel()[:8])
    if array.ndim == 0:
        return f"{dtype}({items})"
    if array.ndim == 1 and array.size <= 8:
        return f"{dtype}[{items}]"
    return f"{dtype}[{'x'.join(map(str, array.shape))}]"


def unique(name: str, taken: set[str]) -> str:
    """`name`, or `name_1` ... where it is taken; what is returned is added to `taken`."""
    candidate, number = name, 1
    while candidate in taken:
        candidate, number = f"{name}_{number}", number + 1
    taken.add(candidate)
    return candidate


def _array_key(array: Array) -> Any:
    return (array.dtype.name, array.shape, array.tobytes())


def _attribute_key(attribute: ir.Attr) -> tuple[str, str]:
    value = attribute.value
    return attribute.name, repr(value.numpy().tolist()) + str(value.dtype) if attribute.type is ir.AttributeType.TENSOR else repr(value)


def _axis(node: ir.Node) -> int:
    return int(node.attributes["axis"].value)


def _same(node: ir.Node, known: Mapping[ir.Value, Array]) -> ir.Value | None:
    return node.inputs[0]


def _same_type(node: ir.Node, known: Mapping[ir.Value, Array]) -> ir.Value | None:
    source = node.inputs[0]
    return source if source is not None and source.dtype is not None and source.dtype == node.attributes["to"].value else None


def _same_order(node: ir.Node, known: Mapping[ir.Value, Array]) -> ir.Value | None:
    order = node.attributes.get("perm")
    return node.inputs[0] if order is not None and list(order.value) == sorted(order.value) else None


def _whole(node: ir.Node, known: Mapping[ir.Value, Array]) -> ir.Value | None:
    """A Slice from 0 to the largest integer in steps of 1."""
    bounds = [known[value] for value in node.inputs[1:] if value is not None and value in known]
    if len(bounds) < 2 or len(bounds) < len(node.inputs) - 1:
        return None
    start, end = bounds[:2]
    steps = bounds[3] if len(bounds) > 3 else np.ones(1)
    unlimited = np.iinfo(np.int64).max - 1
    return node.inputs[0] if np.all(start == 0) and np.all(end >= unlimited) and np.all(steps == 1) else None


def _one_size(node: ir.Node, known: Mapping[ir.Value, Array]) -> ir.Value | None:
    """`Reshape(Squeeze(Shape(x, i, i+1)), [-1])`: the one-element shape itself."""
    target = known.get(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if target is None or target.tolist() not in ([-1], [1], [0] if node.op_type == "Unsqueeze" else [-1]):
        return None
    squeeze = node.inputs[0].producer() if node.inputs[0] is not None else None
    if squeeze is None or squeeze.op_type != "Squeeze" or squeeze.inputs[0] is None:
        return None
    shape = squeeze.inputs[0].producer()
    if shape is None or shape.op_type != "Shape" or not {"start", "end"} <= set(shape.attributes):
        return None
    return squeeze.inputs[0] if shape.attributes["end"].value - shape.attributes["start"].value == 1 else None


def _static_shape(node: ir.Node) -> Array | None:
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is None:
        return None
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    dims = list(shape)[attributes.get("start", 0) : attributes.get("end")]
    return np.asarray(dims, np.int64) if all(isinstance(d, int) for d in dims) else None


_COPIES: Mapping[str, Sequence[Callable[[ir.Node, Mapping[ir.Value, Array]], ir.Value | None]]] = {
    "Identity": (_same,),
    "Cast": (_same_type,),
    "Transpose": (_same_order,),
    "Slice": (_whole,),
    "Reshape": (_one_size,),
}


def remove_unused(graph: ir.Graph) -> None:
    """Drops nodes whose results nothing reads, then initializers that nothing reads."""
    for node in reversed(graph):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def name_everything(model: ir.Model, fixed: Iterable[str]) -> None:
    """Unique readable names: nodes `module.path/Operator`, values the trace's name, or their node's where the translation invented one."""
    taken_nodes: set[str] = set()
    taken_values = set(fixed)
    outputs = set(model.graph.outputs)
    for node in model.graph.all_nodes():
        path = node.metadata_props.get("matmorph.path", "")
        node.name = unique(f"{path}/{node.op_type}" if path else node.op_type, taken_nodes)
        for index, value in enumerate(node.outputs):
            if value in outputs or value.name == "":  # an optional result that nobody asked for
                continue
            invented = value.name is None or value.name.startswith("val_")
            name = node.name + (f":{index}" if len(node.outputs) > 1 else "") if invented else str(value.name)
            value.name = unique(name, taken_values)
