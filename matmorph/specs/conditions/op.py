"""`op`: the form of the matmul. Where a match names none, pure embedding tables stay out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from matmorph.specs.conditions.base import Condition, SelectionContext
from matmorph.specs.conditions.values import OneOrMore, as_word
from matmorph.specs.kinds import Kind
from matmorph.specs.tree import MapTree

if TYPE_CHECKING:
    from matmorph.ir.site import Site


OPS: tuple[str, ...] = ("matmul", "linear", "addmm", "mm", "einsum", "conv1x1", "expert", "embedding", "conv", "recurrent", "product")
"""What `op` takes: `matmul` = every weight matmul in whatever form, `embedding` = tables (also one tied to a head), else one form."""


def _is(op: str, site: Site) -> bool:
    """A table that a head is tied to is both a matmul and an embedding."""
    if op == "matmul":
        return site.form != "embedding" and not site.listed
    return site.form == op or (op == "embedding" and bool(site.gathers))


@dataclass(frozen=True, slots=True, eq=False)
class OpCondition(Condition):
    key: ClassVar[str] = "op"
    doc: ClassVar[str] = "form of the matmul; matmul is any of them; embedding is a table"
    kind: ClassVar[Kind] = OneOrMore(f"an op ({', '.join(OPS)})", {"enum": list(OPS)}, as_word("op", OPS))
    about: ClassVar[str] = (
        f"Forms of `op`: {', '.join(f'`{op}`' for op in OPS)}. `matmul` is any form of a product with a weight; `embedding` is a table,"
        " also one that is tied to the head. `conv`, `recurrent` and `product` are weights that are listed with the reason why no method"
        " takes them; `matmul` leaves them out."
    )

    value: tuple[str, ...]

    @classmethod
    def implied(cls, match: MapTree) -> Self:
        return cls(match.at, match.keypath, "op: matmul (implied: no op is named)", ("matmul",))

    def test(self, site: Site, context: SelectionContext) -> bool:
        return any(_is(op, site) for op in self.value)

    def found(self, site: Site, context: SelectionContext) -> str:
        return f"{site.form}, also an embedding" if site.gathers and site.form != "embedding" else site.form

    def nearby(self, sites: Sequence[Site], context: SelectionContext) -> str:
        return f"ops here: {', '.join(dict.fromkeys(site.form for site in sites))}"
