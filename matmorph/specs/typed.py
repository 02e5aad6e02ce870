"""Typed reading: a frozen dataclass says what a mapping may contain, and the mapping is read, explained and described through it.

Every type hint becomes a `Kind`, which reads the value and gives its JSON Schema, so the loader and the editor cannot disagree. What a
field's `metadata` may hold: doc, choices, minimum, exclusive_minimum, maximum, exclusive_maximum (of a number, or of the items of a list),
min_items, key (the YAML key where it is no Python name).
"""

from __future__ import annotations

import dataclasses
import types
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from matmorph.errors import Position, SpecError, did_you_mean
from matmorph.specs.kinds import (
    NULLS,
    Boolean,
    Integer,
    JsonSchema,
    Kind,
    Limits,
    ListOf,
    Null,
    Number,
    OneWord,
    Text,
    known_keys,
    plain_text,
    wrong,
)
from matmorph.specs.tree import Data, MapTree, Tree

T = TypeVar("T")


class Notation(ABC):
    """Base of a value type with a notation of its own (`rank`, `40%`).

    `EXPECTED` completes "expected ..., got ..."; `BESIDE` are further keys it takes from the mapping it stands in, each with its schema.
    """

    EXPECTED: ClassVar[str]
    BESIDE: ClassVar[Mapping[str, JsonSchema]] = types.MappingProxyType({})

    @classmethod
    @abstractmethod
    def from_tree(cls, tree: Tree, beside: Mapping[str, Tree]) -> Self:
        """The value; `beside` holds those of the `BESIDE` keys that are there. SpecError where it does not fit."""

    @classmethod
    @abstractmethod
    def schema(cls) -> JsonSchema:
        """The JSON Schema of the notation."""

    @abstractmethod
    def plain(self) -> Data:
        """Plain data that reads as this value, together with `plain_beside`."""

    def plain_beside(self) -> dict[str, Data]:
        return {}


class ByName(ABC):
    """Base of a mapping with one key, a name of `table()`, whose value is a mapping of that class; the constructor takes it by its name.

    Each class of the table has a `DOC` that says what it is.
    """

    chosen: Any

    @classmethod
    @abstractmethod
    def table(cls) -> Mapping[str, type[Any]]:
        """Classes by the keys that name them."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The key of `chosen`."""


@dataclass(frozen=True)
class OneOf:
    """The first kind that reads the value; a mapping goes to the kind that reads mappings, for its own error."""

    kinds: tuple[Kind, ...]

    @property
    def expected(self) -> str:
        return " or ".join(kind.expected for kind in self.kinds if not isinstance(kind, Null))

    def read(self, tree: Tree) -> Any:
        records = [kind for kind in self.kinds if isinstance(kind, Record)]
        if isinstance(tree, MapTree) and len(records) == 1:
            return records[0].read(tree)
        others = [kind for kind in self.kinds if not isinstance(kind, Null)]
        if len(others) == 1 and not _is_null(tree):
            return others[0].read(tree)
        for kind in self.kinds:
            try:
                return kind.read(tree)
            except SpecError:
                continue
        words = [word for kind in self.kinds if isinstance(kind, OneWord) for word in kind.words]
        raise wrong(tree, self.expected, did_you_mean(plain_text(tree), words) if words else "")

    def schema(self) -> JsonSchema:
        schemas = [kind.schema() for kind in self.kinds if not isinstance(kind, Null)]
        return schemas[0] if len(schemas) == 1 else {"oneOf": schemas}


def _is_null(tree: Tree) -> bool:
    return plain_text(tree) in NULLS


@dataclass(frozen=True)
class Own:
    """A type with a notation of its own."""

    type: type[Notation]

    @property
    def expected(self) -> str:
        return self.type.EXPECTED

    def read(self, tree: Tree) -> Any:
        return self.type.from_tree(tree, {})

    def schema(self) -> JsonSchema:
        return self.type.schema()


