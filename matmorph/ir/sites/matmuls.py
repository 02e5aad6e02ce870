"""The matmul sites of a graph: every weight that a matmul reads, once, as a view.

Nodes keep their own operators; a `Site` says how to read them as rows times a matrix. Only floating parameters count: a buffer (RoPE's
frequencies), or a parameter that reaches the matmul through anything but a layout operator (weight norm, a mask), is no site.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from matmorph.ir.core import Const, Graph, Node, Value, values_in
from matmorph.ir.site import Site
from matmorph.ir.sites.matmul_forms import Use, find_use, gathered
from matmorph.ir.sites.roles import infer_roles
from matmorph.ir.sites.stacks import infer_stacks
from matmorph.ir.sites.weight_view import WeightReading, WeightView, follow, whole


@dataclass(slots=True)
class _Weight:
    """All that reads one constant, in order of the graph."""

    const: Const
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
    sites = [site for weight in _weights(graph) for site in _sites(weight)]
    sites.sort(key=lambda site: order[_nodes(site)[0]])
    roles = infer_roles(graph, sites)
    placed = [replace(site, role=roles[site], **_place(site)) for site in sites]
    stacks = infer_stacks(graph, placed)
    return tuple(site if site.container not in stacks else replace(site, stack=stacks[site.container]) for site in placed)


def _nodes(site: Site) -> Sequence[Node]:
    return [application.node for application in site.applications] or site.gathers


def _place(site: Site) -> dict[str, Any]:
    """The layer that all applications lie in, and the container that counts it."""
    places = {(node.origin.layer, node.origin.container) for node in _nodes(site)}
    layer, container = next(iter(places)) if len(places) == 1 else (None, None)
    return {"layer": layer, "container": container}


def _weights(graph: Graph) -> tuple[_Weight, ...]:
    """One walk over the graph: follows constants through layout operators to whatever reads them."""
    views: dict[Value, WeightView] = {c: whole(c) for c in graph.state if c.kind == "parameter" and _floating(c)}
    found: dict[str, _Weight] = {}
    for node in graph.nodes:
        read = {value: None for value in node.inputs() if value in views}
        if not read:
            continue
        for value, use, table in _reads(node, views):
            weight = found.setdefault(_key(views[value].const), _Weight(views[value].const))
            if use is not None:
                weight.uses.append(use)
            if table:
                weight.gathers.append(node)
            read.pop(value)
        for value in read:
            if value is node.args[0] and (followed := follow(views[value], node)) is not None and None not in followed:
                views.update({out: view for out, view in zip(node.outputs, followed, strict=True) if view is not None})
            else:
                found.setdefault(_key(views[value].const), _Weight(views[value].const)).others.append(node.op)
    for value in values_in(graph.outputs):
        if value in views:
            found.setdefault(_key(views[value].const), _Weight(views[value].const)).others.append("the result of the model")
    return tuple(found.values())


def _key(const: Const) -> str:
    return const.storage or const.path


def _floating(const: Const) -> bool:
    return const.tensor.torch_dtype.is_floating_point and len(const.tensor.shape) >= 2


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
    unread = next((use.problem for use in weight.uses if use.reading is None), None)
    if unread is not None:
        return unread
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
        read=reading.read,
    )


def _blocked(weight: _Weight, problem: str) -> Site:
    """The whole constant as one site that nothing may take; its matrix is the first reading's, or [all others, last axis]."""
    const = weight.const
    known = next((replace(use.reading, rows=(0, use.reading.total)) for use in weight.uses if use.reading is not None), None)
    width = int(const.tensor.shape[-1])
    reading = known or WeightReading("oi", width, const.numel // width, (0, const.numel // width))
    return replace(_site(weight, reading, weight.uses), blocked=problem)


def _table(weight: _Weight) -> Site:
    rows, width = (int(d) for d in weight.const.tensor.shape)
    others = f"it is also read by {weight.others[0]}" if weight.others else None
    gathers = tuple(weight.gathers)
    return Site(_path(weight.const), weight.const, "embedding", "oi", width, rows, (), gathers=gathers, blocked=others)
