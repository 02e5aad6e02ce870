"""The matmul sites of a graph: every weight that a matmul reads, once, as a view.

Nodes keep their own operators; a `Site` says how to read them as rows times a matrix. Only floating parameters count: a buffer (RoPE's
frequencies) is no site. What is computed from parameters alone (weight norm, a mask) is a weight like any other (`constants`). Every
parameter of two or more axes that a product reads is accounted for: by a site, or by a blocked one with the reason (`listed`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from typing import Any

from matmorph.ir.build import unique_name
from matmorph.ir.core import Const, Graph, Node, Value, values_in
from matmorph.ir.site import Site
from matmorph.ir.sites.constants import ComputedWeight, Constants, is_weight
from matmorph.ir.sites.listed import list_rest
from matmorph.ir.sites.matmul_forms import Use, find_use, gathered
from matmorph.ir.sites.roles import infer_roles
from matmorph.ir.sites.stacks import infer_stacks
from matmorph.ir.sites.weight_view import WeightReading, WeightView, follow, whole


@dataclass(slots=True)
class _Weight:
    """All that reads one constant, in order of the graph. `computed`: what it is computed from, and `roots` the values that it is."""

    const: Const
    computed: ComputedWeight | None = None
    roots: dict[Value, None] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)
    gathers: list[Node] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def find_sites(graph: Graph) -> tuple[Site, ...]:
    """Every site in order of its first application, with role and layer.

    One site per unique weight, or per contiguous slice of it along its out axis (`path[a:b]`); embedding tables are sites of form
    "embedding" with out_features = rows and in_features = width, a table that also is a head is one site of the head's form. A site that
    no method may take has `blocked` set to the reason.
    """
    order = {node: number for number, node in enumerate(graph.nodes)}
    walk = _Walk.of(graph)
    sites = _named([site for weight in walk.found.values() for site in _sites(weight)])
    roles = infer_roles(graph, sites)
    sites += list_rest(graph, walk.behind(), sites)
    sites.sort(key=lambda site: order[_nodes(site)[0]])
    placed = [replace(site, role=roles.get(site, "other"), **_place(site)) for site in sites]
    stacks = infer_stacks(graph, placed)
    return tuple(site if site.container not in stacks else replace(site, stack=stacks[site.container]) for site in placed)


def _nodes(site: Site) -> Sequence[Node]:
    return [application.node for application in site.applications] or site.gathers


def _place(site: Site) -> dict[str, Any]:
    """The layer that all applications lie in, and the container that counts it."""
    places = {(node.origin.layer, node.origin.container) for node in _nodes(site)}
    layer, container = next(iter(places)) if len(places) == 1 else (None, None)
    return {"layer": layer, "container": container}


def _named(sites: list[Site]) -> list[Site]:
    """Computed weights under names of their own: the one that they wish for, where no other site has it."""
    taken = {site.path for site in sites if not site.parts}
    names: dict[Const, Const] = {}
    found: list[Site] = []
    for site in sites:
        if site.parts:
            const = site.const
            if const not in names:
                path = unique_name(const.path.removesuffix(".weight"), taken)
                names[const] = replace(const, name=path, names=(path,))
            site = replace(site, const=names[const], path=f"{names[const].path}{site.path.removeprefix(_path(const))}")
        found.append(site)
    return found


@dataclass(slots=True, eq=False)
class _Walk:
    """One walk over the graph: follows constants through layout operators to whatever reads them. `views`: values that are a weight or a
    part of one; `found`: by storage, what reads them; `applied`: results of matmuls of learned inputs, and what is computed from them."""

    graph: Graph
    constants: Constants
    views: dict[Value, WeightView]
    found: dict[str, _Weight] = field(default_factory=dict)
    computed: dict[Const, ComputedWeight] = field(default_factory=dict)
    roots: dict[Const, dict[Value, None]] = field(default_factory=dict)
    applied: set[Value] = field(default_factory=set)

    @classmethod
    def of(cls, graph: Graph) -> _Walk:
        walk = cls(graph, Constants.of(graph), {c: whole(c) for c in graph.state if is_weight(c, axes=1)})
        for node in graph.nodes:
            walk._read(node)
            walk._compute(node)
        for value in values_in(graph.outputs):
            if value in walk.views:
                walk._weight(value).others.append("the result of the model")
        return walk

    def behind(self) -> Mapping[Value, frozenset[Const]]:
        """Of each value that no input has a part in but by its size, the constants that it is made of."""
        seen = {
            value: frozenset(self.computed[v.const].parts if v.const in self.computed else (v.const,)) for value, v in self.views.items()
        }
        return {**seen, **self.constants.origins}

    def _weight(self, value: Value) -> _Weight:
        const = self.views[value].const
        fresh = _Weight(const, self.computed.get(const), self.roots.get(const, {}))
        return self.found.setdefault(const.storage or const.path, fresh)

    def _read(self, node: Node) -> None:
        """Notes the matmul that a node is, and who else reads a weight; follows layout operators."""
        read = {value: None for value in node.inputs() if value in self.views}
        for value, use, table in _reads(node, self.views) if read and node not in self.constants.serving else ():
            weight = self._weight(value)
            if use is not None:
                weight.uses.append(use)
                self.applied.update(node.outputs)
            if table:
                weight.gathers.append(node)
            read.pop(value)
        for value in read:
            if value is node.args[0] and (followed := follow(self.views[value], node)) is not None and None not in followed:
                self.views.update({out: view for out, view in zip(node.outputs, followed, strict=True) if view is not None})
            else:
                self._weight(value).others.append(node.op)

    def _compute(self, node: Node) -> None:
        """Results that are weights of their own. What a matmul makes of learned inputs is none, though no input has a part in it."""
        if not self.applied.isdisjoint(node.inputs()):
            self.applied.update(node.outputs)
        for value in node.outputs:
            if value in self.views or value in self.applied or value not in self.constants.origins:
                continue
            weight = self.constants.weight(value)
            if weight is not None:
                self.views[value] = whole(weight.const)
                self.computed[weight.const] = weight
                self.roots.setdefault(weight.const, {})[value] = None


def _reads(node: Node, views: dict[Value, WeightView]) -> Iterator[tuple[Value, Use | None, bool]]:
    """(operand, its matmul, whether it is gathered from) where this node is a matmul with a weight or an embedding."""
    use = find_use(node, views)
    if use is not None:
        yield use.operand, use, False
    elif gathered(node, views) is not None:
        yield node.args[0], None, True


def _sites(weight: _Weight) -> list[Site]:
    if not weight.uses:
        return [_table(weight)] if weight.gathers else []
    problem = _problem(weight)
    if problem is not None:
        return [_blocked(weight, problem)]
    parts: dict[WeightReading, list[Use]] = {}
    for use in weight.uses:
        if use.reading is not None:
            parts.setdefault(use.reading, []).append(use)
    return [_site(weight, reading, uses) for reading, uses in parts.items()]


def _problem(weight: _Weight) -> str | None:
    """Why the uses of one constant do not divide into sites of their own."""
    if not weight.const.numel:
        return f"the weight is empty: {'x'.join(map(str, weight.const.tensor.shape))}"
    unread = next((use.problem for use in weight.uses if use.reading is None), None)
    if unread is not None:
        return unread if len(weight.const.tensor.shape) > 1 else "it is a part of a vector that holds more than one matrix"
    if weight.computed is not None and weight.computed.shared is not None:
        return f"it is computed from {weight.computed.shared}"
    readings = [use.reading for use in weight.uses if use.reading is not None]
    shapes = {(r.layout, r.in_features, r.total, r.batch) for r in readings}
    if len(shapes) > 1:
        return "applied in several shapes: " + ", ".join(
            f"{total}x{width} ({layout})" for layout, width, total, _ in sorted(shapes, key=str)
        )
    spans = sorted({r.rows for r in readings})
    for (a, b), (c, d) in pairwise(spans):
        if c < b:
            return f"its rows {a}:{b} and {c}:{d} overlap"
    first = readings[0]
    if weight.gathers and (first.layout != "oi" or first.batch is not None or spans != [(0, first.total)]):
        return "it is an embedding table of which a matmul reads only a part, or across"
    if weight.others:
        return f"it is also read by {weight.others[0]}"
    return None


def _path(const: Const) -> str:
    return const.path.removesuffix(".weight")


def _site(weight: _Weight, reading: WeightReading, uses: Sequence[Use]) -> Site:
    start, stop = reading.rows
    entire = reading.rows == (0, reading.total)
    return Site(
        path=_path(weight.const) if entire else f"{_path(weight.const)}[{start}:{stop}]",
        const=weight.const,
        form=uses[0].form,
        layout=reading.layout,
        in_features=reading.in_features,
        out_features=stop - start,
        applications=tuple(use.application for use in uses),
        batch=reading.batch,
        rows=None if entire else reading.rows,
        gathers=tuple(weight.gathers),
        blocked=next((use.problem for use in uses if use.problem), None),
        parts=() if weight.computed is None else weight.computed.parts,
        roots=tuple(weight.roots),
        read=reading.read,
    )


def _blocked(weight: _Weight, problem: str) -> Site:
    """The whole constant as one site that nothing may take; its matrix is the first reading's, or [all others, last axis]."""
    const = weight.const
    known = next((replace(use.reading, rows=(0, use.reading.total)) for use in weight.uses if use.reading is not None), None)
    width = int(const.tensor.shape[-1])
    others = prod(int(dim) for dim in const.tensor.shape[:-1])
    reading = known or WeightReading("oi", width, others, (0, others))
    return replace(_site(weight, reading, weight.uses), blocked=problem)


def _table(weight: _Weight) -> Site:
    rows, width = (int(d) for d in weight.const.tensor.shape)
    others = f"it is also read by {weight.others[0]}" if weight.others else None
    gathers, roots = tuple(weight.gathers), tuple(weight.roots)
    parts = () if weight.computed is None else weight.computed.parts
    others = others if weight.computed is None or weight.computed.shared is None else f"it is computed from {weight.computed.shared}"
    return Site(
        _path(weight.const), weight.const, "embedding", "oi", width, rows, (), gathers=gathers, blocked=others, parts=parts, roots=roots
    )
