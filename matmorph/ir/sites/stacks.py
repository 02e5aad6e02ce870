"""Which stack of layers is an encoder and which a decoder, from dataflow alone.

A stack is the numbered container that layers lie in ("model.decoder.layers"). A decoder holds cross-attention; the encoder is the stack
that its keys and values come from. A model of one stack, and one of several that do not read each other, has neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from matmorph.ir.core import Const, Graph, Node, Value
from matmorph.ir.site import Site

Stack = Literal["encoder", "decoder"]

_CROSSES = frozenset(f"cross_attention.{part}" for part in ("k", "v", "kv"))


def infer_stacks(graph: Graph, sites: Sequence[Site]) -> dict[str, Stack]:
    """By container. `sites`: with their roles and containers."""
    makers = graph.producers()
    crossing = [site for site in sites if site.container is not None and site.role in _CROSSES]
    decoders = {site.container for site in crossing if site.container is not None}
    found: dict[str, Stack] = {}
    for site in crossing:
        behind = _behind([application.x for application in site.applications], site.container, makers)
        found.update(dict.fromkeys(behind - decoders, "encoder"))
    return {**found, **dict.fromkeys(decoders, "decoder")}


def _behind(values: Sequence[Value], own: str | None, makers: Mapping[Value, Node]) -> set[str]:
    """The nearest containers beside `own` that the values are computed in."""
    todo, seen, found = list(values), set(values), set[str]()
    while todo:
        node = makers.get(todo.pop())
        if node is None:
            continue
        container = node.origin.container
        if container is not None and container != own:
            found.add(container)
            continue
        fresh = [value for value in node.inputs() if value not in seen and not isinstance(value, Const)]
        seen.update(fresh)
        todo += fresh
    return found