@dataclass(frozen=True)
class Record:
    """A mapping whose keys are the fields of a frozen dataclass. A field `at: Position | None` receives the mapping's position.

    A ValueError out of `__post_init__` (limits between fields) becomes a SpecError at the mapping.
    """

    type: type[Any]
    kinds: Mapping[str, Kind] = dataclasses.field(default_factory=dict)  # fields whose reading needs more than their type hint says

    @property
    def expected(self) -> str:
        required = [field.key for field in self.fields() if field.required]
        return f"a mapping with {', '.join(required)}" if required else "a mapping"

    def fields(self) -> tuple[Field, ...]:
        if issubclass(self.type, ByName):
            kinds = {name: OneOf((Record(kind), Null())) for name, kind in self.type.table().items()}
            return tuple(Field(name, name, kind, self.type.table()[name].DOC, False, None) for name, kind in kinds.items())
        hints = get_type_hints(self.type)
        readable = [field for field in dataclasses.fields(self.type) if field.init and field.name != "at"]
        return tuple(_field(field, self.kinds.get(field.name) or kind_of(hints[field.name], field.metadata)) for field in readable)

    def beside(self) -> Field | None:
        """The one field that takes keys from this mapping too."""
        found = [field for field in self.fields() if field.beside]
        return found[0] if len(found) == 1 else None

    def read(self, tree: Tree) -> Any:
        fields = {field.key: field for field in self.fields()}
        extra = self.beside()
        beside_keys = [key for key in extra.beside if key not in fields] if extra else []
        mapping = known_keys(tree, [*fields, *beside_keys], self.expected)
        values: dict[str, Any] = {"at": mapping.at} if any(f.name == "at" for f in dataclasses.fields(self.type)) else {}
        for key, field in fields.items():
            if key not in mapping.items:
                if field.required:
                    raise mapping.error(f"{key} is missing", [f"{key}: {field.doc}"] if field.doc else [])
            elif extra and key == extra.key and isinstance(field.kind, Own):
                taken = {name: mapping.items[name] for name in beside_keys if name in mapping.items}
                values[field.name] = field.kind.type.from_tree(mapping.items[key], taken)
            else:
                values[field.name] = field.kind.read(mapping.items[key])
        if extra and extra.key not in mapping.items and (left := [key for key in beside_keys if key in mapping.items]):
            raise mapping.key_error(left[0], f"has no meaning without {extra.key}")
        try:
            return self.type(**values)
        except ValueError as error:
            raise mapping.error(str(error)) from None

    def schema(self) -> JsonSchema:
        properties: dict[str, JsonSchema] = {}
        for field in self.fields():
            properties[field.key] = {**field.kind.schema(), **({"description": field.doc} if field.doc else {}), **field.default_schema()}
        extra = self.beside()
        for key, schema in extra.beside.items() if extra else ():
            properties.setdefault(key, schema)
        required = [field.key for field in self.fields() if field.required]
        title = {"description": summary(self.type)} if summary(self.type) else {}
        closed: JsonSchema = {"type": "object", "properties": properties, "additionalProperties": False}
        return {**title, **closed, **({"required": required} if required else {})}


@dataclass(frozen=True)
class Field:
    """One key of a Record."""

    name: str
    key: str
    kind: Kind
    doc: str
    required: bool
    default: Any

    @property
    def beside(self) -> Mapping[str, JsonSchema]:
        return self.kind.type.BESIDE if isinstance(self.kind, Own) else {}

    def default_schema(self) -> JsonSchema:
        plain = None if self.required else to_plain(self.default)
        return {} if plain in (None, "", [], {}) else {"default": plain}


def _field(field: dataclasses.Field[Any], kind: Kind) -> Field:
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    required = default is dataclasses.MISSING
    key, doc = field.metadata.get("key", field.name), field.metadata.get("doc", "")
    return Field(field.name, key, kind, doc, required, None if required else default)


def summary(cls: type[Any]) -> str:
    """The first line of a class's docstring, unless the dataclass decorator wrote it."""
    text = (cls.__doc__ or "").strip().split("\n")[0]
    return "" if text.startswith(f"{cls.__name__}(") else text


def kind_of(hint: Any, metadata: Mapping[str, Any] = types.MappingProxyType({})) -> Kind:
    """The Kind of a type hint. TypeError where the hint is none of those a spec can hold: an error of whoever wrote the dataclass."""
    limits = Limits(**{field.name: metadata.get(field.name) for field in dataclasses.fields(Limits)})
    choices = tuple(metadata.get("choices", ()))
    simple: dict[Any, Kind] = {
        bool: Boolean(),
        int: Integer(limits, choices),
        float: Number(limits),
        str: OneWord(choices) if choices else Text(),
        type(None): Null(),
    }
    if hint in simple:
        return simple[hint]
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return Integer(choices=arguments) if all(isinstance(argument, int) for argument in arguments) else OneWord(arguments)
    if get_origin(hint) in (Union, types.UnionType):
        return OneOf(tuple(kind_of(argument, metadata) for argument in arguments))
    if get_origin(hint) is tuple:
        return _list_kind(arguments, metadata)
    if isinstance(hint, type) and issubclass(hint, Notation):
        return Own(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return Record(hint)
    raise TypeError(f"a spec cannot hold {hint!r}; it can: bool int float str Literal[...] X | None tuple[X, ...] dataclass")


def _list_kind(arguments: tuple[Any, ...], metadata: Mapping[str, Any]) -> ListOf:
    item = kind_of(arguments[0], metadata)
    if arguments[1:] == (Ellipsis,):
        return ListOf(item, min_items=metadata.get("min_items", 0))
    if len(set(arguments)) != 1:
        raise TypeError(f"a spec cannot hold tuple{list(arguments)}; all items must have one type")
    return ListOf(item, length=len(arguments))


def read_dataclass(cls: type[T], tree: Tree) -> T:
    """An instance of the frozen dataclass `cls` from a mapping; SpecError where the mapping does not fit it."""
    result = Record(cls).read(tree)
    if not isinstance(result, cls):
        raise TypeError(f"{cls.__name__} was read as {type(result).__name__}")
    return result


def to_plain(value: Any) -> Any:
    """Plain data that reads as `value` again. Fields that are None and positions are left out; tuples become lists."""
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if isinstance(value, Notation):
        return value.plain()
    if isinstance(value, ByName):
        return {value.name: to_plain(value.chosen)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _record_to_plain(value)
    return value


def _record_to_plain(value: Any) -> dict[str, Any]:
    record = Record(type(value))
    extra = record.beside()
    plain: dict[str, Any] = {}
    for field in record.fields():
        held = getattr(value, field.name)
        if held is None or isinstance(held, Position):
            continue
        plain[field.key] = to_plain(held)
        if extra is not None and field.key == extra.key and isinstance(held, Notation):
            plain.update(held.plain_beside())
    return plain
