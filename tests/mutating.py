"""Mutants: one definition of the package with one edit of its syntax tree, and the checks that must notice.

A mutant names a definition, wherever in the package its file lies: a function, a class, a method (`Lora.build`) or a constant; see
`definitions.home`. In that definition `find` becomes `put`. Both are Python, compared as syntax trees: line breaks and quotes do not count.

    Mutant("choose", "min(costs)", "max(costs)")                  an expression
    Mutant("choose", "x = y\nlast = x", "last = y")               statements: where one of the two is no expression
    Mutant("choose", "descending=True", "descending=False")       a keyword argument is written like an assignment
    Mutant("choose", "costs", "[]", nth=2)                        the second of several such places; without `nth` there is exactly one

`mutated` gives the code with the mutant in it; its attributes are the definitions of the package: `m.rewrite` is the function that the
package defines as `rewrite`. The module that holds it is loaded anew where it imports the mutated one, directly or through others, together
with those between the two; everything else is the real code. The real modules are back afterwards.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from importlib.abc import SourceLoader
from importlib.util import find_spec, module_from_spec
from operator import attrgetter
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from definitions import PACKAGE, definitions, home, imports, modules, tree

Check = Callable[[Any], None]
"""Asserts something of the definitions that it is given as attributes."""


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


def edited(module: ast.Module, qualified: str, mutant: Mutant) -> ast.Module:
    """The tree with the mutant's edit in the definition of that name; AssertionError where it no longer fits."""
    find, put = _parsed(mutant.find, mutant.put)
    forms = ((find, put), (_as_keyword(find), _as_keyword(put)))
    roots = [node for name, node in definitions(module.body) if name == qualified]
    places = [(at, place, new) for look, new in forms for root in roots for at, place in _places(root, look)]
    number = mutant.nth or 1
    fits = number <= len(places) if mutant.nth else len(places) == 1
    assert fits, f"the mutant no longer fits: {mutant.where} has {len(places)} of {mutant.find!r}"
    _, place, new = sorted(places, key=lambda one: one[0])[number - 1]
    place(new)
    return ast.fix_missing_locations(module)


class Anew:
    """The definitions of a package as attributes, some of its modules from other trees (see above)."""

    __slots__ = ("_anew", "_loaded", "_package", "_patch", "_trees")  # nothing is assigned by mistake: see `put`

    def __init__(self, trees: Mapping[str, ast.Module], package: str, patch: pytest.MonkeyPatch) -> None:
        self._trees, self._package, self._patch = trees, package, patch
        self._anew: dict[str, bool] = {}
        self._loaded: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        module, qualified = self._home(name)
        return attrgetter(qualified)(module)

    def __getitem__(self, name: str) -> Any:
        """The same for a name that several modules define."""
        return getattr(self, name)

    def put(self, name: str, value: Any) -> None:
        """Another value for a function, class or constant, where it is defined; also taken back afterwards."""
        self._patch.setattr(*self._home(name), value)

    def _home(self, name: str) -> tuple[ModuleType, str]:
        """The module that defines it, as it is loaded here, and its qualified name in it."""
        module, qualified = home(name, self._package)
        self.load_module(module)
        return import_module(module), qualified

    def is_anew(self, module: str) -> bool:
        """Whether a module is, or imports directly or through others, one of those from other trees."""
        if module not in self._anew:
            self._anew[module] = module in self._trees or any(map(self.is_anew, imports(module, self._package)))
        return self._anew[module]

    def load_module(self, module: str) -> None:
        """Anew where it depends on another tree, what it imports first."""
        if module in self._loaded or not self.is_anew(module):
            return
        self._loaded.add(module)
        for other in imports(module, self._package):
            self.load_module(other)
        spec, (parent, _, child) = find_spec(module), module.rpartition(".")
        assert spec is not None
        assert isinstance(spec.loader, SourceLoader)
        fresh = module_from_spec(spec)
        if parent in sys.modules and vars(sys.modules[parent]).get(child) is sys.modules.get(module, self):
            self._patch.setattr(sys.modules[parent], child, fresh)
        self._patch.setitem(sys.modules, module, fresh)
        own = self._trees.get(module)
        exec(spec.loader.get_code(module) if own is None else compile(own, str(spec.origin), "exec"), vars(fresh))


@contextmanager
def _loaded_anew(trees: Mapping[str, ast.Module], package: str) -> Iterator[Anew]:
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        found = Anew(trees, package, patch)
        try:
            for module in trees:
                found.load_module(module)
            yield found
        finally:  # what was imported for the first time, from a module that was not the real one, is for nobody else
            for name in sorted(set(sys.modules) - before, reverse=True):
                if name in modules(package) and found.is_anew(name):
                    parent, _, child = name.rpartition(".")
                    vars(sys.modules[parent]).pop(child, None)
                    del sys.modules[name]


def real_code(package: str = PACKAGE) -> Anew:
    """The real definitions by the same names, for checks that tests run without a mutant too."""
    return Anew({}, package, pytest.MonkeyPatch())


def mutated(mutant: Mutant, package: str = PACKAGE) -> AbstractContextManager[Anew]:
    """The code with the mutant in it."""
    module, qualified = home(mutant.where, package)
    return _loaded_anew({module: edited(tree(modules(package)[module]), qualified, mutant)}, package)


def unmutated(mutants: Iterable[Mutant], package: str = PACKAGE) -> AbstractContextManager[Anew]:
    """The code as it is, loaded anew as for all of these mutants: what fails on one of them must not fail here."""
    changed = {home(mutant.where, package)[0] for mutant in mutants}
    return _loaded_anew({module: tree(modules(package)[module]) for module in changed}, package)


def killer(code: AbstractContextManager[Anew], checks: Iterable[Check]) -> str | None:
    """The first check that fails; None where the mutant lives."""
    with code as found:
        for check in checks:
            try:
                check(found)
            except (Exception, pytest.fail.Exception):
                return check.__name__
    return None
