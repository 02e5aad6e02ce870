"""A spec written in Python: notations as objects, and any of the objects back as the plain data that a spec file holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from matmorph.optimizers import OPTIMIZERS, optimizer_name
from matmorph.specs.dump import plain_rule
from matmorph.specs.notations import Amount
from matmorph.specs.schema import MethodUse, Rule, Stage, plain_uses
from matmorph.specs.typed import Notation, to_plain


@dataclass(frozen=True, slots=True)
class Share:
    """A rank that follows from a number, is a multiple of `multiple_of`, and lies between `min` and `max`."""

    value: float
    multiple_of: int | None = None
    min: int | None = None
    max: int | None = None

    KEY: ClassVar[str]

    def plain(self) -> dict[str, Any]:
        given = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        return {self.KEY: self.value, **{name: limit for name, limit in given.items() if limit is not None}}


class Ratio(Share):
    """`{ratio: value}`: the largest rank with at most this share of the matmul's parameters, in (0, 1]."""

    __slots__ = ()
    KEY = "ratio"


class Energy(Share):
    """`{energy: value}`: the smallest rank that keeps this share of the squared singular values, in (0, 1]."""

    __slots__ = ()
    KEY = "energy"


class MaxError(Share):
    """`{error: value}`: the smallest rank whose relative error is at most this, in [0, 1)."""

    __slots__ = ()
    KEY = "error"


@dataclass(frozen=True, slots=True)
class Auto:
    """`auto`: the budget decides this rank, width or number of bits."""

    def plain(self) -> str:
        return "auto"


@dataclass(frozen=True, slots=True)
class Percent:
    """`40%` of a width, or of what a budget limits."""

    value: float

    def plain(self) -> Any:
        return Amount(self.value, percent=True).plain()


def plain(value: Any) -> Any:
    """Plain data of a spec, or a part of one, in which objects may stand anywhere; what is no object of a spec stays as it is."""
    if isinstance(value, Mapping):
        return _plain_mapping(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Share | Auto | Percent):
        return value.plain()
    if isinstance(value, Rule):
        return plain_rule(value)
    if isinstance(value, MethodUse):
        return plain_uses((value,))
    if isinstance(value, Stage):
        return _plain_mapping({field.name: held for field in fields(value) if (held := getattr(value, field.name)) is not None})
    if type(value) in OPTIMIZERS.values():
        return {optimizer_name(value): to_plain(value)}
    return to_plain(value)


def _plain_mapping(value: Mapping[Any, Any]) -> dict[Any, Any]:
    """A notation may bring keys that stand beside its own."""
    found: dict[Any, Any] = {}
    for key, item in value.items():
        found[key] = plain(item)
        found |= item.plain_beside() if isinstance(item, Notation) else {}
    return found
