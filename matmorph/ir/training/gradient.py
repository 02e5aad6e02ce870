"""Training graphs: loss and gradient of a graph with respect to some of its weights, as a graph again.

The trainables travel as one flat vector `theta`, in the order given, row-major, in float32 (float64 where one of them is); they are cut out
of it, shaped and cast inside, and the gradient comes back the same way. Every other weight stays the constant it was, under its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from matmorph.errors import InputError, did_you_mean
from matmorph.ir.build import Builder, unique_name
from matmorph.ir.core import Const, Graph, Input, Node, Origin, Signature, Value
from matmorph.ir.infer import Inference
from matmorph.ir.rewiring import needed, rewired
from matmorph.ir.training.adjoints.table import ADJOINT_RULES
from matmorph.ir.training.adjoints.tape import Tape, is_float
from matmorph.ir.training.gradient_cleanup import simplify_gradient
from matmorph.ir.training.losses import Loss, Written, judged, label_inputs, tensor_outputs, write_loss
from matmorph.ir.training.narrowing import narrow
from matmorph.ir.types import Dim, TensorType
from matmorph.runtime.format.training import COUNT, GRADIENT, LOSS, LOSS_SCALE, THETA

_LOSS_ORIGIN = Origin(scopes=(("loss", "Loss"),))
_THETA_ORIGIN = Origin(scopes=(("theta", "Parameters"),))


def gradient_graph(graph: Graph, trainables: Sequence[Const], loss: Loss, keep_outputs: Sequence[str] = ()) -> Graph:
    """Inputs: `theta` [n], those of `graph`, the labels of the loss, `loss_scale` []. Outputs: `loss` [], `count` [], `grad` [n], then
    the model outputs named in `keep_outputs`. `grad` is that of loss * loss_scale; `loss` itself is not scaled.

    Raises InputError for trainables that are no weights of the graph, are not floating-point, come twice, or none of which reaches the
    loss; for names that the model has already; for a loss that does not fit (`losses.label_inputs`). ExportError where an operator on the
    way from a trainable to the loss cannot be differentiated.
    """
    outputs = tensor_outputs(graph)
    for name in keep_outputs:
        if name not in outputs:
            raise InputError(f"the model has no output {name} to keep; its outputs are {', '.join(outputs)}{did_you_mean(name, outputs)}")
    _check_outputs(keep_outputs)
    kept = {name: outputs[name] for name in keep_outputs}
    read = outputs if loss.function is not None else (judged(loss, graph)[0], *keep_outputs)
    return simplify_gradient(_Draft.of(narrow(graph, read), trainables, loss, scaled=True).with_gradient(kept))


def loss_graph(graph: Graph, trainables: Sequence[Const], loss: Loss) -> Graph:
    """Like `gradient_graph` without `loss_scale` and `grad`, and with every output of the model. Raises the same errors."""
    outputs = tensor_outputs(graph)
    _check_outputs(outputs)
    return _Draft.of(graph, trainables, loss, scaled=False).without_gradient(outputs)


@dataclass(frozen=True, slots=True, eq=False)
class _Draft:
    """A graph under construction: `nodes` are the model's and the loss's on the model's own weights, `inputs` are those of the result."""

    graph: Graph
    trainables: tuple[Const, ...]
    inputs: Mapping[str, Value]
    entries: tuple[Input, ...]
    nodes: tuple[Node, ...]
    written: Written
    taken: frozenset[str]
    inference: Inference
    constants: tuple[Const, ...]

    @classmethod
    def of(cls, graph: Graph, trainables: Sequence[Const], loss: Loss, *, scaled: bool) -> _Draft:
        _check_trainables(graph, trainables)
        inference = Inference(graph.ranges, graph.device)
        taken = {value.name for node in graph.nodes for value in node.outputs} | {v.name for v in (*graph.inputs, *graph.state)}
        master = "float64" if any(const.tensor.dtype == "float64" for const in trainables) else "float32"
        total = sum(const.numel for const in trainables)
        types = {THETA: TensorType(master, (total,)), **dict(label_inputs(loss, graph))}
        if scaled:
            types[LOSS_SCALE] = TensorType(master, ())
        _check_names(graph, types)
        made = {name: Value(unique_name(name, taken), type) for name, type in types.items()}
        labels = {name: value for name, value in made.items() if name not in (THETA, LOSS_SCALE)}
        b = Builder(graph, taken, origin=_LOSS_ORIGIN, inference=inference)
        written = write_loss(b, inference, loss, graph, labels)
        nodes = (*graph.nodes, *b.nodes)
        taken |= {value.name for node in b.nodes for value in node.outputs} | {const.name for const in b.consts}
        entries = [Input(THETA, made[THETA]), *graph.signature.inputs]
        entries += [Input(name, value) for name, value in made.items() if name != THETA]
        return cls(graph, tuple(trainables), made, tuple(entries), nodes, written, frozenset(taken), inference, tuple(b.consts))

    def without_gradient(self, kept: Mapping[str, Value]) -> Graph:
        b = Builder(self.graph, self.taken, inference=self.inference)
        env = self._cut_out(b)
        b.nodes += [rewired(node, env) for node in self.nodes]
        results = {LOSS: self.written.loss, COUNT: self.written.count, **{name: env.get(value, value) for name, value in kept.items()}}
        return self._finished(b, results)

    def with_gradient(self, kept: Mapping[str, Value]) -> Graph:
        wanted = self._on_the_way()
        if self.written.loss not in wanted:
            names = ", ".join(const.path for const in self.trainables[:5])
            raise InputError(f"the loss does not depend on anything that trains ({names})")
        b = Builder(self.graph, self.taken, inference=self.inference)
        env = self._cut_out(b)
        tape = Tape(b, self.inference, ADJOINT_RULES, _sizes(b, self.entries), torch.device(self.graph.device))
        tape.wanted.update(env[const] for const in self.trainables)
        tape.run(needed(self.nodes, [self.written.loss, self.written.count, *kept.values()]), wanted, env)
        loss, count = (env.get(value, value) for value in (self.written.loss, self.written.count))
        tape.back(loss, tape.cast(self.inputs[LOSS_SCALE], loss.tensor.dtype))
        grad = self._joined(tape, env)
        return self._finished(b, {LOSS: loss, COUNT: count, GRADIENT: grad, **{name: env.get(v, v) for name, v in kept.items()}})

    def _on_the_way(self) -> frozenset[Value]:
        """Float results that depend on a trainable and that the loss depends on."""
        moving: set[Value] = set(self.trainables)
        for node in self.nodes:
            if not moving.isdisjoint(node.inputs()):
                moving.update(value for value in node.outputs if is_float(value))
        useful: set[Value] = {self.written.loss}
        for node in reversed(self.nodes):
            if not useful.isdisjoint(node.outputs):
                useful.update(node.inputs())
        return frozenset(moving & useful)

    def _cut_out(self, b: Builder) -> dict[Value, Value]:
        """Each trainable as a part of theta."""
        b.origin = _THETA_ORIGIN
        theta = self.inputs[THETA]
        sizes = [const.numel for const in self.trainables]
        parts = b.many("aten.split_with_sizes.default", theta, sizes, name=THETA) if len(sizes) > 1 else (theta,)
        found: dict[Value, Value] = {}
        for const, part in zip(self.trainables, parts, strict=True):
            shape = [int(dim) for dim in const.tensor.shape]
            value = part if len(shape) == 1 else b("aten.reshape.default", part, shape, name=f"theta.{const.path}")
            same = const.tensor.dtype == value.tensor.dtype
            found[const] = value if same else b("aten._to_copy.default", value, dtype=const.tensor.torch_dtype)
        return found

    def _joined(self, tape: Tape, env: Mapping[Value, Value]) -> Value:
        """The gradients of the trainables as one vector; zeros for those that the loss does not reach."""
        b = tape.b
        b.origin = _THETA_ORIGIN
        theta = self.inputs[THETA]
        flat: list[Value] = []
        for const in self.trainables:
            found = tape.take(env[const])
            if found is None:
                flat.append(b("aten.zeros.default", [const.numel], dtype=theta.tensor.torch_dtype, device=tape.device))
                continue
            found = tape.cast(tape.full(found, env[const]), theta.tensor.dtype)
            flat.append(found if len(found.tensor.shape) == 1 else b("aten.reshape.default", found, [-1]))
        return flat[0] if len(flat) == 1 else b("aten.cat.default", flat, name=GRADIENT)

    def _finished(self, b: Builder, results: Mapping[str, Value]) -> Graph:
        """The graph of these results; what they do not need is dropped."""
        signature = Signature.of_keywords(self.entries, tuple(results))
        nodes = needed(b.nodes, list(results.values()))
        state = (*(const for const in self.graph.state if const not in set(self.trainables)), *self.constants, *b.consts)
        return Graph(signature, nodes, tuple(results.values()), state, self.graph.ranges, self.graph.device, self.graph.notes)


