"""What a stage works on: a graph, the sites that rules may claim, and the blocks that they make up."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from matmorph.ir.core import Graph
from matmorph.ir.site import Site
from matmorph.ir.sites.matmuls import find_sites
from matmorph.passes.pruning.find_blocks import Block, find_blocks


@dataclass(frozen=True, eq=False)
class Survey:
    """`layers`: what `layer: last 2` counts back from in each stack, those of sites that are left out included."""

    graph: Graph
    sites: tuple[Site, ...]
    layers: Mapping[str | None, int]

    @classmethod
    def of(cls, graph: Graph, sites: Sequence[Site] | None = None) -> Survey:
        """Of all sites of the graph, or of those given."""
        found = tuple(find_sites(graph) if sites is None else sites)
        layers: dict[str | None, int] = {}
        for site in found:
            if site.layer is not None:
                layers[site.container] = max(layers.get(site.container, 0), site.layer + 1)
        return cls(graph, found, layers)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Found once, when a condition or a method first asks for them."""
        return find_blocks(self.graph, self.sites)

    def without(self, gone: Collection[Site]) -> Survey:
        """The same graph with fewer sites to claim; itself where none is gone."""
        return replace(self, sites=tuple(site for site in self.sites if site not in gone)) if gone else self
