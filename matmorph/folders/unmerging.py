"""Adapters back out of a merged folder: what its weights have more than the stored base, as factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from matmorph.errors import InputError
from matmorph.folders.open import initializers
from matmorph.ir.core import Const, Graph
from matmorph.ir.site import Site
from matmorph.ir.sites.matmuls import find_sites
from matmorph.passes.adapters.merging import factors_of
from matmorph.passes.adapters.table import Adapter


def unmerge_files(graph: Graph, adapters: Sequence[Adapter], merged: Path, out: Path) -> dict[str, float]:
    """Writes trained values of `graph` (a reopened training folder) that give the weights of the folder `merged`: factors, and every other
    parameter that differs. Per site, the share of the difference that the factors do not hold.

    InputError: nothing to unmerge, adapters whose merged form is no sum of base and factors, a folder of another model.
    """
    _refuse_unfit(adapters)
    sites = {site.path: site for site in find_sites(graph)}
    state = {const.path: const for const in graph.state}
    weights = initializers(merged)
    values: dict[str, Tensor] = {}
    rest: dict[str, float] = {}
    taken: set[str] = set()
    for adapter in adapters:
        site = sites[adapter.site if adapter.base == "dense" else adapter.base_consts["base"]]
        name = site.const.path if adapter.base == "dense" else f"{adapter.site}.weight"
        taken.add(name)
        rank = int(state[adapter.consts["down"]].tensor.shape[-1])
        factors, rest[adapter.site] = factors_of(_read(site, weights, name, merged), site.weight().detach(), adapter, rank)
        values.update({adapter.consts[part]: factor.float().contiguous() for part, factor in factors.items()})
    values.update(_others(state, weights, taken))
    save_file(values, out)
    return rest


def _refuse_unfit(adapters: Sequence[Adapter]) -> None:
    if not adapters:
        raise InputError("nothing to unmerge: the model has no adapters")
    for adapter in adapters:
        if adapter.base not in ("dense", "own"):
            raise InputError(f"{adapter.site}: merging quantised its base anew, which cannot be undone; keep the file of trained values")
        if adapter.method != "lora" or [entry.site for entry in adapters].count(adapter.site) > 1:
            raise InputError(f"{adapter.site}: only a single lora can be found in a merged weight; keep the file of trained values")


def _read(site: Site, weights: Mapping[str, Tensor], name: str, merged: Path) -> Tensor:
    shape = tuple(int(dim) for dim in site.const.tensor.shape)
    found = weights.get(name)
    if found is None or tuple(found.shape) != shape:
        raise InputError(f"{merged}: has no weight {name} of {list(shape)}, so it was not merged from this model")
    return site.read(found)


def _others(state: Mapping[str, Const], weights: Mapping[str, Tensor], taken: set[str]) -> dict[str, Tensor]:
    """Parameters outside of all merged sites that training changed (heads, norms)."""
    both = {name: weights[name] for name, const in state.items() if const.kind == "parameter" and name in weights and name not in taken}
    changed = {name: tensor for name, tensor in both.items() if not torch.equal(tensor.float(), state[name].load().float())}
    return {name: tensor.float().contiguous() for name, tensor in changed.items()}
