"""Positioned YAML: a spec as a tree of texts, each of which knows its `file:line:column` and its keypath.

Built from PyYAML's events, so nothing is constructed, resolved or executed: `yes`, `010` and `1e-4` stay the texts they are, and the
schema decides what they mean. A `dict` given instead of a file becomes the same tree, without positions.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from matmorph.errors import Position, SpecError

DICT_FILE = "<dict>"
MAX_NODES = 10_000  # keys and values together, with every alias expanded: an "alias bomb" ends here
MAX_DEPTH = 64
MAX_TEXT = 10_000  # characters of one value or key: what reads it may take the square of that

Data = str | int | float | bool | None | list[Any] | dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tree:
    """A value of a spec. `at` is None when the spec came as a dict; `keypath` reads like "rules[0].rewrite.low_rank"."""

    at: Position | None
    keypath: str

    def error(self, message: str, details: Iterable[str] = ()) -> SpecError:
        """An error about this value, for the caller to raise."""
        return SpecError(message, at=self.at, keypath=self.keypath, details=details)


@dataclass(frozen=True, slots=True)
class Scalar(Tree):
    """A text. `plain`: written without quotes, so it may be a number, `true`, `null` ...; `text == "" and plain` = nothing was written.

    `start` is the position of the text's first character (after a quote or a `|`), None where lines were folded or escaped.
    """

    text: str
    plain: bool
    start: Position | None = field(default=None, compare=False)

    def place(self, offset: int) -> Position | None:
        """The position of `text[offset]`; where that is not known, of the value."""
        if self.start is None:
            return self.at
        before = self.text[:offset]
        line_start = before.rfind("\n") + 1
        return replace(self.start, line=self.start.line + before.count("\n"), column=self.start.column + offset - line_start)


@dataclass(frozen=True, slots=True)
class MapTree(Tree):
    """A mapping in the order of the file; `key_at` are the positions of the keys themselves (empty for a dict)."""

    items: dict[str, Tree]
    key_at: dict[str, Position]

    def key_error(self, key: str, message: str, details: Iterable[str] = ()) -> SpecError:
        """An error about the key (not its value), for the caller to raise."""
        return SpecError(message, at=self.key_at.get(key, self.at), keypath=join(self.keypath, key), details=details)


@dataclass(frozen=True, slots=True)
class SeqTree(Tree):
    items: tuple[Tree, ...]


def join(keypath: str, key: str | int) -> str:
    """`join("rules[0]", "match")` is "rules[0].match", `join("rules", 0)` is "rules[0]"."""
    if isinstance(key, int):
        return f"{keypath}[{key}]"
    return f"{keypath}.{key}" if keypath else key


def describe(tree: Tree) -> str:
    """What a value is, for "expected ..., got ..."."""
    if isinstance(tree, MapTree):
        return f"a mapping with {', '.join(list(tree.items)[:4])}" if tree.items else "an empty mapping"
    if isinstance(tree, SeqTree):
        return f"a list of {len(tree.items)}" if tree.items else "an empty list"
    if isinstance(tree, Scalar) and not tree.plain:
        return f'the text "{_short(tree.text)}"'
    return _short(tree.text) if isinstance(tree, Scalar) and tree.text else "nothing"


def _short(text: str) -> str:
    line = text.replace("\n", " ")
    return line if len(line) <= 60 else f"{line[:57]}..."


# ---------------------------------------------------------------------------------------------------------------------- from text


def read(text: str, file: str) -> MapTree:
    """The tree of a YAML text whose top is a mapping. `file` is what positions show.

    SpecError: syntax, duplicate keys, tags, recursive aliases, too many values, several documents, nothing in it, no mapping on top.
    """
    composer: _Composer | None = None
    try:
        composer = _Composer(text, file)
        tree = composer.document()
    except yaml.reader.ReaderError as error:
        raise SpecError(f"the character {chr(error.character)!r} is not allowed in YAML", at=_offset(text, file, error.position)) from None
    except yaml.MarkedYAMLError as error:
        raise _syntax_error(error, file) from None
    except (ValueError, OverflowError) as error:  # an escape above U+10FFFF, a version number of thousands of digits
        mark = composer.loader.get_mark() if composer else None
        at = Position(file, mark.line + 1, mark.column + 1) if mark else None
        raise SpecError(f"YAML syntax: {error}", at=at) from None
    if isinstance(tree, MapTree):
        return tree
    if isinstance(tree, Scalar) and tree.plain and not tree.text:
        raise tree.error("the spec is empty")
    raise tree.error(f"a spec is a mapping (version, rules ...), got {describe(tree)}")


def read_bytes(data: bytes, file: str) -> MapTree:
    """`read` of a file's bytes: UTF-8, or UTF-16 where they begin as that does (what `>` writes in PowerShell). SpecError for others."""
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    name, coding = ("UTF-16", "utf-16") if wide else ("UTF-8", "utf-8-sig")
    try:
        return read(data.decode(coding), file)
    except UnicodeDecodeError as error:
        before = data[: error.start].decode(coding, "replace")
        at = _offset(before, file, len(before))
        raise SpecError(f"not {name} text (byte 0x{data[error.start]:02x})", at=at) from None


