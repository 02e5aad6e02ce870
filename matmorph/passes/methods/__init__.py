"""Which methods there are: ours, and those of installed packages. What a method is, `passes.methods.protocol` says."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from matmorph.errors import InputError
from matmorph.passes.methods.protocol import BlockMethod, Method, Methods, ReplaceMethod, SiteMethod, UpdateMethod

ENTRY_POINT_GROUP = "matmorph.methods"

_BUILT_IN: Mapping[str, str] = {
    "low_rank": "matmorph.passes.methods.low_rank:LowRank",
    "quantize": "matmorph.passes.methods.quantize:Quantize",
    "loftq": "matmorph.passes.methods.loftq:LoftQ",
    "qlora": "matmorph.passes.methods.qlora:QLora",
    "tt": "matmorph.passes.methods.tt:TT",
    "tt_lora": "matmorph.passes.methods.tt_lora:TTLora",
    "lora": "matmorph.passes.methods.lora:Lora",
    "glora": "matmorph.passes.methods.glora.method:Glora",
    "sparse_grad": "matmorph.passes.methods.sparse_grad.method:SparseGrad",
    "transact": "matmorph.passes.methods.transact.method:Transact",
}
_BASES: Mapping[str, type[Method]] = {"replace": ReplaceMethod, "update": UpdateMethod, "block": BlockMethod}


def method_table() -> Mapping[str, type[Method]]:
    """All methods by name: ours, and those that installed packages announce in the entry-point group `matmorph.methods`.

    Raises InputError where two announce the same name, where a class is no method, or where a package cannot be imported.
    """
    found: dict[str, tuple[str, type[Method]]] = {name: ("matmorph", _import(place)) for name, place in _BUILT_IN.items()}
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: (point.name, point.value)):
        owner = point.dist.name if point.dist is not None else point.value
        if point.name in found:
            raise InputError(f"two packages announce a method named {point.name}: {found[point.name][0]} and {owner}")
        found[point.name] = (owner, _load(point, owner))
    return {name: method for name, (_, method) in found.items()}


def all_methods() -> Methods:
    """One of each; raises as `method_table`."""
    return {name: method() for name, method in method_table().items()}


def _import(place: str) -> type[Method]:
    module, _, name = place.partition(":")
    method: type[Method] = getattr(import_module(module), name)
    return method


def _load(point: EntryPoint, owner: str) -> type[Method]:
    """The announced class; one that inherits nothing gets the defaults of its kind."""
    try:
        found = point.load()
    except (ImportError, AttributeError) as error:
        raise InputError(f"the method {point.name} of {owner} cannot be imported: {error}") from error
    if not isinstance(found, type):
        raise InputError(f"the method {point.name} of {owner} lacks a class")
    lacking = [part for part in ("name", "kind", "Spec") if not hasattr(found, part)]
    kind = getattr(found, "kind", None)
    base = _BASES.get(str(kind))
    if base is None:
        raise InputError(
            f"the method {point.name} of {owner} "
            + (f"lacks {', '.join(lacking)}" if lacking else f"is of kind {kind!r}, not one of {', '.join(_BASES)}")
        )
    whole = found if issubclass(found, base) else type(found.__name__, (found, base), {"__module__": found.__module__})
    abstract: frozenset[str] = getattr(whole, "__abstractmethods__", frozenset())
    lacking += dict.fromkeys(part for family in (SiteMethod, BlockMethod) for part in vars(family) if part in abstract)
    if lacking:
        raise InputError(f"the method {point.name} of {owner} lacks {', '.join(lacking)}")
    method: type[Method] = whole
    if method.name != point.name:
        raise InputError(f"the method {point.name} of {owner} calls itself {method.name}")
    return method
