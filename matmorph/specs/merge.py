"""Merging of spec trees for `extends`. Every value keeps the position and the keypath it has in the file it came from.

* Mappings merge key by key, at every depth; what is given later wins; `null` takes a key of the base away.
* Under `match:` and in a named selection a condition that is given again is replaced as a whole.
* Under `rewrite:`, `rank:` and `optimizer:` a mapping that makes another choice (another method, another kind of rank) replaces the base's.
* Rules merge by name, as do stages: a rule of the same name merges over the base's and keeps its place; others come after, in order.
  A rule without a name never merges.
* `rules` and `stages` exclude each other, so one cannot extend a spec that has the other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

from matmorph.specs.kinds import NULLS, plain_text
from matmorph.specs.notations import RANK_KINDS
from matmorph.specs.tree import MapTree, Scalar, SeqTree, Tree

OWN_KEYS = ("name", "extends")  # say something about one file alone and are not inherited
NAMED_LISTS = ("rules", "stages")
CHOICES: Mapping[str, Collection[str] | None] = {"rewrite": None, "optimizer": None, "rank": tuple(RANK_KINDS)}
"""Keys whose mapping is one of several alternatives: the keys that name the alternative, None = all."""

MAX_RULES = 1000

Merge = Callable[[str, Tree, Tree], Tree]  # (key, base, top) -> what stands under the key


def extend(base: MapTree, top: MapTree) -> MapTree:
    """The spec `top` that extends the spec `base`; SpecError where one has rules and the other stages, or there are too many rules."""
    for mine, other in (("rules", "stages"), ("stages", "rules")):
        if mine in top.items and other in base.items:
            where = base.key_at.get(other)
            raise top.key_error(mine, f"cannot extend a spec that has {other}{f' (at {where})' if where else ''}")
    inherited = {key: tree for key, tree in base.items.items() if key not in OWN_KEYS}
    return _merge_mapping(replace(base, items=inherited), top)


def _merge(key: str, base: Tree, top: Tree) -> Tree:
    if isinstance(base, MapTree) and isinstance(top, MapTree):
        return top if _other_choice(key, base, top) else _merge_mapping(base, top, _BELOW.get(key, _merge))
    if key in NAMED_LISTS and isinstance(base, SeqTree) and isinstance(top, SeqTree):
        return _merge_named(base, top)
    return top


def _replace(key: str, base: Tree, top: Tree) -> Tree:
    return top


def _merge_selection(name: str, base: Tree, top: Tree) -> Tree:
    return _merge("match", base, top)


_BELOW: Mapping[str, Merge] = {"match": _replace, "select": _merge_selection}
"""How the values of a mapping under such a key merge."""


def _merge_mapping(base: MapTree, top: MapTree, below: Merge = _merge) -> MapTree:
    items = dict(base.items)
    for key, tree in top.items.items():
        if key in items and plain_text(tree) in NULLS:
            del items[key]
        else:
            items[key] = below(key, items[key], tree) if key in items else tree
    return replace(top, items=items, key_at={**base.key_at, **top.key_at})


def _other_choice(key: str, base: MapTree, top: MapTree) -> bool:
    if key not in CHOICES:
        return False
    choices = CHOICES[key]
    chosen = [name for name in top.items if choices is None or name in choices]
    return any(name not in base.items for name in chosen)


def _merge_named(base: SeqTree, top: SeqTree) -> SeqTree:
    """Rules, or stages, by name. Items that are no mappings are kept for the reader to complain about."""
    items = list(base.items)
    names = {name_of(item): index for index, item in enumerate(items) if name_of(item)}
    for item in top.items:
        index = names.get(name_of(item))
        if index is None:
            if not any(item is present for present in items):  # the same unnamed rule, reached over two bases
                items.append(item)
            continue
        below = items[index]
        items[index] = _merge_mapping(below, item) if isinstance(below, MapTree) and isinstance(item, MapTree) else item
    if len(items) > MAX_RULES:
        raise top.error(f"more than {MAX_RULES} rules")
    return replace(top, items=tuple(items))


def name_of(tree: Tree) -> str | None:
    """The `name` of a rule or stage; None where it has none that can be read."""
    name = tree.items.get("name") if isinstance(tree, MapTree) else None
    return name.text or None if isinstance(name, Scalar) else None


def inherit(stage: MapTree, document: MapTree, keys: Collection[str]) -> MapTree:
    """A stage with the spec's own mappings under `keys` where it says nothing, key by key."""
    below = {key: document.items[key] for key in keys if key in document.items}
    shared = MapTree(document.at, stage.keypath, below, {key: at for key, at in document.key_at.items() if key in below})
    return _merge_mapping(shared, stage)
