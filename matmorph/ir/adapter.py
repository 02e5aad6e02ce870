"""The adapters of a rewritten graph, as records that a folder can keep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from matmorph.errors import InputError
from matmorph.ir.core import Graph
from matmorph.runtime.format.plain import ManifestError, from_plain, typed


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One method's factors at one site; see `FragmentAdapter` for what it takes over from the fragment.

    `consts`: dotted names by the method's short ones. `base`: what they stand beside: "dense", "own" (a frozen weight that lacks what they
    start with), or the method that took the weight's place, with `settings` what its base is made anew by, where it can be. `base_consts`:
    the weights of that base. `applications`: how often the site's weight is used.
    """

    site: str
    rule: str
    method: str
    consts: Mapping[str, str]
    scale: float
    in_features: int
    out_features: int
    batch: int | None
    base: str
    base_consts: Mapping[str, str]
    settings: Mapping[str, Any] | None
    form: str = "linear"
    applications: int = 1
    inside: bool = False
    starts_at_zero: bool = True
    kept: Mapping[str, int] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


def present(adapters: Iterable[Adapter], graph: Graph) -> tuple[Adapter, ...]:
    """Those whose factors the graph has; merged ones have left it."""
    names = {const.path for const in graph.state}
    return tuple(adapter for adapter in adapters if names.issuperset(adapter.consts.values()))


def as_data(adapters: Iterable[Adapter]) -> list[dict[str, Any]]:
    """The adapters as plain data, for a file; `read_adapters` reads it."""
    return [asdict(adapter) for adapter in adapters]


def read_adapters(data: Any, where: str) -> tuple[Adapter, ...]:
    """The adapters from plain data. InputError naming `where` (a file) for what is none."""
    try:
        return tuple(from_plain(Adapter, entry, f"adapters[{index}]") for index, entry in enumerate(typed(data, list, "adapters")))
    except ManifestError as error:
        raise InputError(f"{where}: its table of adapters cannot be read: {error}") from error
