"""The package with a mutant in it (`edits.Mutant`), and the checks that must notice.

`mutated` gives the code with the mutant; its attributes are the definitions of the package: `m.rewrite` is the function that the package
defines as `rewrite`. The module that holds it is loaded anew where it imports the mutated one, directly or through others, together with
those between the two; everything else is the real code. The real modules are back afterwards.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from importlib.abc import SourceLoader
from importlib.util import find_spec, module_from_spec
from operator import attrgetter
from types import ModuleType
from typing import Any

import pytest
from definitions import PACKAGE, home, imports, modules, tree
from edits import Mutant, edited

Check = Callable[[Any], None]
"""Asserts something of the definitions that it is given as attributes."""


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
    """The code with the mutant in it; AssertionError where it no longer fits."""
    return _loaded_anew(dict([edited(mutant, package)]), package)


def unmutated(mutants: Iterable[Mutant], package: str = PACKAGE) -> AbstractContextManager[Anew]:
    """The code as it is, loaded anew as for all of these mutants: what fails on one of them must not fail here."""
    changed = {edited(mutant, package)[0] for mutant in mutants}
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
