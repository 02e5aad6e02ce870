"""A Graph as a torch module: called like the source, answering like the source, parameters under their dotted names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_unflatten

from matmorph.errors import InputError
from matmorph.ir.core import Const, Graph, Node, Value, map_values
from matmorph.ir.evaluate import bind, last_uses, run_node
from matmorph.ir.rewiring import exchanged
from matmorph.ir.text.printing import parse_graph, print_graph


class CompiledModule(torch.nn.Module):
    """Runs a Graph. Owns a copy of every weight, registered under each of its names (a tied weight is one Parameter with several): so
    `state_dict()` has the source's keys except for replaced weights, and training it leaves the source alone. Pickles as text and tensors.

    Raises InputError (a ValueError too) when it is called unlike the traced example.
    """

    def __init__(self, graph: Graph, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        super().__init__()
        self._mm_graph = graph
        self._mm_names = {const: const.path for const in graph.state}
        self._mm_dying = last_uses(graph)
        for const in graph.state:
            self._own(const, const.load().clone() if weights is None else weights[const.path])
        self.eval()

    @property
    def graph(self) -> Graph:
        """The graph that `forward` runs; its Consts still load the weights of compile time, not what training made of them."""
        return self._mm_graph

    def current_graph(self) -> Graph:
        """The graph with the weights that the module holds now, not copied. InputError where one has another type or device than then."""
        return exchanged(self._mm_graph, {const: self._now(const) for const in self._mm_graph.state})

    def _now(self, const: Const) -> Const:
        tensor, device = self._held(const).detach(), torch.device(self._mm_graph.device)
        if tensor.dtype != const.tensor.torch_dtype or tensor.device != device:
            was, now = f"{const.tensor.dtype} on {device}", f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
            raise InputError(f"the compiled module was made for {const.path} as {was}, it is {now} now: move it back")
        return replace(const, load=lambda: tensor, storage=f"{const.path} (held)")

    def _own(self, const: Const, tensor: torch.Tensor) -> None:
        held = torch.nn.Parameter(tensor, requires_grad=const.trainable) if const.kind == "parameter" else tensor
        for name in const.names:
            *parents, leaf = name.split(".")
            module: torch.nn.Module = self
            for part in parents:
                if module._modules.get(part) is None:
                    module._modules[part] = torch.nn.Module()
                module = module._modules[part]  # type: ignore[assignment]
            if isinstance(held, torch.nn.Parameter):
                module._parameters[leaf] = held
                continue
            module._buffers[leaf] = held
            if not const.persistent or const.kind == "constant":
                module._non_persistent_buffers_set.add(leaf)

    def _held(self, const: Const) -> torch.Tensor:
        *parents, leaf = self._mm_names[const].split(".")
        module: torch.nn.Module = self
        for part in parents:
            module = module._modules[part]  # type: ignore[assignment]
        held = module._parameters.get(leaf, module._buffers.get(leaf))
        if held is None:
            raise InputError(f"the module has no weight {const.path}: it was removed after compilation")
        return held

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        graph = self._mm_graph
        known: dict[Value, Any] = dict(zip(graph.inputs, bind(graph, args, kwargs), strict=True))
        device = next((tensor.device for tensor in known.values() if isinstance(tensor, torch.Tensor)), torch.device(graph.device))

        def read(value: Value) -> Any:
            return self._held(value) if isinstance(value, Const) else known[value]

        for node in graph.nodes:
            known.update(zip(node.outputs, run_node(_moved(node, graph.device, device), read), strict=True))
            for value in self._mm_dying.get(node, ()):
                known.pop(value, None)
        return tree_unflatten([map_values(output, read) for output in graph.outputs], graph.signature.out_spec)

    def __reduce__(self) -> tuple[Any, ...]:
        weights = {const.path: self._held(const).detach() for const in self._mm_graph.state}
        trains = {const.path: self._held(const).requires_grad for const in self._mm_graph.state}
        signature = self._mm_graph.signature
        # The classes travel too: importing them registers them as pytrees, which reading the text needs.
        classes = (*_classes(signature.in_spec), *_classes(signature.out_spec))
        return _rebuild, (print_graph(self._mm_graph), weights, trains, self.training, classes)


def _rebuild(text: str, weights: Mapping[str, torch.Tensor], trains: Mapping[str, bool], training: bool, classes: Any) -> CompiledModule:
    module = CompiledModule(parse_graph(text, weights), weights)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trains.get(name, parameter.requires_grad))
    return module.train(training)


def _classes(spec: TreeSpec) -> tuple[type, ...]:
    own = () if spec.is_leaf() or spec.type is None else (spec.type,)
    return (*own, *(kind for child in spec.children() for kind in _classes(child)))


def _moved(node: Node, traced: str, device: torch.device) -> Node:
    """The node with the traced device, baked in as a literal by the trace (`arange(device=cpu)`), replaced by the inputs' device."""
    old = torch.device(traced)
    if old == device or not any(isinstance(value, torch.device) for value in (*node.args, *node.attrs.values())):
        return node

    def swap(value: Any) -> Any:
        return device if value == old and isinstance(value, torch.device) else value

    return Node(node.op, tuple(map(swap, node.args)), node.outputs, {k: swap(v) for k, v in node.attrs.items()}, node.origin)


def to_torch(graph: Graph) -> CompiledModule:
    """The module of a graph, in eval mode on the graph's device. It copies the weights: memory of the whole model."""
    return CompiledModule(graph)
