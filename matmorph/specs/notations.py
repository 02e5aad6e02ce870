"""Values with a notation of their own: `rank:` and `width:` of a method, and the limits of a budget (`40%`, `120MB`, `3M`)."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal, Self

from matmorph.errors import did_you_mean
from matmorph.specs.kinds import Integer, JsonSchema, Kind, Limits, Number, known_keys, plain_text, wrong
from matmorph.specs.tree import Data, MapTree, Scalar, Tree
from matmorph.specs.typed import Notation

POSITIVE = Integer(Limits(minimum=1))
_SHARE = Number(Limits(exclusive_minimum=0, maximum=1))
_ERROR = Number(Limits(minimum=0, exclusive_maximum=1))

RANK_KINDS: Mapping[str, tuple[Kind, str]] = {
    "energy": (_SHARE, "smallest rank that keeps this share of the squared singular values"),
    "ratio": (_SHARE, "share of the matmul's parameters to keep: rank = floor(ratio * in * out / (in + out))"),
    "error": (_ERROR, "smallest rank whose relative error is at most this"),
}
BESIDE_RANK: Mapping[str, str] = {
    "multiple_of": "make the rank a multiple of this: ratio rounds down, energy and error round up",
    "min": "smallest rank that may come out",
    "max": "largest rank that may come out",
}


@dataclass(frozen=True, slots=True)
class Rank(Notation):
    """What a `rank:` key says: an integer ("fixed"), `{energy: e}`, `{ratio: r}`, `{error: e}` or `auto`.

    `value` is that number (None for "auto"). `multiple_of`, `min`, `max` stand inside the rank mapping or beside `rank:`, not in both.
    """

    kind: Literal["fixed", "energy", "ratio", "error", "auto"]
    value: int | float | None = None
    multiple_of: int = 1
    min: int = 1
    max: int | None = None

    EXPECTED: ClassVar[str] = "an integer >= 1, {energy: e}, {ratio: r}, {error: e} or auto"
    BESIDE: ClassVar[Mapping[str, JsonSchema]] = types.MappingProxyType(
        {key: {**POSITIVE.schema(), "description": doc} for key, doc in BESIDE_RANK.items()}
    )

    @classmethod
    def from_tree(cls, tree: Tree, beside: Mapping[str, Tree]) -> Self:
        inside = known_keys(tree, [*RANK_KINDS, *BESIDE_RANK]).items if isinstance(tree, MapTree) else {}
        for key in beside:
            if key in inside:
                raise beside[key].error(f"given twice: {key} stands inside rank too")
        limits = {key: tree_ for key, tree_ in {**inside, **beside}.items() if key in BESIDE_RANK}
        kind, value = _rank_kind(tree, cls.EXPECTED)
        rank = cls(kind, value, **{key: POSITIVE.read(tree_) for key, tree_ in limits.items()})
        if rank.max is not None and rank.max < rank.min:
            raise limits["max"].error(f"max {rank.max} is below min {rank.min}")
        if kind == "fixed" and value is not None and not rank.allows(int(value)):
            raise tree.error(f"rank {value} disagrees with {', '.join(f'{key} {getattr(rank, key)}' for key in limits)} beside it")
        return rank

    def allows(self, rank: int) -> bool:
        """Whether `rank` is within min and max and a multiple of multiple_of."""
        return self.min <= rank and (self.max is None or rank <= self.max) and rank % self.multiple_of == 0

    @classmethod
    def schema(cls) -> JsonSchema:
        kinds = {key: {**kind.schema(), "description": doc} for key, (kind, doc) in RANK_KINDS.items()}
        mapping: JsonSchema = {"type": "object", "properties": {**kinds, **cls.BESIDE}, "additionalProperties": False}
        return {"oneOf": [POSITIVE.schema(), {"const": "auto"}, {**mapping, "oneOf": [{"required": [key]} for key in RANK_KINDS]}]}

    def plain(self) -> Data:
        if self.kind == "auto":
            return "auto"
        return self.value if self.kind == "fixed" else {self.kind: self.value}

    def __str__(self) -> str:
        return str(self.value) if self.kind == "fixed" else f"{self.kind} {self.value}"

    def plain_beside(self) -> dict[str, Data]:
        defaults = Rank(self.kind)
        return {key: getattr(self, key) for key in BESIDE_RANK if getattr(self, key) != getattr(defaults, key)}


def _rank_kind(tree: Tree, expected: str) -> tuple[Literal["fixed", "energy", "ratio", "error", "auto"], int | float | None]:
    if isinstance(tree, MapTree):
        given = [key for key in RANK_KINDS if key in tree.items]
        if len(given) != 1:
            raise tree.error(f"give exactly one of {', '.join(RANK_KINDS)}, got {' and '.join(given) or 'none'}")
        value: float = RANK_KINDS[given[0]][0].read(tree.items[given[0]])
        named: dict[str, Literal["energy", "ratio", "error"]] = {"energy": "energy", "ratio": "ratio", "error": "error"}
        return named[given[0]], value
    if isinstance(tree, Scalar) and tree.text == "auto":
        return "auto", None
    text = plain_text(tree)
    if not isinstance(tree, Scalar) or not re.fullmatch(r"[+-]?[0-9_]+", text):
        raise wrong(tree, expected, did_you_mean(text, ["auto"]))
    return "fixed", POSITIVE.read(tree)


@dataclass(frozen=True, slots=True)
class Amount(Notation):
    """A limit of a budget. `percent`: value is a percentage of the dense total, in (0, 100]; else an absolute whole number."""

    value: float
    percent: bool

    UNITS: ClassVar[Mapping[str, int]] = types.MappingProxyType({})

    @classmethod
    def from_tree(cls, tree: Tree, beside: Mapping[str, Tree]) -> Self:
        text = tree.text.strip() if isinstance(tree, Scalar) else ""
        found = re.fullmatch(r"(?P<number>[0-9]+(?:_[0-9]+)*(?:\.[0-9]+)?)\s*(?P<unit>[A-Za-z%]*)", text)
        if not found or len(text) > 40 or found["unit"] not in {"", "%", *cls.UNITS}:
            raise wrong(tree, cls.EXPECTED)
        number = Fraction(found["number"])
        if found["unit"] == "%":
            if not 0 < number <= 100:
                raise wrong(tree, "a percentage > 0% and <= 100%")
            return cls(float(number), percent=True)
        absolute = number * cls.UNITS.get(found["unit"], 1)
        if absolute < 1 or absolute.denominator != 1:
            raise wrong(tree, "a whole number >= 1")
        return cls(int(absolute), percent=False)

    @classmethod
    def schema(cls) -> JsonSchema:
        units = "|".join(cls.UNITS)
        text = {"type": "string", "pattern": rf"^[0-9][0-9_]*(\.[0-9]+)?\s*({units}|%)?$"}
        return {"oneOf": [{"type": "integer", "minimum": 1}, text]}

    def plain(self) -> Data:
        return f"{self.value:.12f}".rstrip("0").rstrip(".") + "%" if self.percent else int(self.value)


class Count(Amount):
    """Parameters or multiply-accumulates: k, M, G multiply by 10^3, 10^6, 10^9."""

    EXPECTED = "a percentage such as 40%, or a count such as 3M, 100k or 250_000"
    UNITS = types.MappingProxyType({"k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9})


class Size(Amount):
    """Bytes: kB, MB, GB are powers of 1000, KiB, MiB, GiB powers of 1024."""

    EXPECTED = "a percentage such as 40%, or a size such as 120MB, 64KiB or 250_000"
    UNITS = types.MappingProxyType({"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30})


class _Features(Amount):
    EXPECTED = 'a number of features, a percentage such as "50%", or auto'


@dataclass(frozen=True, slots=True)
class Width(Notation):
    """What a `width:` key says: an integer ("fixed"), a percentage of the width there is ("ratio", `value` in (0, 1]), or `auto`."""

    kind: Literal["fixed", "ratio", "auto"]
    value: int | float | None = None

    EXPECTED: ClassVar[str] = _Features.EXPECTED

    @classmethod
    def from_tree(cls, tree: Tree, beside: Mapping[str, Tree]) -> Self:
        if isinstance(tree, Scalar) and tree.text == "auto":
            return cls("auto")
        amount = _Features.from_tree(tree, beside)
        return cls("ratio", amount.value / 100) if amount.percent else cls("fixed", int(amount.value))

    @classmethod
    def schema(cls) -> JsonSchema:
        return {"oneOf": [*_Features.schema()["oneOf"], {"const": "auto"}]}

    def plain(self) -> Data:
        if self.kind == "auto":
            return "auto"
        return Amount(float(self.value or 0) * 100, percent=True).plain() if self.kind == "ratio" else int(self.value or 0)

    def __str__(self) -> str:
        return str(self.plain())