def _offset(text: str, file: str, offset: int) -> Position:
    before = text[:offset]
    return Position(file, before.count("\n") + 1, offset - before.rfind("\n"))


class _Composer:
    """One pass over the parser's events, like PyYAML's composer but with positions, keypaths and limits."""

    def __init__(self, text: str, file: str) -> None:
        self.file = file
        self.lines = text.splitlines()
        self.loader = yaml.SafeLoader(text)
        self.events: Iterator[Any] = iter(self.loader.get_event, None)
        self.anchors: dict[str, Tree | None] = {}  # None while the anchored value itself is being read
        self.nodes = 0

    def document(self) -> Tree:
        next(self.events)  # the start of the stream
        start = next(self.events)
        if isinstance(start, yaml.StreamEndEvent):
            raise SpecError("the spec is empty", at=Position(self.file, 1, 1))
        tree = self.value(next(self.events), "", 0)
        next(self.events)  # the end of the document
        after = next(self.events)
        if isinstance(after, yaml.DocumentStartEvent):
            raise SpecError("a second document begins here (---); a spec is one document", at=self.position(after))
        return tree

    def position(self, event: Any) -> Position:
        return Position(self.file, event.start_mark.line + 1, event.start_mark.column + 1)

    def count(self, at: Position | None, keypath: str) -> None:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise SpecError(f"more than {MAX_NODES} values with all aliases expanded", at=at, keypath=keypath)

    def value(self, event: Any, keypath: str, depth: int) -> Tree:
        at = self.position(event)
        self.count(at, keypath)
        if depth > MAX_DEPTH:
            raise SpecError(f"nested more than {MAX_DEPTH} levels deep", at=at)
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event, keypath)
        if event.tag is not None:
            raise SpecError(f"YAML tags are not allowed ({_tag(event.tag)}); values are typed by their key", at=at, keypath=keypath)
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        tree = self.untagged(event, keypath, depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = tree
        return tree

    def untagged(self, event: Any, keypath: str, depth: int) -> Tree:
        if isinstance(event, yaml.MappingStartEvent):
            return self.mapping(event, keypath, depth)
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(event, keypath, depth)
        return self.scalar(event, keypath)

    def scalar(self, event: Any, keypath: str) -> Scalar:
        at = self.position(event)
        _refuse_unfit(event.value, at, keypath)
        return Scalar(at, keypath, event.value, event.style is None, self.text_start(event, at))

    def text_start(self, event: Any, at: Position) -> Position | None:
        text: str = event.value
        if event.style == "|":
            return self.block_start(text, at)
        if event.start_mark.line != event.end_mark.line:
            return None
        quotes = 0 if event.style is None else 1
        source = self.lines[at.line - 1] if at.line <= len(self.lines) else ""
        begin = at.column - 1 + quotes
        return replace(at, column=begin + 1) if source[begin : begin + len(text)] == text else None

    def block_start(self, text: str, at: Position) -> Position | None:
        """Where the first line of a `|` text stands: its lines are the source lines below, less the indentation."""
        for index, line in enumerate(text.split("\n")):
            source = self.lines[at.line + index] if at.line + index < len(self.lines) else ""
            if line and source.endswith(line):
                return Position(at.file, at.line + 1, len(source) - len(line) + 1)
        return None

    def sequence(self, start: Any, keypath: str, depth: int) -> SeqTree:
        items: list[Tree] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.value(event, join(keypath, len(items)), depth + 1))
        return SeqTree(self.position(start), keypath, tuple(items))

    def mapping(self, start: Any, keypath: str, depth: int) -> MapTree:
        items: dict[str, Tree] = {}
        key_at: dict[str, Position] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.key(event, keypath)
            at = self.position(event)
            if key in items:
                raise SpecError(f"duplicate key; it is already given at {key_at[key]}", at=at, keypath=join(keypath, key))
            key_at[key] = at
            value = items[key] = self.value(next(self.events), join(keypath, key), depth + 1)
            if start.flow_style and isinstance(value, Scalar) and value.plain and not value.text:
                hint = 'a brace form is text and needs quotes: "attention.{q,v}"'
                raise SpecError(f"{key} has no value in this {{...}} mapping; {hint}", at=at, keypath=keypath)
        return MapTree(self.position(start), keypath, items, key_at)

    def key(self, event: Any, keypath: str) -> str:
        at = self.position(event)
        self.count(at, keypath)
        if not isinstance(event, yaml.ScalarEvent) or not event.value:
            raise SpecError("a key must be a name, not a list, a mapping, an alias or nothing", at=at, keypath=keypath)
        if event.tag is not None:
            raise SpecError(f"YAML tags are not allowed ({_tag(event.tag)})", at=at, keypath=keypath)
        _refuse_unfit(event.value, at, keypath)
        if event.value == "<<" and event.style is None:
            raise SpecError("YAML merge keys (<<) are not read; use extends, or repeat the keys", at=at, keypath=keypath)
        return str(event.value)

    def alias(self, event: Any, keypath: str) -> Tree:
        at = self.position(event)
        if event.anchor not in self.anchors:
            hint = "a value that begins with * needs quotes"
            raise SpecError(f"no anchor &{event.anchor} stands before this alias *{event.anchor}; {hint}", at=at, keypath=keypath)
        target = self.anchors[event.anchor]
        if target is None:
            raise SpecError(f"the alias *{event.anchor} lies inside its own anchor", at=at, keypath=keypath)
        return self.moved(target, keypath, at)

    def moved(self, tree: Tree, keypath: str, alias_at: Position) -> Tree:
        """`tree` as it stands under another keypath; positions stay those of the anchored text."""
        self.count(alias_at, keypath)
        if isinstance(tree, MapTree):
            items = {key: self.moved(item, join(keypath, key), alias_at) for key, item in tree.items.items()}
            return replace(tree, keypath=keypath, items=items)
        if isinstance(tree, SeqTree):
            return replace(tree, keypath=keypath, items=tuple(self.moved(t, join(keypath, i), alias_at) for i, t in enumerate(tree.items)))
        return replace(tree, keypath=keypath)


