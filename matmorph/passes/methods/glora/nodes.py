"""What glora's tensors are, as nodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from matmorph.ir.core import Const, Value
from matmorph.ir.site import Site
from matmorph.passes.methods.glora.settings import COLUMNS, GATE, Words
from matmorph.passes.methods.protocol import FragmentBuilder


@dataclass(frozen=True, slots=True, eq=False)
class Tensors:
    """The tensors of one site as weights of the graph, `start` their numbers by short name."""

    site: Site
    words: Words
    searched: bool
    start: Mapping[str, Tensor]
    named: Mapping[str, Const]
    b: FragmentBuilder

    @property
    def consts(self) -> list[Const]:
        return list(self.named.values())

    def weight(self, w: Value) -> Value:
        """W + W o A + B."""
        a, shift = self._whole("A"), self._whole("B")
        scaled = w if a is None else self.b("aten.add.Tensor", w, self.b("aten.mul.Tensor", w, a))
        return scaled if shift is None else self.b("aten.add.Tensor", scaled, shift)

    def bias(self, w: Value, b: Value | None, own: Value | None) -> Value | None:
        """W C + D o b + E, and the bias that is the fragment's own to add; [out], or None where there is nothing of all that."""
        c = self._whole("C")
        terms = [own, *self._shift(b)]
        if c is not None:
            terms.append(self.b("aten.reshape.default", self.b("aten.matmul.default", w, c), [self.site.out_features]))
        return self._long(self._sum(terms))

    def update(self, rows: Value, b: Value | None) -> Value:
        """x B^T + D o b + E, beside another base."""
        terms = [self._product(rows), self._features(rows)]
        terms.append(self._long(self._sum(self._shift(b)), node=True))
        total = self._sum(terms)
        return rows if total is None else total  # `check` lets no spec through that leaves nothing

    def _product(self, rows: Value) -> Value | None:
        """x B^T for factors."""
        if "lora" not in self.words["B"]:
            return None
        narrow = self.b("aten.linear.default", rows, self.named["B_down"])
        return self.b("aten.linear.default", self._gated("B", "lora", narrow), self.named["B_up"])

    def _features(self, rows: Value) -> Value | None:
        """x B^T where B is the same in every column: it multiplies the sum of the features."""
        column = self._column("B")
        if column is None:
            return None
        return self.b("aten.linear.default", self.b("aten.sum.dim_IntList", rows, [-1], True), column)

    def _shift(self, b: Value | None) -> list[Value | None]:
        """D o b and E, each [out] or [1]."""
        found: list[Value | None] = []
        for tensor in "DE":
            if self.words[tensor] == ("none",):
                continue
            first = self.named[tensor]
            vector = self._gated(tensor, "vector", first) if "vector" in self.words[tensor] else None
            value = self._sum([vector, self._first(tensor, first, vector is not None)])
            found.append(self.b("aten.mul.Tensor", b, value) if tensor == "D" and b is not None and value is not None else value)
        return found

    def _first(self, tensor: str, values: Value, cut: bool) -> Value | None:
        """The first of the numbers [n], where it may stand for all."""
        if "scalar" not in self.words[tensor]:
            return None
        return self._gated(tensor, "scalar", self.b("aten.slice.Tensor", values, 0, 0, 1) if cut else values)

    def _whole(self, tensor: str) -> Value | None:
        """A, B [out, in] or C [in, 1], or what broadcasts to that."""
        product = None
        if "lora" in self.words[tensor]:
            up = self._gated(tensor, "lora", self.named[f"{tensor}_up"])
            product = self.b("aten.matmul.default", up, self.named[f"{tensor}_down"])
        return self._sum([product, self._column(tensor)])

    def _column(self, tensor: str) -> Value | None:
        """What the tensor is as a vector [n, 1] or a number [1, 1]."""
        words = self.words[tensor]
        if not {"vector", "scalar"} & set(words):
            return None
        first: Value
        if "lora" in words:
            first = self.b("aten.slice.Tensor", self.named[f"{tensor}_up"], 1, 0, 1)
        else:
            first = self.b("aten.reshape.default", self.named[tensor], [-1, 1])
        vector = self._gated(tensor, "vector", first) if "vector" in words else None
        return self._sum([vector, self._first(tensor, first, vector is not None or "lora" in words)])

    def _gated(self, tensor: str, word: str, value: Value) -> Value:
        """The value times its gate, where there is a choice."""
        if not self.searched:
            return value
        return self.b("aten.mul.Tensor", value, self.b("aten.select.int", self.named[GATE], 0, COLUMNS[tensor, word]))

    def _sum(self, terms: Iterable[Value | None]) -> Value | None:
        total: Value | None = None
        for term in terms:
            total = term if total is None else total if term is None else self.b("aten.add.Tensor", total, term)
        return total

    def _long(self, value: Value | None, node: bool = False) -> Value | None:
        """[out] where it is a single number. `node`: a result of a node, not a weight itself."""
        if value is None or (value.tensor.shape == (self.site.out_features,) and not (node and isinstance(value, Const))):
            return value
        return self.b("aten.expand.default", value, [self.site.out_features])
