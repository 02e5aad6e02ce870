"""`layer`: the index of the layer that a matmul lies in. Each stack of layers (an encoder, a decoder) counts for itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from matmorph.specs.conditions.base import Condition, SelectionContext
from matmorph.specs.conditions.values import TEXT, OneOrMore, parsed
from matmorph.specs.kinds import Kind
from matmorph.specs.numbers import LAYER_FORMS, Layers, parse_layers

if TYPE_CHECKING:
    from matmorph.ir.site import Site


@dataclass(frozen=True, slots=True, eq=False)
class LayerCondition(Condition):
    key: ClassVar[str] = "layer"
    doc: ClassVar[str] = f"index of the layer in its stack: {LAYER_FORMS}"
    kind: ClassVar[Kind] = OneOrMore("layers", {"oneOf": [{"type": "integer", "minimum": 0}, TEXT]}, parsed(parse_layers))

    value: tuple[Layers, ...]

    def test(self, site: Site, context: SelectionContext) -> bool:
        layer = site.layer
        return layer is not None and any(chosen.holds(layer, context.layers(site)) for chosen in self.value)

    def found(self, site: Site, context: SelectionContext) -> str:
        where = "" if site.stack is None else f" ({site.stack})"
        return "no layer" if site.layer is None else f"layer {site.layer} of {context.layers(site)}{where}"

    def nearby(self, sites: Sequence[Site], context: SelectionContext) -> str:
        layers: dict[str, list[int]] = {}
        for site in sites:
            if site.layer is not None:
                layers.setdefault(site.container or "", []).append(site.layer)
        spans = {container: f"{min(found)}..{max(found)}" for container, found in layers.items()}
        if len(spans) > 1:
            return f"layers here: {', '.join(f'{span} of {container}' for container, span in spans.items())}"
        return f"layers here: {next(iter(spans.values()))}" if spans else "no site lies in a numbered layer"
