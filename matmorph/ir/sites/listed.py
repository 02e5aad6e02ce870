"""Weights that a product reads in a way that no method takes: each is one row with its reason, so that every matrix is accounted for.

These are kernels of convolutions, the weights of recurrent operators, what the body of a `torch.cond` or a `map` multiplies, and operands
that are no weight of a matmul at all: learned inputs, outer products, forms that are not understood as rows times a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TypeAlias, cast

from matmorph.ir.core import Const, Graph, Node, Value, values_in
from matmorph.ir.op_reading import operands_of
from matmorph.ir.op_table import OPERATORS, having, of_kind
from matmorph.ir.ops import base_name
from matmorph.ir.site import Application, Form, Site
from matmorph.ir.sites.constants import is_weight
from matmorph.ir.sites.weight_view import WeightReading

_MULTIPLY = of_kind("matmul", "linear", "einsum", "convolution", "attention", "contraction", "recurrent")
_WHOLE = of_kind("contraction", "recurrent")
"""Operators every operand of which is multiplied."""

Behind: TypeAlias = Mapping[Value, frozenset[Const]]
"""Of a value, the constants that it is made of alone."""


@dataclass(slots=True)
class _Read:
    """What multiplies one parameter: the first reason is the one that is shown."""

    const: Const
    form: Form
    reason: str
    nodes: dict[Node, None] = field(default_factory=dict)


def list_rest(graph: Graph, behind: Behind, sites: Iterable[Site]) -> list[Site]:
    """A blocked site for each parameter of the model, of two or more axes, that a product reads and that none of the sites accounts for."""
    known = {_key(const) for site in sites for const in (site.const, *site.parts)}
    found: dict[str, _Read] = {}
    for node in graph.nodes:
        for const, form, reason in _multiplied(node, behind):
            if _key(const) not in known and is_weight(const, axes=2) and const.rule is None:
                found.setdefault(_key(const), _Read(const, form, reason)).nodes[node] = None
    return [_site(read) for read in found.values()]


def _key(const: Const) -> str:
    return const.storage or const.path


def _site(read: _Read) -> Site:
    const = read.const
    shape = [int(dim) for dim in const.tensor.shape]
    width = prod(shape[1:]) if read.form == "conv" else shape[-1]
    rows = const.numel // width if width else shape[0]
    reading = WeightReading("oi", width, rows, (0, rows))
    return Site(
        path=const.path.removesuffix(".weight"),
        const=const,
        form=read.form,
        layout="oi",
        in_features=width,
        out_features=rows,
        applications=tuple(Application(node, _activation(node, const), node.outputs[0]) for node in read.nodes),
        blocked=read.reason,
        read=reading.read,
    )


def _activation(node: Node, const: Const) -> Value:
    return next((value for value in node.inputs() if not isinstance(value, Const)), const)


def _multiplied(node: Node, behind: Behind) -> Iterator[tuple[Const, Form, str]]:
    """(constant, form, why no method takes it) for all that the node multiplies."""
    name = base_name(node.op)
    if any(isinstance(arg, Graph) for arg in node.args):
        for const in dict.fromkeys(_in_bodies(node, behind)):
            yield const, "product", f"it is multiplied inside the body of {name.removesuffix('_impl')}"
    elif name in _MULTIPLY:
        form: Form = "conv" if name in _CONVOLUTIONS else "recurrent" if name in _RECURRENT else "product"
        reason = _REASONS.get(form, _other)(node)
        for value in _operands(node):
            for const in sorted(behind.get(value, ()), key=lambda const: const.path):
                yield const, form, reason


def _operands(node: Node) -> Iterable[Value]:
    name = base_name(node.op)
    if name in _WHOLE or OPERATORS[name].kind == "einsum":
        return node.inputs()
    return operands_of(node).values()


def _in_bodies(node: Node, behind: Behind) -> Iterator[Const]:
    """Constants that a sub-graph multiplies. Its inputs are the last operands of the node, in their order."""
    outer = [value for arg in node.args if not isinstance(arg, Graph) for value in values_in(arg)]
    for body in (arg for arg in node.args if isinstance(arg, Graph)):
        inputs = body.inputs
        inner = {value: behind[given] for value, given in zip(inputs[::-1], outer[::-1], strict=False) if given in behind}
        known: dict[Value, frozenset[Const]] = {const: frozenset((const,)) for const in body.state}
        known.update(inner)
        for own in body.nodes:
            yield from (const for const, _, _ in _multiplied(own, known))
            read = own.inputs()
            if read and all(value in known for value in read):
                made = frozenset[Const]().union(*(known[value] for value in read))
                known.update(dict.fromkeys(own.outputs, made))


_CONVOLUTIONS = of_kind("convolution")
_TRANSPOSED = having(_CONVOLUTIONS, transposed=True)
_RECURRENT = of_kind("recurrent")


def _convolution(node: Node) -> str:
    weight = cast(Value, node.args[1])
    kernel = [int(dim) for dim in weight.tensor.shape[2:]]
    pixels = " x ".join(map(str, kernel))
    if base_name(node.op) in _TRANSPOSED or (base_name(node.op) == "convolution" and node.args[6]):
        return f"the kernel of a transposed convolution ({pixels} pixels) spreads its input"
    groups = node.args[8] if base_name(node.op) == "convolution" else node.args[6] if len(node.args) > 6 else 1
    if groups != 1:
        return f"a convolution in {groups} groups multiplies each group of channels by a part of its kernel ({pixels} pixels)"
    return f"a kernel of {pixels} pixels is multiplied at every place that it slides to"


def _recurrent(node: Node) -> str:
    return f"{base_name(node.op)} multiplies by it at every step inside of one operator"


def _other(node: Node) -> str:
    name = base_name(node.op)
    if OPERATORS[name].kind == "attention":
        return "it is an operand of an attention, not the weight of a matmul"
    if OPERATORS[name].kind == "linear":
        return "it is what another weight multiplies, not a weight itself"
    return f"{name} multiplies it in a form that is not read as rows times a matrix"


_REASONS: Mapping[str, Callable[[Node], str]] = {"conv": _convolution, "recurrent": _recurrent}
