"""Specs for Python: read by name, from a file or a dict, or made of objects."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from matmorph.errors import InputError, SpecError, did_you_mean
from matmorph.passes.methods import languages, method_table
from matmorph.passes.methods.language import MethodLanguage
from matmorph.specs import schema
from matmorph.specs.document import LANGUAGE_VERSION, RewriteKind
from matmorph.specs.load import load_spec as read_spec
from matmorph.specs.objects import plain
from matmorph.specs.schema import MethodUse, Rule
from matmorph.specs.tree import from_data

SpecSource: TypeAlias = "schema.Spec | str | os.PathLike[str] | Mapping[str, Any] | Sequence[Rule]"


def load_spec(source: SpecSource) -> schema.Spec:
    """A library name, a path, a dict (of plain data or objects) or a list of rules as a checked Spec; a Spec is given back as it is.

    Raises SpecError with file:line:column, or with the place in what Python gave.
    """
    if isinstance(source, schema.Spec):
        return source
    if isinstance(source, str):
        return read_spec(source, languages())
    if isinstance(source, os.PathLike):
        return read_spec(Path(source), languages())
    if isinstance(source, Mapping):
        return read_spec(plain(source), languages())
    if isinstance(source, list | tuple):
        return Spec(rules=source)
    raise InputError(f"a spec is a library name, a path, a dict or a list of rules, got {type(source).__name__}")


class _Given(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, schema.Spec)


class Spec(metaclass=_Given):
    """A whole spec of objects: `Spec(rules=[Rule(...)], seed=1)`, with the keys of a spec file. What it gives is what `load_spec` gives for
    the same YAML, checked; everything that `load_spec` gives is an instance.

    Raises SpecError, with the place in what was given and the nearest valid word.
    """

    def __new__(cls, **document: Any) -> schema.Spec:  # type: ignore[misc]
        return load_spec({"version": LANGUAGE_VERSION, **document})


@dataclass(frozen=True, slots=True)
class Configurable:
    """A method that is to be given its settings: the fields of its `Spec`, by name."""

    name: str
    method: type[MethodLanguage]

    def __call__(self, **settings: Any) -> MethodUse:
        """The method with these settings, for a `Rule`. SpecError for a setting that it does not have, or that cannot be."""
        return RewriteKind({self.name: self.method}).method(from_data({self.name: plain(settings)}))

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.method.Spec)

    def __repr__(self) -> str:
        return f"<method {self.name} without settings>"


def methods() -> tuple[str, ...]:
    """The names of all methods: those of matmorph, and those that installed packages bring."""
    return tuple(languages())


def method(name: str) -> Configurable:
    """The method of this name, to be called with its settings. SpecError for an unknown name, with the nearest."""
    table = languages()
    if name not in table:
        raise SpecError(f"no method is called {name!r}{did_you_mean(str(name), table)}", details=[f"methods: {', '.join(table)}"])
    return Configurable(name, table[name])


def method_classes() -> Mapping[str, str]:
    """The name of every method by that of its class, under which it is an attribute of the package too; the first of two has it."""
    found: dict[str, str] = {}
    for name, kind in method_table().items():
        found.setdefault(kind.__name__, name)
    return found
