"""`block`: the kind of block that a matmul is part of, whether or not that can be pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from matmorph.specs.conditions.base import Condition, SelectionContext
from matmorph.specs.conditions.values import OneOrMore, as_word
from matmorph.specs.kinds import Kind

if TYPE_CHECKING:
    from matmorph.ir.site import Site


BLOCKS = ("attention", "mlp")


@dataclass(frozen=True, slots=True, eq=False)
class BlockCondition(Condition):
    key: ClassVar[str] = "block"
    doc: ClassVar[str] = "q, k, v, o of an attention; gate, up, down of an MLP; or their fusions"
    kind: ClassVar[Kind] = OneOrMore(f"a block ({', '.join(BLOCKS)})", {"enum": list(BLOCKS)}, as_word("block", BLOCKS))

    value: tuple[str, ...]

    def test(self, site: Site, context: SelectionContext) -> bool:
        return context.block(site) in self.value

    def found(self, site: Site, context: SelectionContext) -> str:
        return context.block(site) or "in no block"
