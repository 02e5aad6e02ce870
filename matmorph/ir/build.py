"""Builder: writes nodes whose result types are inferred, never stated, under readable unique names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch

from matmorph.errors import VerifyError
from matmorph.ir.core import Arg, Const, ConstKind, Graph, Node, Origin, Range, Value, values_in
from matmorph.ir.infer import Inference, infer_node
from matmorph.ir.ops import base_name, normalize
from matmorph.ir.types import TensorType, dtype_name

Keep: TypeAlias = Callable[[torch.Tensor], Callable[[], torch.Tensor]]
"""Takes a tensor, gives what gives it again."""


def names_of(graph: Graph) -> set[str]:
    """Every value name of a graph; those inside sub-graphs are a space of their own."""
    named = (*graph.inputs, *graph.state, *(value for node in graph.nodes for value in node.outputs))
    return {value.name for value in named}


def unique_name(wish: str, taken: set[str]) -> str:
    """`wish`, or `wish_1`, `wish_2` ... if it is taken; the answer is added to `taken`."""
    name, k = wish, 0
    while name in taken:
        k += 1
        name = f"{wish}_{k}"
    taken.add(name)
    return name


class Builder:
    """Collects `nodes` and `consts` over the symbols of one graph; `b("aten.matmul.default", x, w)` adds a node and gives its output.

    `over`: the graph that the nodes will join, or its symbols' ranges. `taken`: further names not to be used. `origin`: what every new node
    carries; set it anew as the place changes. `inference`: shared between the builders of one graph, so that equal work is done once.
    `keep`: where the numbers of new weights go, None = they stay in memory.
    """

    def __init__(
        self,
        over: Graph | Mapping[str, Range],
        taken: Iterable[str] = (),
        *,
        origin: Origin = Origin(),  # noqa: B008  (frozen)
        inference: Inference | None = None,
        keep: Keep | None = None,
    ) -> None:
        ranges, device, names = (over.ranges, over.device, names_of(over)) if isinstance(over, Graph) else (over, "cpu", set[str]())
        self.origin = origin
        self.nodes: list[Node] = []
        self.consts: list[Const] = []
        self._keep = keep
        self._inference = inference or Inference(ranges, device)
        self._taken = names | set(taken)
        self._fakes: dict[Value, Any] = {}

    def __call__(self, op: str, *args: Arg, name: str | None = None, **attrs: Arg) -> Value:
        """Adds a node with one output. Raises VerifyError if the operator refuses its operands or has another number of results."""
        outputs = self.many(op, *args, name=name, **attrs)
        if len(outputs) != 1:
            raise VerifyError(f"{op} has {len(outputs)} results where one is expected")
        return outputs[0]

    def many(self, op: str, *args: Arg, name: str | None = None, **attrs: Arg) -> tuple[Value, ...]:
        """Adds a node with any number of outputs. `name`: the wish for the first; the default is the operator's base name."""
        placed, rest = normalize(op, args, attrs)
        for value in values_in((placed, tuple(rest.values()))):
            if value not in self._fakes:
                self._fakes[value] = self._inference.fake(value.type)
        results = infer_node(self._inference, Node(op, placed, (), rest), self._fakes)
        wish = name or base_name(op)
        outputs = tuple(Value(unique_name(wish, self._taken), self._inference.type_of(result)) for result in results)
        self._fakes.update(zip(outputs, results, strict=True))
        self.nodes.append(Node(op, placed, outputs, rest, self.origin))
        return outputs

    def const(
        self,
        name: str,
        weight: torch.Tensor | Callable[[], torch.Tensor],
        type: TensorType | None = None,
        *,
        trainable: bool = False,
        kind: ConstKind = "parameter",
        persistent: bool = True,
        rule: str | None = None,
        site: str | None = None,
        method: str | None = None,
        part: str | None = None,
    ) -> Const:
        """Adds a weight under the dotted name `name`. `weight`: the tensor, or a function that loads one of the given `type`. For
        `rule` and what follows see `Const`."""
        if isinstance(weight, torch.Tensor):
            tensor = weight
            type = TensorType(dtype_name(tensor.dtype), tuple(tensor.shape))
            load = (lambda: tensor) if self._keep is None else self._keep(tensor)
        elif type is None:
            raise VerifyError(f"constant {name!r} is loaded later, so its type must be given")
        else:
            load = weight
        const = Const(
            unique_name(name, self._taken),
            type,
            load,
            names=(name,),
            kind=kind,
            trainable=trainable,
            persistent=persistent,
            storage=name,
            rule=rule or self.origin.rule,
            site=site,
            method=method,
            part=part,
        )
        self.consts.append(const)
        return const

    def size(self, x: Value, axis: int) -> int | Value:
        """The size of an axis: a number where it is fixed, else the output of a new node."""
        dim = x.tensor.shape[axis]
        return dim if isinstance(dim, int) else self("aten.sym_size.int", x, axis % len(x.tensor.shape), name=f"{x.name}_size")
