"""Computes one row where only one row is read: a classifier that looks at the first token needs the last layer for that token alone.

Going backwards, each value collects what its readers want of it: all, or one index of one axis (`RowCut`). A value of which everybody wants
the same cut is computed for that index only, as long as its operator works on the axis row by row; what it is made of is cut in turn,
where that has other readers by a slice. Results are the same numbers; the axis stays, with size 1.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from matmorph.ir.build import Builder
from matmorph.ir.core import Arg, Graph, Node, Value, values_in
from matmorph.ir.infer import Inference
from matmorph.ir.op_reading import axes_over, operands_of, permutation
from matmorph.ir.op_table import BROADCASTING, having, of_kind
from matmorph.ir.ops import base_name
from matmorph.ir.rewiring import needed
from matmorph.ir.types import Dim, TensorType

_END = 2**63 - 1


@dataclass(frozen=True, slots=True)
class RowCut:
    """One index of one axis, counted from the end where it is negative. The axis is not."""

    axis: int
    index: int

    def __call__(self, b: Builder, value: Value) -> Value:
        stop = self.index + 1 if self.index != -1 else _END
        return b("aten.slice.Tensor", value, self.axis, self.index, stop, name=f"{value.name}_row")


Wish = RowCut | None
"""What is wanted of a value; None = all of it."""

Narrowing = tuple[dict[int, RowCut], tuple[Arg, ...]]
"""How a node is computed for a cut of its result: the cuts of its arguments by position, and the arguments with new literals."""

NarrowingRule = Callable[[Node, RowCut], Narrowing | None]


def narrow(graph: Graph, keep: Collection[str]) -> Graph:
    """The same graph for a caller who reads only the outputs named in `keep`; the others become None, and nodes that only they need go."""
    pairs = zip(graph.signature.outputs, graph.outputs, strict=True)
    outputs = tuple(output if name in keep else None for name, output in pairs)
    nodes = needed(graph.nodes, outputs)
    plans = _plans(nodes, outputs)
    fixed = [value.name for node in nodes if node not in plans for value in node.outputs]
    named = (*graph.inputs, *graph.state)
    b = Builder(graph.ranges, [*fixed, *(value.name for value in named)], inference=Inference(graph.ranges, graph.device))
    env: dict[Value, Value] = {}
    sliced: dict[tuple[Value, RowCut], Value] = {}

    def cut_of(value: Value, cut: RowCut) -> Value:
        if value in env:
            return env[value]
        if (value, cut) not in sliced:
            sliced[value, cut] = cut(b, value)
        return sliced[value, cut]

    for node in nodes:
        b.origin = node.origin
        if node in plans:
            cuts, args = plans[node]
            placed = [cut_of(arg, cuts[k]) if k in cuts else arg for k, arg in enumerate(args)]
            env[node.output] = b(node.op, *placed, name=node.output.name, **node.attrs)
        elif (cut := _chosen(node)) is not None and node.args[0] in env:
            b.nodes.append(replace(node, args=(env[node.args[0]], cut.axis, 0)))
        else:
            b.nodes.append(node)
    return replace(graph, nodes=needed(b.nodes, outputs), outputs=outputs)


def _plans(nodes: Sequence[Node], outputs: tuple[Arg, ...]) -> dict[Node, Narrowing]:
    """The nodes that are computed for one index."""
    wishes: dict[Value, set[Wish]] = {value: {None} for value in values_in(outputs)}
    plans: dict[Node, Narrowing] = {}
    for node in reversed(nodes):
        plan = _plan(node, wishes)
        if plan is not None:
            plans[node] = plan
        chosen = _chosen(node)
        cuts = plan[0] if plan is not None else {0: chosen} if chosen is not None else {}
        for position, arg in enumerate((*node.args, *node.attrs.values())):
            for value in values_in(arg):
                wishes.setdefault(value, set()).add(cuts.get(position))
    return plans


def _plan(node: Node, wishes: Mapping[Value, set[Wish]]) -> Narrowing | None:
    rule = _RULES.get(base_name(node.op))
    if rule is None or len(node.outputs) != 1:
        return None
    wanted = wishes.get(node.output, set())
    cut = next(iter(wanted)) if len(wanted) == 1 else None
    return None if cut is None else rule(node, cut)


def _chosen(node: Node) -> RowCut | None:
    """What a node picks of its argument."""
    if node.op != "aten.select.int" or not all(isinstance(number, int) for number in node.args[1:]):
        return None
    return RowCut(node.args[1] % len(_shape(node.args[0])), node.args[2])


def _shape(value: Value) -> tuple[Dim, ...]:
    return value.tensor.shape


# rules


def _pointwise(node: Node, cut: RowCut) -> Narrowing | None:
    """Operands are aligned at their last axes; one that is repeated along the axis stays as it is."""
    if any(isinstance(value.type, TensorType) for value in values_in(tuple(node.attrs.values()))):
        return None
    rank = len(_shape(node.output))
    cuts: dict[int, RowCut] = {}
    for position, arg in operands_of(node).items():
        axis = cut.axis - (rank - len(_shape(arg)))
        if axis >= 0 and _shape(arg)[axis] != 1:
            cuts[position] = RowCut(axis, cut.index)
    return cuts, node.args


def _rows(node: Node, cut: RowCut) -> Narrowing | None:
    """y [.., out] of x [.., in], row by row."""
    return ({0: cut}, node.args) if cut.axis < len(_shape(node.output)) - 1 else None


def _along(node: Node, cut: RowCut) -> Narrowing | None:
    """A softmax or a norm: over other axes."""
    return ({0: cut}, node.args) if cut.axis not in axes_over(node) else None


def _slice(node: Node, cut: RowCut) -> Narrowing | None:
    """A slice of all, or one along another axis."""
    defaults: tuple[Arg, ...] = (None, 0, None, None, 1)
    _, axis, start, end, step = (*node.args, *defaults[len(node.args) :])
    whole = start in (None, 0) and end in (None, _END) and step == 1
    return ({0: cut}, node.args) if whole or axis % len(_shape(node.output)) != cut.axis else None


def _permute(node: Node, cut: RowCut) -> Narrowing | None:
    return {0: RowCut(permutation(node)[cut.axis], cut.index)}, node.args


def _reshape(node: Node, cut: RowCut) -> Narrowing | None:
    """The axis is the same one before: as many elements in front of it, and as long."""
    x, sizes = node.args
    if _shape(x)[: cut.axis + 1] != _shape(node.output)[: cut.axis + 1]:
        return None
    return {0: cut}, (x, tuple(1 if k == cut.axis else size for k, size in enumerate(sizes)))


def _matmul(node: Node, cut: RowCut) -> Narrowing | None:
    """a [.., m, k] b [.., k, n]: a row of a; of more than a matrix b nothing else is cut."""
    a, b = node.args
    rank = len(_shape(node.output))
    if min(len(_shape(a)), len(_shape(b))) < 2 or len(_shape(a)) != rank:
        return None
    rows = cut.axis == rank - 2 or (cut.axis < rank - 2 and len(_shape(b)) == 2)
    return ({0: cut}, node.args) if rows else None


def _attention(node: Node, cut: RowCut) -> Narrowing | None:
    """A row of queries, and of the mask where that differs by row. Which row it is matters to a causal mask."""
    rank = len(_shape(node.output))
    causal = node.args[5] if len(node.args) > 5 else node.attrs.get("is_causal", False)
    if cut.axis != rank - 2 or causal or "attn_mask" in node.attrs:
        return None
    cuts = {0: cut}
    mask = node.args[3] if len(node.args) > 3 else None
    if mask is not None and len(_shape(mask)) > 1 and _shape(mask)[-2] != 1:
        cuts[3] = RowCut(len(_shape(mask)) - 2, cut.index)
    return cuts, node.args


# Random numbers of one row are not those of the row among all, and a group norm names no axes.
_POINTWISE = having(BROADCASTING | of_kind("same"), random=False)
_NORMALISED = having(of_kind("softmax", "log_softmax", "norm"), axes=1)

_RULES: Mapping[str, NarrowingRule] = {
    **dict.fromkeys(_POINTWISE, _pointwise),
    **dict.fromkeys(("linear", "matmul_nbits", "matmul_codebook"), _rows),
    **dict.fromkeys(("reshape", "view", "_unsafe_view"), _reshape),
    **dict.fromkeys(_NORMALISED, _along),
    **dict.fromkeys(of_kind("permute"), _permute),
    "slice": _slice,
    "matmul": _matmul,
    "scaled_dot_product_attention": _attention,
}
