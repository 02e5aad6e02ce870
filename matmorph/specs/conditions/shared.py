"""`shared`: whether a weight is used more than once (applications and gathers together) or goes by more than one name (tied)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from matmorph.specs.conditions.base import Condition, SelectionContext
from matmorph.specs.kinds import JsonSchema, Kind, plain_text, wrong
from matmorph.specs.tree import Tree

if TYPE_CHECKING:
    from matmorph.ir.site import Site


@dataclass(frozen=True)
class _TrueOrFalse:
    expected: str = "true or false"

    def read(self, tree: Tree) -> bool:
        text = plain_text(tree)
        if text not in ("true", "false"):
            raise wrong(tree, self.expected)
        return text == "true"

    def schema(self) -> JsonSchema:
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True, eq=False)
class SharedCondition(Condition):
    key: ClassVar[str] = "shared"
    doc: ClassVar[str] = "whether the weight is applied more than once, or is a table too"
    kind: ClassVar[Kind] = _TrueOrFalse()

    value: bool

    def test(self, site: Site, context: SelectionContext) -> bool:
        shared = len(site.applications) + len(site.gathers) > 1 or len(site.const.names) > 1
        return shared == self.value

    def found(self, site: Site, context: SelectionContext) -> str:
        counts = {"application": len(site.applications), "gather": len(site.gathers), "name": len(site.const.names)}
        return ", ".join(f"{count} {word}{'s' * (count > 1)}" for word, count in counts.items() if count)
