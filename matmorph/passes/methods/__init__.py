"""Which methods there are: ours, and those of installed packages. What a method is, `passes.methods.protocol` says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from matmorph.errors import InputError
from matmorph.passes.methods.language import MethodLanguage

if TYPE_CHECKING:
    from matmorph.passes.methods.protocol import Method, Methods

ENTRY_POINT_GROUP = "matmorph.methods"

_BUILT_IN: Mapping[str, str] = {
    "low_rank": "LowRank",
    "quantize": "Quantize",
    "loftq": "LoftQ",
    "qlora": "QLora",
    "tt": "TT",
    "tt_lora": "TTLora",
    "lora": "Lora",
    "dora": "Dora",
    "loha": "Loha",
    "lokr": "Lokr",
    "melora": "Melora",
    "ia3": "IA3",
    "glora": "Glora",
    "sparse_grad": "SparseGrad",
    "transact": "Transact",
}
"""The classes of the folders of these names: `NAME.method:Class`, and `NAME.settings:ClassLanguage`, which loads without torch."""
_BASES: Mapping[str, str] = {"replace": "ReplaceMethod", "update": "UpdateMethod", "block": "BlockMethod"}


def languages() -> Mapping[str, type[MethodLanguage]]:
    """What the spec language knows of all methods, by name. Ours load no torch; one of another package is loaded when it is asked for.

    Raises InputError as `method_table` does: here for a name that two announce, on access for the rest.
    """
    return _Languages(_announced())


def method_table() -> Mapping[str, type[Method]]:
    """All methods by name: ours, and those that installed packages announce in the entry-point group `matmorph.methods`.

    Raises InputError where two announce the same name, where a class is no method, or where a package cannot be imported.
    """
    ours = {name: _import(f"{__name__}.{name}.method", kind) for name, kind in _BUILT_IN.items()}
    return {**ours, **{name: _load(point) for name, point in _announced().items()}}


def all_methods() -> Methods:
    """One of each; raises as `method_table`."""
    return {name: method() for name, method in method_table().items()}


@dataclass(frozen=True, slots=True)
class _Languages(Mapping[str, type[MethodLanguage]]):
    """Loads what is looked up. `others`: the announcements of installed packages."""

    others: Mapping[str, EntryPoint]

    def __getitem__(self, name: str) -> type[MethodLanguage]:
        if name in _BUILT_IN:
            ours: type[MethodLanguage] = _import(f"{__name__}.{name}.settings", f"{_BUILT_IN[name]}Language")
            return ours
        return _load(self.others[name])

    def __contains__(self, name: object) -> bool:
        return name in _BUILT_IN or name in self.others

    def __iter__(self) -> Iterator[str]:
        return iter((*_BUILT_IN, *self.others))

    def __len__(self) -> int:
        return len(_BUILT_IN) + len(self.others)


def _announced() -> Mapping[str, EntryPoint]:
    """What installed packages announce, by name. InputError for a name that is taken."""
    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: (point.name, point.value)):
        if point.name in _BUILT_IN or point.name in found:
            first = "matmorph" if point.name in _BUILT_IN else _owner(found[point.name])
            raise InputError(f"two packages announce a method named {point.name}: {first} and {_owner(point)}")
        found[point.name] = point
    return found


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def _import(module: str, name: str) -> Any:
    return getattr(import_module(module), name)


def _load(point: EntryPoint) -> type[Method]:
    """The announced class; one that inherits nothing gets the defaults of its kind."""
    owner = _owner(point)
    try:
        found = point.load()
    except Exception as error:  # whatever the package's own import raises
        raise InputError(f"the method {point.name} of {owner} cannot be imported: {error}") from error
    if not isinstance(found, type):
        raise InputError(f"the method {point.name} of {owner} lacks a class")
    lacking = [part for part in ("name", "kind", "Spec") if not hasattr(found, part)]
    kind = getattr(found, "kind", None)
    if str(kind) not in _BASES:
        raise InputError(
            f"the method {point.name} of {owner} "
            + (f"lacks {', '.join(lacking)}" if lacking else f"is of kind {kind!r}, not one of {', '.join(_BASES)}")
        )
    protocol = import_module(f"{__name__}.protocol")
    base = getattr(protocol, _BASES[str(kind)])
    whole = found if issubclass(found, base) else type(found.__name__, (found, base), {"__module__": found.__module__})
    abstract: frozenset[str] = getattr(whole, "__abstractmethods__", frozenset())
    lacking += dict.fromkeys(part for family in (protocol.SiteMethod, protocol.BlockMethod) for part in vars(family) if part in abstract)
    if lacking:
        raise InputError(f"the method {point.name} of {owner} lacks {', '.join(lacking)}")
    method: type[Method] = whole
    if method.name != point.name:
        raise InputError(f"the method {point.name} of {owner} calls itself {method.name}")
    return method
