"""Which module defines what, and which module imports which, read from a package's source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path

PACKAGE = "matmorph"


class NotOneDefinition(BaseException):
    """No Exception: where a check looks up a name in vain, the check is wrong, and no mutant is killed."""


@cache
def modules(package: str = PACKAGE) -> Mapping[str, Path]:
    root = Path(str(import_module(package).__file__)).parent
    parts = {path: path.relative_to(root.parent).with_suffix("").parts for path in sorted(root.rglob("*.py"))}
    return {".".join(own[:-1] if own[-1] == "__init__" else own): path for path, own in parts.items()}


@cache
def _source(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def tree(path: Path) -> ast.Module:
    return ast.parse(_source(path))


def definitions(body: Sequence[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.stmt]]:
    """(qualified name, node) of the functions, classes and constants of a module or a class."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from definitions(node.body, f"{prefix}{node.name}.")
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        yield from ((prefix + name.id, node) for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


@cache
def _defined(path: Path) -> frozenset[str]:
    return frozenset(name for name, _ in definitions(tree(path).body))


@cache
def homes(name: str, package: str = PACKAGE) -> tuple[tuple[str, str], ...]:
    """(module, qualified name in it) of each definition called so. Before the name may stand one word of its module's path:
    `merging.merge` is `merge` in `passes/adapters/merging.py`, and in `merging/anything.py` too. NotOneDefinition where there is none."""

    def called(module: str, qualified: str) -> bool:
        word, _, rest = name.partition(".")
        return name == qualified or (rest == qualified and word in module.split("."))

    last = re.compile(rf"\b{name.rpartition('.')[2]}\b")
    where = {module: path for module, path in modules(package).items() if last.search(_source(path))}
    found = [(module, qualified) for module, path in where.items() for qualified in _defined(path) if called(module, qualified)]
    if not found:
        raise NotOneDefinition(f"{package} has no definition called {name}")
    return tuple(found)


def home(name: str, package: str = PACKAGE) -> tuple[str, str]:
    """The one of `homes`; NotOneDefinition where there are several."""
    found = homes(name, package)
    if len(found) > 1:
        raise NotOneDefinition(f"{package} has {len(found)} definitions called {name}: {', '.join(module for module, _ in found)}")
    return found[0]


@cache
def imports(module: str, package: str = PACKAGE) -> tuple[str, ...]:
    """The modules of the package that a module imports when it is loaded."""
    all_modules, found = modules(package), []
    for node in tree(all_modules[module]).body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name if name in all_modules else str(node.module) for name in full]
    return tuple(name for name in dict.fromkeys(found) if name in all_modules)