def _refuse_unfit(text: str, at: Position | None, keypath: str) -> None:
    """Half a character (an escape like "\\ud800") cannot be written to any file; a text of endless length is no value."""
    if len(text) > MAX_TEXT:
        raise SpecError(f"a text of {len(text):,} characters; at most {MAX_TEXT:,}", at=at, keypath=keypath)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise SpecError("the text contains half a surrogate pair", at=at, keypath=keypath)


def _tag(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!", 1)


# What the scanner says (context and problem) -> what a person can do about it; the first that is found counts.
_SYNTAX: tuple[tuple[str, str], ...] = (
    (r"cannot start any token.*'\\t'|'\\t'.*cannot start any token", "a tab cannot indent here; use spaces"),
    (r"scanning an (alias|anchor)", "a value that begins with * or & needs quotes"),
    (r"cannot start any token", "a value that begins with this character needs quotes"),
    (r"parsing a flow (mapping|sequence).*got '\{'", 'a brace form is text and needs quotes: "attention.{q,v}"'),
    (r"parsing a flow (mapping|sequence)", "a comma is missing, or a bracket is not closed"),
    (r"mapping values are not allowed", "a value that contains ': ' needs quotes, and nested keys go on a line of their own"),
    (r"could not find expected ':'", "a key needs ': ' and a value"),
    (r"scanning a quoted scalar", "a quote is not closed, or \\ begins an unknown escape (single quotes have none)"),
    (r"parsing a block (mapping|collection)", "the indentation does not fit the lines above, or text follows a closed quote"),
    (r"expected '<document start>'", "something stands beside the mapping; all keys of the spec begin in one column"),
    (r"undefined tag handle|scanning a tag|parsing a node", "YAML tags are not allowed; quote a value that begins with !"),
)


def _syntax_error(error: yaml.MarkedYAMLError, file: str) -> SpecError:
    mark = error.problem_mark or error.context_mark
    at = Position(file, mark.line + 1, mark.column + 1) if mark else None
    problem = " ".join(part for part in (error.context, error.problem) if part).replace("\n", " ")
    hints = [hint for pattern, hint in _SYNTAX if re.search(pattern, problem)]
    shown = (error.problem or error.context or "cannot be read").replace("\n", " ").replace("<", "").replace(">", "")
    return SpecError("; ".join([f"YAML syntax: {shown}", *hints[:1]]), at=at)


# ------------------------------------------------------------------------------------------------------------------ to and from data


def from_data(data: Mapping[Any, Any], file: str = DICT_FILE) -> MapTree:
    """The tree of a spec given as plain Python data; SpecError where a value is no str, int, float, bool, None, list or dict."""
    tree = _from_data(data, "", 0, [0])
    if not isinstance(tree, MapTree):
        raise SpecError(f"a spec is a dict, got {type(data).__name__}", keypath=file)
    return tree


def _from_data(data: Any, keypath: str, depth: int, nodes: list[int]) -> Tree:
    nodes[0] += 1
    if depth > MAX_DEPTH or nodes[0] > MAX_NODES:
        raise SpecError(f"nested more than {MAX_DEPTH} levels deep, or more than {MAX_NODES} values", keypath=keypath)
    if isinstance(data, Mapping):
        for key in data:
            if not isinstance(key, str) or not key:
                raise SpecError(f"a key must be a non-empty str, got {key!r} ({type(key).__name__})", keypath=keypath)
            _refuse_unfit(key, None, keypath)
        return MapTree(None, keypath, {str(k): _from_data(v, join(keypath, str(k)), depth + 1, nodes) for k, v in data.items()}, {})
    if isinstance(data, list | tuple):
        return SeqTree(None, keypath, tuple(_from_data(v, join(keypath, i), depth + 1, nodes) for i, v in enumerate(data)))
    if isinstance(data, str):
        _refuse_unfit(data, None, keypath)
        return Scalar(None, keypath, str(data), plain=False)
    return Scalar(None, keypath, _plain_text(data, keypath), plain=True)


def _plain_text(data: Any, keypath: str) -> str:
    if data is None:
        return "null"
    if isinstance(data, bool):
        return "true" if data else "false"
    if isinstance(data, int):
        return int.__repr__(data)  # __repr__ of the base class: an enum or a numpy scalar prints itself with its type
    if isinstance(data, float):
        return float.__repr__(data)
    raise SpecError(f"expected str, int, float, bool, None, list or dict, got {type(data).__name__}", keypath=keypath)


def to_data(tree: Tree) -> Data:
    """Plain data that `from_data`, or YAML, reads as the same tree: a plain text becomes a number, bool or None where it prints back."""
    if isinstance(tree, MapTree):
        return {key: to_data(item) for key, item in tree.items.items()}
    if isinstance(tree, SeqTree):
        return [to_data(item) for item in tree.items]
    if isinstance(tree, Scalar):
        return _scalar_data(tree)
    raise TypeError(f"not a tree: {tree!r}")


def _scalar_data(tree: Scalar) -> Data:
    words: dict[str, Data] = {"true": True, "false": False, "null": None, "~": None}
    if not tree.plain:
        return tree.text
    if tree.text in words:
        return words[tree.text]
    for kind in (int, float):
        try:
            number = kind(tree.text)
        except ValueError:
            continue
        if repr(number) == tree.text:
            return number
    return tree.text
