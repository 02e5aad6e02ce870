"""The selector language: reads the mapping of a `match:` (or of a named selection) into a `Match`."""

from __future__ import annotations

from collections.abc import Mapping

from matmorph.specs.conditions.base import Language
from matmorph.specs.conditions.nesting import MappingClause
from matmorph.specs.conditions.table import CONDITIONS
from matmorph.specs.match import Match, leaves
from matmorph.specs.tree import MapTree


def parse_match(tree: MapTree, named: Mapping[str, MapTree]) -> Match:
    """Reads a match. `named`: the spec's named selections (`select:`), read when a `use` names them.

    SpecError with position and keypath: no condition, unknown key, role, op or selection (nearest word named), a selection that uses
    itself, wrong types, globs, regular expressions, numbers and patterns that cannot be read.
    """
    root = MappingClause.read(tree, {}, Language(CONDITIONS, named))
    keys = {leaf.key for leaf, positive in leaves(root) if positive}
    implied = (entry.implied(tree) for key, entry in CONDITIONS.items() if key not in keys)
    return Match(tree.at, tree.keypath, root, tuple(condition for condition in implied if condition is not None), tree)
