"""The reference page of the spec language as Markdown, from the dataclasses and the schema that the loader reads through.

Every key with its type, default, meaning and where it may stand. Nothing here is written twice: what a key means is the `doc` of its field.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from matmorph.specs.conditions.table import CONDITIONS
from matmorph.specs.document import Document, MatchKind, RewriteKind, SelectKind, document_record, example_of
from matmorph.specs.json_schema import match_schema
from matmorph.specs.kinds import JsonSchema, Kind, ListOf, Null
from matmorph.specs.notations import BESIDE_RANK, RANK_KINDS, Count, Rank, Size, Width
from matmorph.specs.numbers import COMPARISON_FORMS, LAYER_FORMS
from matmorph.specs.schema import Budget, Calibration, Export, Pays, Rule, Stage, Tolerance, Train
from matmorph.specs.typed import Field, OneOf, Own, Record, summary, to_plain

_TITLES: Mapping[type[Any], str] = {
    Document: "The whole file",
    Rule: "A rule",
    Stage: "A stage",
    Budget: "budget",
    Tolerance: "tolerance",
    Calibration: "calibration",
    Export: "export",
    Train: "train",
    Pays: "pays",
}
"""Headings of what the language itself has; anything else is headed by its key."""

_INTRODUCTION = """\
# Spec reference

This page is generated from the dataclasses that the loader reads a spec through. `matmorph specs schema` prints the same as a JSON Schema
for editors, `matmorph specs check FILE` checks a file without a model. [Write a spec](../how-to/write-a-spec.md) explains the language by
example.

The set of keys is closed: an unknown key is an error that names the nearest known one. A value means what its key says: `010` is ten where
an integer belongs. A key that takes a list also takes a single item. A default of `-` means that the key may be left out and nothing is
set."""

_MATCH = """\
## match

Conditions on a matmul. Those of one mapping must all hold. Stands in every rule, in every named selection of `select`, and inside `not`,
`any` and `all`. Two conditions are implied: a match that nowhere names `op` matches no pure embedding table, and one that nowhere names
`inserted_by` matches no matmul that an earlier stage inserted."""

_REWRITE = """\
## rewrite

What a rule makes of its matmuls. One of these forms:

* `keep`: nothing; the rule owns its matmuls so that no later rule takes them;
* one method with its settings, for instance `EXAMPLE`;
* a list of methods: at most one that replaces, first, then updates beside it;
* `{any_of: [...]}`: alternatives, each a method, a list of methods or `keep`; the budget chooses.

| method | kind | what it is |
| --- | --- | --- |"""

_KINDS: Mapping[str, str] = {
    "replace": "takes the place of the dense matmul; at most one per rewrite, first in its list",
    "update": "is added to what stays; after a replacing method in a list, or alone",
    "block": "prunes a whole block; stands alone, in a rule that matches `block`",
}


@dataclass(frozen=True, slots=True)
class Section:
    """One mapping of the language. `places`: the key paths under which it may stand."""

    title: str
    record: Record
    places: tuple[str, ...]


def reference_page(methods: Mapping[str, type[Any]]) -> str:
    """The page, ending in a newline. `methods`: classes by name, each with `kind` and `Spec`."""
    sections = _sections([("", document_record(methods, {}, []))])
    anchors = _anchors(sections)
    parts = [_INTRODUCTION]
    for section in sections:
        parts.append(_section(section, anchors))
        if section.record.type is Rule:
            rewrite = _REWRITE.replace("EXAMPLE", example_of(methods))
            parts += [f"{_MATCH}\n\n{_match_table()}\n\n{_about_conditions()}", f"{rewrite}\n{_method_rows(methods)}"]
    parts.append("## Methods")
    for name, method in methods.items():
        parts += _method(name, method)
    parts.append(_notations())
    return "\n\n".join(parts) + "\n"


def _sections(roots: Sequence[tuple[str, Record]]) -> list[Section]:
    """Every mapping that the roots lead to, breadth first, each once with all its places."""
    found: dict[type[Any], tuple[Record, list[str]]] = {}
    queue = list(roots)
    while queue:
        place, record = queue.pop(0)
        known = record.type in found
        found.setdefault(record.type, (record, []))[1].append(place)
        if not known or record.type is Rule:
            queue += [(_path(place, field.key, kind), kind) for field in record.fields() for kind in _records(field.kind)]
    named = {kind: _TITLES.get(kind, places[0].rpartition(".")[2].rstrip("[]")) for kind, (_, places) in found.items()}
    return [Section(named[kind], record, tuple(dict.fromkeys(places))) for kind, (record, places) in found.items()]


def _path(place: str, key: str, record: Record) -> str:
    listed = "[]" if record.type in (Rule, Stage) else ""
    return f"{place}.{key}{listed}" if place else f"{key}{listed}"


def _records(kind: Kind) -> Iterator[Record]:
    """The mappings that a value of this kind may be or hold."""
    if isinstance(kind, Record):
        yield kind
    elif isinstance(kind, ListOf):
        yield from _records(kind.item)
    elif isinstance(kind, OneOf):
        for one in kind.kinds:
            yield from _records(one)


def _anchors(sections: Sequence[Section]) -> dict[type[Any], str]:
    """The heading's anchor by what stands under it."""
    return {section.record.type: re.sub(r"[^\w]+", "-", section.title.lower()) for section in sections}


