"""A model for ONNX's own tools before its weights have data: every initializer stands among the inputs."""

from __future__ import annotations

import onnx
import onnx_ir as ir


def bare_proto(model: ir.Model) -> onnx.ModelProto:
    """The model is as it was afterwards."""
    graph = model.graph
    inputs, initializers = list(graph.inputs), dict(graph.initializers)
    graph.inputs.extend(value for value in initializers.values() if not value.is_graph_input())
    graph.initializers.clear()
    try:
        return ir.to_proto(model)
    finally:
        graph.inputs.clear()
        graph.inputs.extend(inputs)
        graph.initializers.update(initializers)


def fixed_names(model: ir.Model) -> frozenset[str]:
    """Initializers that no caller can override."""
    return frozenset(str(value.name) for value in model.graph.initializers.values() if not value.is_graph_input())
