"""`stack`: which of the two stacks of an encoder-decoder a matmul lies in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from matmorph.specs.conditions.base import Condition, SelectionContext
from matmorph.specs.conditions.values import OneOrMore, as_word
from matmorph.specs.kinds import Kind

if TYPE_CHECKING:
    from matmorph.ir.site import Site

STACKS = ("encoder", "decoder")


@dataclass(frozen=True, slots=True, eq=False)
class StackCondition(Condition):
    key: ClassVar[str] = "stack"
    doc: ClassVar[str] = "encoder or decoder, where a stack of layers attends to what another one gives"
    kind: ClassVar[Kind] = OneOrMore(f"a stack ({', '.join(STACKS)})", {"enum": list(STACKS)}, as_word("stack", STACKS))
    about: ClassVar[str] = (
        "The decoder is the stack of layers with cross-attention, the encoder the one that its keys and values come from, whatever they are"
        " called. A model with one stack has neither."
    )

    value: tuple[str, ...]

    def test(self, site: Site, context: SelectionContext) -> bool:
        return site.stack in self.value

    def found(self, site: Site, context: SelectionContext) -> str:
        return site.stack or "in neither stack"

    def nearby(self, sites: Sequence[Site], context: SelectionContext) -> str:
        stacks = dict.fromkeys(site.stack for site in sites if site.stack is not None)
        return f"stacks here: {', '.join(stacks)}" if stacks else "no stack of layers attends to another"
