r"""A mutant: one definition of the package and one edit of its syntax tree.

It names a definition, wherever in the package its file lies: a function, a class, a method (`Lora.build`) or a constant; see
`definitions.homes`. Where several modules define the name, the edit must fit into one of them alone. In that definition `find` becomes
`put`. Both are Python, compared as syntax trees: line breaks and quotes do not count.

    Mutant("choose", "min(costs)", "max(costs)")                  an expression
    Mutant("choose", "x = y\nlast = x", "last = y")               statements: where one of the two is no expression
    Mutant("choose", "descending=True", "descending=False")       a keyword argument is written like an assignment
    Mutant("choose", "costs", "[]", nth=2)                        the second of several such places; without `nth` there is exactly one
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from definitions import definitions, homes, modules, tree


class Mutant(NamedTuple):
    where: str
    find: str
    put: str
    nth: int | None = None


def _parsed(*sources: str) -> list[list[ast.AST]]:
    """Expressions if all are, statements otherwise."""
    try:
        return [[ast.parse(source, mode="eval").body] for source in sources]
    except SyntaxError:
        return [list(ast.parse(source).body) for source in sources]


def _as_keyword(nodes: Sequence[ast.AST]) -> list[ast.AST]:
    match nodes:
        case [ast.Assign(targets=[ast.Name(id=name)], value=value)]:
            return [ast.keyword(name, value)]
    return []


def _places(root: ast.AST, find: Sequence[ast.AST]) -> Iterator[tuple[tuple[int, int], Callable[[Sequence[ast.AST]], None]]]:
    """Of each place below `root` that reads like `find`: its position, and what puts other nodes there."""
    wanted, count = [ast.dump(node) for node in find], len(find)
    for parent in ast.walk(root):
        for field, value in ast.iter_fields(parent):
            several = isinstance(value, list)
            nodes = [node if isinstance(node, ast.AST) else ast.Load() for node in (value if several else [value])]
            for start in range(len(nodes) - count + 1 if count else 0):
                if [ast.dump(node) for node in nodes[start : start + count]] != wanted:
                    continue

                def put(new: Sequence[ast.AST], parent: ast.AST = parent, field: str = field, start: int = start) -> None:
                    old = getattr(parent, field)
                    setattr(parent, field, [*old[:start], *new, *old[start + count :]] if isinstance(old, list) else new[0])

                yield (nodes[start].lineno, nodes[start].col_offset), put


def places(module: ast.Module, qualified: str, mutant: Mutant) -> list[Callable[[], None]]:
    """What makes the mutant's edit, for each place where it fits in that definition, in the order of the source."""
    find, put = _parsed(mutant.find, mutant.put)
    forms = ((find, put), (_as_keyword(find), _as_keyword(put)))
    roots = [node for name, node in definitions(module.body) if name == qualified]
    found = [(at, partial(place, new)) for look, new in forms for root in roots for at, place in _places(root, look)]
    return [edit for _, edit in sorted(found, key=lambda one: one[0])]


def edited(mutant: Mutant, package: str) -> tuple[str, ast.Module]:
    """(module, its tree with the edit). AssertionError where it does not fit into just one of the definitions that are called so."""
    trees = {module: tree(modules(package)[module]) for module, _ in homes(mutant.where, package)}
    found = {module: edits for module, name in homes(mutant.where, package) if (edits := places(trees[module], name, mutant))}
    counts = [len(edits) for edits in found.values()]
    fits = len(counts) == 1 and (counts == [1] if mutant.nth is None else 1 <= mutant.nth <= counts[0])
    there = " and ".join(f"{len(edits)} in {module}" for module, edits in found.items()) or "none"
    assert fits, f"the mutant no longer fits: of {mutant.find!r}, {mutant.where} has {there}"
    ((module, edits),) = found.items()
    edits[(mutant.nth or 1) - 1]()
    return module, ast.fix_missing_locations(trees[module])
