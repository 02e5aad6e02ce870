"""The selector language: reads the mapping of a `match:` (or of a named selection) into a `Match`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from matmorph.errors import SpecError, did_you_mean
from matmorph.specs.conditions import (
    OPS,
    ROLES,
    STATISTICS,
    BlockCondition,
    Condition,
    Facts,
    GroupCondition,
    InsertedByCondition,
    LayerCondition,
    NoTableCondition,
    NotCondition,
    NotInsertedCondition,
    NumberCondition,
    OpCondition,
    PathCondition,
    PatternCondition,
    RoleCondition,
    SharedCondition,
    StatisticCondition,
)
from matmorph.specs.globs import Glob, GlobError
from matmorph.specs.kinds import known_keys
from matmorph.specs.match import Match, Verdict, leaves
from matmorph.specs.numbers import parse_comparison, parse_layers
from matmorph.specs.pattern import Pattern, parse_pattern
from matmorph.specs.tree import MapTree, Scalar, SeqTree, Tree, describe, join

__all__ = ["KEYS", "Condition", "Facts", "Match", "Verdict", "parse_match"]

KEYS: tuple[str, ...] = (
    "role", "path", "layer", "op", "block", "in_features", "out_features", "params", "shared", "inserted_by", "pattern", "claim",
    "use", "not", "any", "all", *STATISTICS,
)  # fmt: skip
"""The closed set of keys of a `match`."""

BLOCKS = ("attention", "mlp")

_T = TypeVar("_T")


def parse_match(tree: MapTree, named: Mapping[str, MapTree]) -> Match:
    """Reads a match. `named`: the spec's named selections (`select:`), read when a `use` names them.

    SpecError with position and keypath: no condition, unknown key, role, op or selection (nearest word named), a selection that uses
    itself, wrong types, globs, regular expressions, numbers and patterns that cannot be read.
    """
    root = _group(tree, named, ())
    keys = {leaf.key for leaf, positive in leaves(root) if positive}
    implied: list[Condition] = []
    if "op" not in keys:
        implied.append(NoTableCondition(tree.at, tree.keypath, "op", "op: matmul (implied: no op is named)"))
    if "inserted_by" not in keys:
        implied.append(NotInsertedCondition(tree.at, tree.keypath, "inserted_by", "of the source model (implied: no inserted_by is named)"))
    return Match(tree.at, tree.keypath, root, tuple(implied))


# ------------------------------------------------------------------------------------------------------------------ the tree


def _group(tree: MapTree, named: Mapping[str, MapTree], using: tuple[str, ...]) -> GroupCondition:
    if not tree.items:
        raise tree.error("no condition is given; {op: matmul} matches every weight matmul")
    known_keys(tree, KEYS)
    if "claim" in tree.items and "pattern" not in tree.items:
        raise tree.key_error("claim", "claim goes with pattern, and there is none")
    children = tuple(_condition(tree, key, value, named, using) for key, value in tree.items.items() if key != "claim")
    return GroupCondition(tree.at, tree.keypath, _last(tree.keypath), render(tree), children)


def _condition(tree: MapTree, key: str, value: Tree, named: Mapping[str, MapTree], using: tuple[str, ...]) -> Condition:
    if key == "pattern":
        return _pattern(tree, value)
    nesting = {"use": _use, "not": _not, "any": _any_or_all, "all": _any_or_all}
    if key in nesting:
        return nesting[key](key, value, named, using)
    return _LEAVES[key](key, value)


def _use(key: str, tree: Tree, named: Mapping[str, MapTree], using: tuple[str, ...]) -> Condition:
    children = []
    for item in _texts(tree, "the name of a selection"):
        name = item.text
        if name in using:
            raise item.error(f"the selection uses itself: {' -> '.join((*using[using.index(name) :], name))}")
        if name not in named:
            known = did_you_mean(name, named) or (f"; selections: {', '.join(named)}" if named else "; the spec has no select")
            raise item.error(f"unknown selection {name!r}{known}")
        selection = named[name]
        if not isinstance(selection, MapTree):
            raise selection.error(f"a selection is a mapping of conditions, got {describe(selection)}")
        children.append(_group(selection, named, (*using, name)))
    return GroupCondition(tree.at, tree.keypath, key, _text(key, tree), tuple(children))


def _not(key: str, tree: Tree, named: Mapping[str, MapTree], using: tuple[str, ...]) -> Condition:
    if not isinstance(tree, MapTree):
        raise tree.error(f"not takes one mapping of conditions (not: {{any: [...]}} for several), got {describe(tree)}")
    return NotCondition(tree.at, tree.keypath, key, _text(key, tree), _group(tree, named, using))


def _any_or_all(key: str, tree: Tree, named: Mapping[str, MapTree], using: tuple[str, ...]) -> Condition:
    if not isinstance(tree, SeqTree) or not tree.items:
        raise tree.error(f"{key} takes a list of mappings, got {describe(tree)}")
    children = []
    for item in tree.items:
        if not isinstance(item, MapTree):
            raise item.error(f"{key} takes a list of mappings, got {describe(item)}")
        children.append(_group(item, named, using))
    return GroupCondition(tree.at, tree.keypath, key, _text(key, tree), tuple(children), conjunctive=key == "all")


def _pattern(parent: MapTree, tree: Tree) -> Condition:
    if not isinstance(tree, Scalar):
        raise tree.error(f"a pattern is a text of lines like `g = matmul(x)`, got {describe(tree)}")
    pattern = parse_pattern(tree)
    claim = _claim(parent.items["claim"], pattern) if "claim" in parent.items else pattern.matmuls
    return PatternCondition(tree.at, tree.keypath, "pattern", _text("pattern", tree), pattern, claim)


def _claim(tree: Tree, pattern: Pattern) -> tuple[str, ...]:
    if isinstance(tree, SeqTree) and not tree.items:
        raise tree.error("the pattern claims nothing; name at least one captured matmul, or leave claim out to claim all")
    items = _texts(tree, "the name of a captured matmul")
    for item in items:
        if item.text not in pattern.matmuls:
            known = did_you_mean(item.text, pattern.matmuls) or f"; captured matmuls: {', '.join(pattern.matmuls)}"
            raise item.error(f"{item.text!r} is no captured matmul of the pattern{known}")
    return tuple(dict.fromkeys(item.text for item in items))


# ------------------------------------------------------------------------------------------------------------------ single conditions


def _role(key: str, tree: Tree) -> Condition:
    globs = tuple(_glob(item) for item in _texts(tree, "a role"))
    for glob, item in zip(globs, _texts(tree, "a role"), strict=True):
        for alternative in glob.alternatives:
            if not any(Glob(alternative).matches(role) for role in ROLES):
                raise item.error(f"{alternative!r} matches no role{_near_role(alternative)}")
    return RoleCondition(tree.at, tree.keypath, key, _text(key, tree), globs)


def _near_role(text: str) -> str:
    """The nearest role: by its last component, by its first (as a glob), else by spelling; all of them where none is near."""
    last = [role for role in ROLES if "." in role and role.endswith(f".{text}")]
    families = dict.fromkeys(role.split(".")[0] for role in ROLES if "." in role)
    if last:
        return f"; did you mean {last[0]}?"
    if text in families:
        return f"; did you mean {text}.*?"
    return did_you_mean(text, [*ROLES, *(f"{family}.*" for family in families)]) or f"; roles: {', '.join(ROLES)}"


def _path(key: str, tree: Tree) -> Condition:
    items = _texts(tree, 'a path ("encoder.**.dense" or "re:...")')
    return PathCondition(tree.at, tree.keypath, key, _text(key, tree), tuple(_path_pattern(item) for item in items))


def _path_pattern(item: Scalar) -> Glob | re.Pattern[str]:
    if not item.text.startswith("re:"):
        return _glob(item)
    try:
        return re.compile(item.text.removeprefix("re:"))
    except re.error as error:
        at = item.place(len("re:") + (error.pos or 0))
        raise SpecError(f"not a regular expression: {error.msg}", at=at, keypath=item.keypath) from None


def _glob(item: Scalar) -> Glob:
    try:
        return Glob(item.text)
    except GlobError as error:
        raise SpecError(f"not a glob: {error}", at=item.place(error.offset), keypath=item.keypath) from None


def _layer(key: str, tree: Tree) -> Condition:
    return LayerCondition(tree.at, tree.keypath, key, _text(key, tree), _each(tree, "layers", parse_layers))


def _op(key: str, tree: Tree) -> Condition:
    items = _texts(tree, f"an op ({', '.join(OPS)})")
    for item in items:
        _member(item, "op", OPS)
    return OpCondition(tree.at, tree.keypath, key, _text(key, tree), tuple(item.text for item in items))


def _block(key: str, tree: Tree) -> Condition:
    items = _texts(tree, f"a block ({', '.join(BLOCKS)})")
    for item in items:
        _member(item, "block", BLOCKS)
    return BlockCondition(tree.at, tree.keypath, key, _text(key, tree), tuple(item.text for item in items))


def _number(key: str, tree: Tree) -> Condition:
    return NumberCondition(tree.at, tree.keypath, key, _text(key, tree), _each(tree, "a comparison", parse_comparison))


def _statistic(key: str, tree: Tree) -> Condition:
    return StatisticCondition(tree.at, tree.keypath, key, _text(key, tree), _each(tree, "a comparison", parse_comparison))


def _shared(key: str, tree: Tree) -> Condition:
    if not isinstance(tree, Scalar) or not tree.plain or tree.text not in ("true", "false"):
        raise tree.error(f"expected true or false, got {describe(tree)}")
    return SharedCondition(tree.at, tree.keypath, key, _text(key, tree), tree.text == "true")


def _inserted_by(key: str, tree: Tree) -> Condition:
    rules = tuple(item.text for item in _texts(tree, "the name of a rule of an earlier stage"))
    return InsertedByCondition(tree.at, tree.keypath, key, _text(key, tree), rules)


_LEAVES: Mapping[str, Callable[[str, Tree], Condition]] = {
    "role": _role,
    "path": _path,
    "layer": _layer,
    "op": _op,
    "block": _block,
    "in_features": _number,
    "out_features": _number,
    "params": _number,
    "shared": _shared,
    "inserted_by": _inserted_by,
    **dict.fromkeys(STATISTICS, _statistic),
}


# ------------------------------------------------------------------------------------------------------------------ texts


def _texts(tree: Tree, what: str) -> tuple[Scalar, ...]:
    """A text, or a list of at least one."""
    items: tuple[Any, ...] = tree.items if isinstance(tree, SeqTree) else (tree,)
    if not items:
        raise tree.error(f"expected {what}, got an empty list")
    for item in items:
        if not isinstance(item, Scalar) or not item.text or (item.plain and item.text in ("null", "~")):
            raise item.error(f"expected {what}, got {describe(item)}")
    return items


def _each(tree: Tree, what: str, parse: Callable[[str], _T]) -> tuple[_T, ...]:
    found = []
    for item in _texts(tree, what):
        try:
            found.append(parse(item.text))
        except ValueError as error:
            raise item.error(str(error)) from None
    return tuple(found)


def _member(item: Scalar, what: str, known: tuple[str, ...]) -> None:
    if item.text not in known:
        raise item.error(f"unknown {what} {item.text!r}{did_you_mean(item.text, known) or '; known: ' + ', '.join(known)}")


def render(tree: Tree) -> str:
    """A condition as flow text, for people: `{role: mlp.*, layer: 0..5}`; of a text with several lines the first."""
    if isinstance(tree, MapTree):
        return "{" + ", ".join(_text(key, item) for key, item in tree.items.items()) + "}"
    if isinstance(tree, SeqTree):
        return "[" + ", ".join(map(render, tree.items)) + "]"
    lines = tree.text.strip().splitlines() if isinstance(tree, Scalar) else []
    return f"{lines[0]} ..." if len(lines) > 1 else "".join(lines)


def _text(key: str, tree: Tree) -> str:
    return f"{key}: {render(tree)}"


def _last(keypath: str) -> str:
    return keypath.rpartition(".")[2] or join("", "match")
