"""`rank:` of a tensor train: what a rank of two factors says, or a list with one rank for each pair of neighbouring cores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from matmorph.specs.kinds import JsonSchema
from matmorph.specs.notations import BESIDE_RANK, POSITIVE, Rank
from matmorph.specs.tree import Data, SeqTree, Tree

_DOCS: Mapping[str, str] = {
    "energy": "smallest ranks whose truncations together keep this share of the squared norm of the weight",
    "ratio": "share of the matmul's parameters to keep: the largest rank for all cores that does",
    "error": "smallest ranks whose relative error is at most this",
}


@dataclass(frozen=True)
class Ranks(Rank):
    """As `Rank`: one number for all cores, or a share from which the ranks follow. `each`: the ranks between neighbours, where a list gave
    them; `kind` is "fixed" then and `value` the largest."""

    each: tuple[int, ...] = ()

    EXPECTED: ClassVar[str] = "an integer >= 1, a list of them, {energy: e}, {ratio: r} or {error: e}"

    @classmethod
    def from_tree(cls, tree: Tree, beside: Mapping[str, Tree]) -> Self:
        if not isinstance(tree, SeqTree):
            return super().from_tree(tree, beside)
        for key in beside:
            raise beside[key].error("has no meaning beside a list of ranks")
        each = tuple(POSITIVE.read(item) for item in tree.items)
        if not each:
            raise tree.error("the list of ranks is empty")
        return cls("fixed", max(each), each=each)

    @classmethod
    def schema(cls) -> JsonSchema:
        number, automatic, mapping = Rank.schema()["oneOf"]
        properties = {
            key: {**schema, "description": _DOCS.get(key, BESIDE_RANK.get(key, ""))} for key, schema in mapping["properties"].items()
        }
        lists: JsonSchema = {"type": "array", "items": number, "minItems": 1}
        return {"oneOf": [number, lists, automatic, {**mapping, "properties": properties}]}

    def plain(self) -> Data:
        return list(self.each) if self.each else super().plain()

    def __str__(self) -> str:
        return str(list(self.each)) if self.each else super().__str__()
