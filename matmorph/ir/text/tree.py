"""Pytrees in the text form: `*` is a leaf, ( ) [ ] { } are Python's, any other type is its registered name, its context and its children.

((), {"input_ids": *})
"transformers.modeling_outputs.BaseModelOutput" ["last_hidden_state"] (*)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from torch.utils._pytree import TreeSpec, tree_structure, treespec_dumps, treespec_loads

from matmorph.ir.text.scan import Scanner

_PROTOCOL = 1  # of torch's serialised pytrees
_IMPORTING = frozenset({"default_factory_module", "__enum__"})
"""Keys of a context at which torch imports what stands beside them."""
_PLAIN: Mapping[str, tuple[str, str]] = {"builtins.tuple": ("(", ")"), "builtins.list": ("[", "]")}


def default_specs(inputs: int, outputs: int) -> tuple[TreeSpec, TreeSpec]:
    """The pytrees that a text does not spell out: positional inputs; a single output, or a tuple of them."""
    return tree_structure(((0,) * inputs, {})), tree_structure(0 if outputs == 1 else (0,) * outputs)


def format_tree(spec: TreeSpec) -> str:
    """The compact form of a pytree; a type that torch cannot serialise is named only, and can then not be read back."""
    try:
        schema = json.loads(treespec_dumps(spec, _PROTOCOL))[1]
    except (NotImplementedError, TypeError):
        return f"opaque {json.dumps(str(spec))}"
    return _tree_of(schema)


def _tree_of(schema: Mapping[str, Any]) -> str:
    kind, context = schema["type"], schema["context"]
    if kind is None:
        return "*"
    children = [_tree_of(child) for child in schema["children_spec"]]
    if kind in _PLAIN:
        opening, closing = _PLAIN[kind]
        return f"{opening}{', '.join(children)}{closing}"
    if kind == "builtins.dict":
        keys = map(json.dumps, json.loads(context))
        return f"{{{', '.join(f'{key}: {child}' for key, child in zip(keys, children, strict=True))}}}"
    return f"{json.dumps(kind)} {_context(context)} ({', '.join(children)})"


def _context(context: Any) -> str:
    """A context is JSON inside a string nearly always: then shown without the quoting."""
    try:
        plain = isinstance(context, str) and json.dumps(json.loads(context)) == context
    except json.JSONDecodeError:
        plain = False
    return str(context) if plain else f"raw {json.dumps(context)}"


def parse_tree(s: Scanner) -> TreeSpec:
    """The pytree at the scanner's place."""
    at = s.at
    if s.take(r"opaque\b"):
        s.fail(f"this pytree holds a type without a registered name and cannot be read back: {s.string()}", at)
    schema = _schema(s)
    try:
        return treespec_loads(json.dumps((_PROTOCOL, schema)))
    except (NotImplementedError, ImportError, AttributeError, AssertionError, TypeError, KeyError) as error:
        s.fail(f"{error} (it is known once the package that defines it is imported)", at)


def _schema(s: Scanner) -> dict[str, Any]:
    if s.take(r"\*"):
        return {"type": None, "context": None, "children_spec": []}
    for kind, (opening, closing) in _PLAIN.items():
        if s.take(re.escape(opening)):
            return {"type": kind, "context": "null", "children_spec": s.series(re.escape(closing), lambda: _schema(s))}
    if s.take(r"\{"):
        items = s.series(r"\}", lambda: _entry(s))
        return {"type": "builtins.dict", "context": json.dumps([key for key, _ in items]), "children_spec": [item for _, item in items]}
    kind = s.string()
    context = s.json() if s.take(r"raw\b") else json.dumps(s.json())
    if _imports(context):
        s.fail(f"the pytree {kind!r:.80} names a class to import, and nothing is imported for a text")
    s.expect(r"\(", "`(`")
    return {"type": kind, "context": context, "children_spec": s.series(r"\)", lambda: _schema(s))}


def _imports(context: Any) -> bool:
    """Whether torch would import a module to read it: a defaultdict's factory, an enum."""
    try:
        waiting = [json.loads(context)] if isinstance(context, str) else [context]
    except (ValueError, RecursionError):
        return False  # then torch cannot read it either
    while waiting:
        here = waiting.pop()
        if isinstance(here, dict) and not _IMPORTING.isdisjoint(here):
            return True
        waiting.extend(here.values() if isinstance(here, dict) else here if isinstance(here, list) else ())
    return False


def _entry(s: Scanner) -> tuple[Any, dict[str, Any]]:
    key = s.json()
    s.expect(":", "`:`")
    return key, _schema(s)
