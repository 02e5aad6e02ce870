"""Records as the plain data of a JSON file, and back. A record is a frozen dataclass; each of its fields stands in the file once, under the
field's name, in the form that its type says (`_codec`), or as its `stored` metadata says otherwise. Keys are written in the order of the
fields; keys that the record does not know are left out when it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_LARGEST = 1 << 63
"""No count, size or offset reaches it, and other readers of JSON would not keep it."""


class ManifestError(Exception):
    """`KEY: what is wrong`; whoever reads the file adds its path."""


@dataclass(frozen=True, slots=True)
class Codec:
    """How a value stands in a file. `read(data, where)` raises ManifestError that names `where`; `write` gives the data back."""

    read: Callable[[Any, str], Any]
    write: Callable[[Any], Any] = lambda value: value


def stored(*, key: str | None = None, codec: Codec | None = None, omitted: bool = False) -> dict[str, Any]:
    """Metadata of a field. `key`: in the file, None = the field's name. `codec`: None = that of its type. `omitted`: the key is left out
    where the value is None, and null is no value of it."""
    return {"key": key, "codec": codec, "omitted": omitted}


def to_plain(record: Any) -> dict[str, Any]:
    """The record as JSON takes it."""
    values = [(entry, getattr(record, entry.name)) for entry in _entries(record.__class__)]
    return {entry.key: entry.codec.write(value) for entry, value in values if not (entry.omitted and value is None)}


def from_plain(kind: Callable[..., T], data: Any, where: str = "") -> T:
    """The record from plain data. `where`: what leads to it, "" at the top. ManifestError for a key that is missing and has no default, and
    for a value of another form."""
    table = typed(data, dict, where)
    prefix = f"{where}." if where else ""
    found: dict[str, Any] = {}
    for entry in _entries(kind):
        if entry.key in table:
            found[entry.name] = entry.codec.read(table[entry.key], f"{prefix}{entry.key}")
        elif entry.required:
            raise ManifestError(f"{prefix}{entry.key}: missing")
    return kind(**found)


def typed(value: Any, kind: type | tuple[type, ...], where: str) -> Any:
    """The value itself, where it is of this type; True is no number, and numbers are finite and below 2^63."""
    odd = isinstance(value, bool) and bool not in (kind if isinstance(kind, tuple) else (kind,))
    if not isinstance(value, kind) or odd or (isinstance(value, int | float) and not abs(value) < _LARGEST):
        raise ManifestError(f"{where}: unexpected value {value!r:.80}")
    return value


def check_numbers(data: Any, where: str) -> None:
    """Raises ManifestError for a number that `typed` would refuse, at any depth of data that no record describes."""
    if isinstance(data, dict):
        for key, value in data.items():
            check_numbers(value, f"{where}.{key}" if where else key)
    elif isinstance(data, list):
        for index, value in enumerate(data):
            check_numbers(value, f"{where}[{index}]")
    elif isinstance(data, int | float) and not isinstance(data, bool):
        typed(data, (int, float), where)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One field of a record: its name there, its key in the file, and how it is read and written."""

    name: str
    key: str
    codec: Codec
    omitted: bool
    required: bool


@cache
def _entries(kind: Callable[..., Any]) -> tuple[_Entry, ...]:
    hints = get_type_hints(kind)
    return tuple(_entry(field, hints[field.name]) for field in fields(kind))  # type: ignore[arg-type]


def _entry(field: Field[Any], hint: Any) -> _Entry:
    told = {**stored(), **field.metadata}
    codec = told["codec"] or _codec(_without_none(hint) if told["omitted"] else hint)
    required = field.default is MISSING and field.default_factory is MISSING
    return _Entry(field.name, told["key"] or field.name, codec, told["omitted"], required)


def _codec(hint: Any) -> Codec:
    """Of a type: str, int, float, a record, a Literal, tuple[T, ...] (a list), tuple[T, U] (a list of two), Mapping[str, T] (a table), any
    of these or None, unions of plain ones, Any."""
    outer, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return Codec(lambda data, where: data)
    if hint is float:
        return Codec(lambda data, where: float(typed(data, (int, float), where)))
    if isinstance(hint, type) and is_dataclass(hint):
        return Codec(lambda data, where: from_plain(hint, data, where), to_plain)
    if outer is Literal:
        return Codec(lambda data, where: _one_of(data, inner, where))
    if outer is tuple:
        return many(_codec(inner[0])) if inner[1:] == (...,) else _row([_codec(one) for one in inner])
    if outer is Mapping:
        return Codec(lambda data, where: typed(data, dict, where), dict) if inner[1] is Any else table(_codec(inner[1]))
    if outer in (UnionType, Union):
        rest = [one for one in inner if one is not NoneType]
        return _or_none(_codec(rest[0])) if len(rest) == 1 else Codec(lambda data, where: typed(data, inner, where))
    return Codec(lambda data, where: typed(data, hint, where))


def _one_of(data: Any, words: tuple[Any, ...], where: str) -> Any:
    if not isinstance(data, str) or data not in words:
        raise ManifestError(f"{where}: unexpected value {data!r:.80}; known are {', '.join(map(str, words))}")
    return data


def _or_none(codec: Codec) -> Codec:
    return Codec(
        lambda data, where: None if data is None else codec.read(data, where),
        lambda value: None if value is None else codec.write(value),
    )


def _row(codecs: list[Codec]) -> Codec:
    """A list with one of each."""

    def read(data: Any, where: str) -> tuple[Any, ...]:
        items = typed(data, list, where)
        if len(items) != len(codecs):
            raise ManifestError(f"{where}: expected {len(codecs)} values, found {len(items)}")
        return tuple(codec.read(item, f"{where}[{index}]") for index, (codec, item) in enumerate(zip(codecs, items, strict=True)))

    return Codec(read, lambda values: [codec.write(value) for codec, value in zip(codecs, values, strict=True)])


def _without_none(hint: Any) -> Any:
    (kind,) = (one for one in get_args(hint) if one is not NoneType)
    return kind


def many(codec: Codec) -> Codec:
    """A list of them, a tuple here."""
    return Codec(
        lambda data, where: tuple(codec.read(item, f"{where}[{index}]") for index, item in enumerate(typed(data, list, where))),
        lambda values: [codec.write(value) for value in values],
    )


def table(codec: Codec) -> Codec:
    """A table of them by name, in its own order."""
    return Codec(
        lambda data, where: {name: codec.read(item, f"{where}.{name}") for name, item in typed(data, dict, where).items()},
        lambda values: {name: codec.write(value) for name, value in values.items()},
    )
