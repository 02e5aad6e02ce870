"""Mutants: modules loaded anew with one text exchanged, and the checks that must notice."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

Check = Callable[[dict[str, ModuleType]], None]
"""Asserts something of the modules that it is given."""


@contextmanager
def mutated(modules: Sequence[str], where: str, old: str, new: str, package: str = "matmorph.passes") -> Iterator[dict[str, ModuleType]]:
    """`modules` of the package, in the order of their imports, with `old` exchanged in one; the real ones are back afterwards."""
    full = {name: f"{package}.{name}" for name in modules}
    real = {name: importlib.import_module(path) for name, path in full.items()}
    fresh: dict[str, ModuleType] = {}
    try:
        for name, path in full.items():
            source = Path(str(real[name].__file__)).read_text(encoding="utf-8")
            if name == where:
                assert source.count(old) == 1, f"the mutant no longer fits: {old!r}"
                source = source.replace(old, new)
            module = ModuleType(path)
            sys.modules[path] = module
            exec(compile(source, path, "exec"), module.__dict__)
            fresh[name] = module
        yield fresh
    finally:
        sys.modules.update({full[name]: module for name, module in real.items()})


def killer(modules: Sequence[str], checks: Sequence[Check], where: str, old: str, new: str) -> str | None:
    """The first check that fails on the mutant; None where it lives."""
    with mutated(modules, where, old, new) as found:
        for check in checks:
            try:
                check(found)
            except (Exception, pytest.fail.Exception):
                return check.__name__
    return None


UNCHANGED = ("", "", "")
"""No mutant: what fails on one must not fail on the code as it is."""