def _section(section: Section, anchors: Mapping[type[Any], str], level: str = "##") -> str:
    kind = section.record.type
    about = (kind.__doc__ or "").strip() if summary(kind) else ""
    about = about if kind not in _TITLES else summary(kind)  # the rest of those is for readers of the code
    places = ", ".join(f"`{place}`" for place in section.places if place)
    where = f"\n\nStands at: {places}." if places else ""
    return f"{level} {section.title}\n\n{_prose(about)}{where}\n\n{_table(section.record, anchors)}"


def _table(record: Record, anchors: Mapping[type[Any], str]) -> str:
    rows = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for field in record.fields():
        rows.append(f"| `{field.key}` | {_cell(_type(field.kind, anchors))} | {_default(field)} | {_cell(field.doc)} |")
    extra = record.beside()
    for key, schema in extra.beside.items() if extra else ():
        meaning = f"{schema.get('description', '')} (beside `{extra.key if extra else ''}`)"
        rows.append(f"| `{key}` | {_cell(_json_type(schema))} | - | {_cell(meaning)} |")
    return "\n".join(rows) if len(rows) > 2 else "It has no settings."


LISTED_WORDS = 8
"""A longer set of words is not spelled out in a table."""

_OWN_KINDS: Mapping[type[Any], str] = {
    MatchKind: "[conditions](#match)",
    RewriteKind: "a [rewrite](#rewrite)",
    SelectKind: "names, each with [conditions](#match)",
}


def _type(kind: Kind, anchors: Mapping[type[Any], str]) -> str:
    if isinstance(kind, OneOf):
        return " or ".join(_type(one, anchors) for one in kind.kinds if not isinstance(one, Null))
    if isinstance(kind, ListOf):
        count = f"{kind.length} items" if kind.length else "list"
        return f"{count}, each: {_type(kind.item, anchors)}"
    if isinstance(kind, Record):
        return f"[mapping](#{anchors[kind.type]})"
    if type(kind) in _OWN_KINDS:
        return _OWN_KINDS[type(kind)]
    if isinstance(kind, Own) and issubclass(kind.type, Rank | Width | Count | Size):
        return f"{kind.expected} ([notation](#notations))"
    return kind.expected


def _default(field: Field) -> str:
    if field.required:
        return "required"
    if is_dataclass(field.default) and all(getattr(field.default, one.name) == one.default for one in fields(field.default)):
        return "its defaults"
    plain = to_plain(field.default)
    return "-" if plain in (None, "", [], {}) else f"`{_flow(plain)}`"