def _sizes(b: Builder, entries: Sequence[Input]) -> dict[str, Any]:
    """For each named axis, what measures it on the first input that has it."""
    found: dict[str, Any] = {}
    for entry in entries:
        shape: Sequence[Dim] = entry.value.tensor.shape if entry.value is not None else ()
        for axis, dim in enumerate(shape):
            if not isinstance(dim, int) and dim.is_Symbol:
                found.setdefault(str(dim), partial(b, "aten.sym_size.int", entry.value, axis, name=str(dim)))
    return found


def _check_trainables(graph: Graph, trainables: Sequence[Const]) -> None:
    if not trainables:
        raise InputError("nothing trains: no weight was named")
    state, seen = set(graph.state), set[Const]()
    for const in trainables:
        if const not in state:
            raise InputError(f"{const.path} is no weight of this graph")
        if const in seen:
            raise InputError(f"{const.path} is named twice among the trainables")
        if not is_float(const):
            raise InputError(f"{const.path} is {const.tensor} and cannot train; floating-point weights can")
        seen.add(const)


def _check_names(graph: Graph, types: Mapping[str, TensorType]) -> None:
    for entry in graph.signature.inputs:
        if entry.name in types:
            raise InputError(f"the model has an input {entry.name} of its own, a name that its training graphs need")


def _check_outputs(kept: Iterable[str]) -> None:
    for name in kept:
        if name in (LOSS, COUNT, GRADIENT):
            raise InputError(f"the model has an output {name} of its own, a name that its training graphs need")
