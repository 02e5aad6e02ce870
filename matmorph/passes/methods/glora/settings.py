"""What glora's tensors may be: the settings, the words of each tensor, and which tensors and shapes a site has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from matmorph.passes.methods.language import MethodKind, MethodLanguage

if TYPE_CHECKING:
    from matmorph.ir.core import Value
    from matmorph.ir.site import Site

WORDS: Mapping[str, tuple[str, ...]] = {
    "A": ("lora", "vector", "scalar", "none"),
    "B": ("lora", "vector", "scalar", "none"),
    "C": ("lora", "vector", "none"),
    "D": ("vector", "scalar", "none"),
    "E": ("vector", "scalar", "none"),
}
"""What each tensor may be, largest first: the order of the columns of a gate row."""

GATE = "gates"
"""Short name of what says, in a supernet, which of them count."""
GATE_COLUMNS = sum(map(len, WORDS.values()))
COLUMNS: Mapping[tuple[str, str], int] = {
    pair: column for column, pair in enumerate((tensor, word) for tensor, words in WORDS.items() for word in words)
}

Matrix = Literal["lora", "vector", "scalar", "none"]
Column = Literal["lora", "vector", "none"]
Row = Literal["vector", "scalar", "none"]
Words: TypeAlias = Mapping[str, tuple[str, ...]]
"""By tensor what it may be: exactly one word, or several under `search`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GloraSpec:
    """A scale and a shift of a weight and its bias, each trained as two factors, a vector or a number; or a search for which."""

    A: tuple[Matrix, ...] = field(default=(), metadata={"doc": "scale of the weight, W o A; none by default, under search any"})
    B: tuple[Matrix, ...] = field(default=(), metadata={"doc": "shift of the weight"})
    C: tuple[Column, ...] = field(default=(), metadata={"doc": "shift of the bias by W C: a prompt, as the layer sees it"})
    D: tuple[Row, ...] = field(default=(), metadata={"doc": "scale of the bias, D o b"})
    E: tuple[Row, ...] = field(default=(), metadata={"doc": "shift of the bias"})
    rank: int = field(default=4, metadata={"doc": "inner size of factors, where a tensor is lora", "minimum": 1})
    search: bool = field(default=False, metadata={"doc": "train all that A to E may be at once, for `matmorph search` to choose from"})

    def __post_init__(self) -> None:
        given = {tensor: getattr(self, tensor) for tensor in WORDS}
        for tensor, words in given.items():
            if len(set(words)) < len(words):
                raise ValueError(f"{tensor} names a word twice: {', '.join(words)}")
            if len(words) > 1 and not self.search:
                raise ValueError(f"{tensor} is one of {', '.join(words)}: name one, or set search: true")
        if all(found == ("none",) for found in self.words.values()):
            raise ValueError("glora changes nothing where A to E are all none: give one of them, or search: true")
        if self.search and all(len(found) == 1 for found in self.words.values()):
            raise ValueError("there is nothing to search: A to E are one word each")

    @property
    def words(self) -> Words:
        """What each tensor may be, largest first."""
        everything = WORDS if self.search else dict.fromkeys(WORDS, ("none",))
        given = {tensor: getattr(self, tensor) or everything[tensor] for tensor in WORDS}
        return {tensor: tuple(word for word in WORDS[tensor] if word in found) for tensor, found in given.items()}


class GloraLanguage(MethodLanguage):
    """What stands below `glora:` in a spec."""

    name: ClassVar[str] = "glora"
    kind: ClassVar[MethodKind] = "update"
    Spec: ClassVar[type] = GloraSpec


def bias_of(site: Site) -> Value | None:
    """The bias that D scales: one number per output, the same in all applications; None where there is no such."""
    found = {application.bias for application in site.applications}
    only = next(iter(found)) if len(found) == 1 else None
    fits = only is not None and only.tensor.shape == (site.out_features,) and only.tensor.dtype == site.const.tensor.dtype
    return only if fits else None


def words_of(site: Site, spec: GloraSpec) -> Words:
    """What each tensor may be at this site: D is none where there is no bias."""
    return {**spec.words, "D": spec.words["D"] if bias_of(site) is not None else ("none",)}


def shapes_of(site: Site, spec: GloraSpec) -> dict[str, tuple[int, ...]]:
    """The tensors by short name: `X_up` [n, rank] and `X_down` [rank, m] where X may be lora, else `X` [n] or, of one number, [1]."""
    outs, ins = site.out_features, site.in_features
    sides = {"A": (outs, ins), "B": (outs, ins), "C": (ins, 1), "D": (outs, 1), "E": (outs, 1)}
    found: dict[str, tuple[int, ...]] = {}
    for tensor, words in words_of(site, spec).items():
        n, m = sides[tensor]
        if "lora" in words:
            found |= {f"{tensor}_up": (n, spec.rank), f"{tensor}_down": (spec.rank, m)}
        elif words != ("none",):
            found[tensor] = (n if "vector" in words else 1,)
    return found