def _flow(value: Any) -> str:
    """Plain data as flow YAML."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)


# ---- match


def _match_table() -> str:
    properties: Mapping[str, JsonSchema] = match_schema()["properties"]
    rows = ["| key | type | meaning |", "| --- | --- | --- |"]
    rows += [f"| `{key}` | {_cell(_json_type(schema))} | {_cell(schema['description'])} |" for key, schema in properties.items()]
    return "\n".join(rows)


def _json_type(schema: JsonSchema) -> str:
    if "oneOf" in schema and schema["oneOf"][-1].get("type") == "array":
        return f"{_json_type(schema['oneOf'][0])}, or a list"
    for key in ("oneOf", "anyOf"):
        if key in schema:
            return " or ".join(_json_type(one) for one in schema[key])
    if "$ref" in schema:
        return "mapping of conditions"
    if "enum" in schema:
        words = [str(word) for word in schema["enum"]]
        return f"one of {', '.join(words)}" if len(words) <= LISTED_WORDS else "a known word"
    if schema.get("type") == "array":
        return f"list, each: {_json_type(schema['items'])}"
    names = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false"}
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    ends = "".join(f" {sign} {schema[key]:g}" for key, sign in (("minimum", ">="), ("maximum", "<=")) if key in schema)
    return " or ".join(names[kind] for kind in kinds) + ends


def _about_conditions() -> str:
    return "\n\n".join(entry.about for entry in CONDITIONS.values() if entry.about)


def _keys(notation: str) -> str:
    """The conditions that take values of this notation."""
    return ", ".join(f"`{key}`" for key, entry in CONDITIONS.items() if entry.notation == notation)


# ---- methods


def _method_rows(methods: Mapping[str, type[Any]]) -> str:
    rows = [
        f"| [`{name}`](#{name}) | {method.kind} | {_cell(_first_sentence(method.Spec.__doc__ or ''))} |" for name, method in methods.items()
    ]
    kinds = dict.fromkeys(str(method.kind) for method in methods.values())
    return "\n".join(rows) + "\n\n" + "\n".join(f"* {kind}: {_KINDS.get(kind, '')}." for kind in kinds)


def _method(name: str, method: type[Any]) -> list[str]:
    first, *inner = _sections([(name, Record(method.Spec))])
    nested = [
        Section(f"{name} {section.title}", section.record, tuple(f"rewrite.{place}" for place in section.places)) for section in inner
    ]
    anchors = _anchors(nested)
    shown = [_section(Section(name, first.record, (f"rewrite.{name}",)), anchors, "###")]
    automatic = method.automatic
    if automatic:
        shown.append(f"`auto` is accepted for {', '.join(f'`{key}`' for key in automatic)}; it needs a `budget`.")
    return shown + [_section(section, anchors, "####") for section in nested]


# ---- notations


def _notations() -> str:
    ranks = "\n".join(f"* `{{{key}: x}}`: {_escaped(f'{kind.expected}; {doc}')}." for key, (kind, doc) in RANK_KINDS.items())
    beside = "\n".join(f"* `{key}`: {doc}." for key, doc in BESIDE_RANK.items())
    return f"""\
## Notations

**Ranks.** {Rank.EXPECTED.capitalize()}.

{ranks}

Beside `rank` or inside its mapping, not in both:

{beside}

**Widths.** A number of features, a percentage such as `"50%"`, or `auto`.

**Counts.** {_escaped(Count.EXPECTED[0].upper() + Count.EXPECTED[1:])}. Units: {_units(Count.UNITS)}.

**Sizes.** {_escaped(Size.EXPECTED[0].upper() + Size.EXPECTED[1:])}. Units: {_units(Size.UNITS)}.

**Comparisons** ({_keys("Comparisons")}). {COMPARISON_FORMS}. A list must hold as a whole.

**Layers.** {LAYER_FORMS}; ranges include both ends, layers count from 0.

**Globs** ({_keys("Globs")}, `trainable`, `frozen`). `*` stays within one component of a dotted name, `**` takes zero or more components,
`{{a,b}}` are alternatives and must be quoted in YAML. A path may be a regular expression instead: `"re:..."`.

**Patterns.** Lines `name = function(argument, ...)`. `matmul(x)` is a product with a weight in any form, `matmul(a, b)` one of two
activations; every other function is an ATen operator by its base name. A name that stands twice is the same value, a name that stands on no
left side matches anything, `add` and `mul` commute, and layout operators (view, transpose, to ...) are looked through."""


def _units(units: Mapping[str, int]) -> str:
    return ", ".join(f"`{unit}` {factor:,}" for unit, factor in units.items())


# ---- text


_CODE = re.compile(r"(`[^`]*`|\]\([^)]*\))")


def _cell(text: str) -> str:
    """Text for a cell of a table: what Markdown would take for markup is escaped outside of code and link targets."""
    return _escaped(" ".join(text.split()))


def _prose(text: str) -> str:
    return "\n\n".join(_escaped(" ".join(paragraph.split())) for paragraph in text.split("\n\n"))


def _escaped(text: str) -> str:
    parts = _CODE.split(text)
    return "".join(
        part.replace("|", "&#124;") if index % 2 else re.sub(r"([*_<>|])", lambda found: f"&#{ord(found[1])};", part)
        for index, part in enumerate(parts)
    )


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=\.)\s", " ".join(text.split()), maxsplit=1)[0]
