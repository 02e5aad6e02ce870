"""`layer`: the index of the layer that a matmul lies in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from matmorph.ir.site import Site
from matmorph.specs.conditions.base import Condition, SelectionContext
from matmorph.specs.conditions.values import TEXT, OneOrMore, parsed
from matmorph.specs.kinds import Kind
from matmorph.specs.numbers import LAYER_FORMS, Layers, parse_layers


@dataclass(frozen=True, slots=True, eq=False)
class LayerCondition(Condition):
    key: ClassVar[str] = "layer"
    doc: ClassVar[str] = f"index of the layer: {LAYER_FORMS}"
    kind: ClassVar[Kind] = OneOrMore("layers", {"oneOf": [{"type": "integer", "minimum": 0}, TEXT]}, parsed(parse_layers))

    value: tuple[Layers, ...]

    def test(self, site: Site, context: SelectionContext) -> bool:
        layer = site.layer
        return layer is not None and any(chosen.holds(layer, context.layers) for chosen in self.value)

    def found(self, site: Site, context: SelectionContext) -> str:
        return "no layer" if site.layer is None else f"layer {site.layer} of {context.layers}"

    def nearby(self, sites: Sequence[Site], context: SelectionContext) -> str:
        layers = sorted({site.layer for site in sites if site.layer is not None})
        return f"layers here: {layers[0]}..{layers[-1]}" if layers else "no site lies in a numbered layer"
