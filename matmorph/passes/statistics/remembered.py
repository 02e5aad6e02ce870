"""What the calibration data said, kept in a work folder: a run that goes on does not calibrate again.

Kept under a hash of the graph, its weights, the batches, what was asked, and the number of threads, on which the last bits of a sum depend.
Batches that are not the same when they are read again are not kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from matmorph.ir.core import Graph
from matmorph.ir.site import Site
from matmorph.ir.text.printing import print_graph
from matmorph.passes.methods.protocol import SiteStats
from matmorph.passes.statistics.calibrate import one_at_a_time
from matmorph.passes.statistics.sensitivity import Sensitivity
from matmorph.passes.work.digests import Digests, code_sha256, tensor_sha256
from matmorph.passes.work.folder import STATISTICS, WorkFolder
from matmorph.passes.work.nest import NotANestError


@dataclass(frozen=True, slots=True, eq=False)
class Gathered:
    """Statistics by site, and what the model feels of errors there."""

    stats: Mapping[Site, SiteStats]
    felt: Sensitivity | None


@dataclass(frozen=True, slots=True, eq=False)
class _Written:
    """The same by the sites' paths."""

    stats: dict[str, SiteStats]
    felt: tuple[dict[str, Tensor], dict[str, float], dict[str, float]] | None


def remembered(
    work: WorkFolder,
    graph: Graph,
    batches: Iterable[Any],
    samples: int,
    asked: Any,
    sites: Collection[Site],
    gather: Callable[[], Gathered],
) -> Gathered:
    """From the folder where it is there, else what `gather` gives, kept. `asked`: a nest of all else that it depends on. InputError as the
    folder."""
    read = _read_batches(batches, samples)
    weights = [(const.path, tensor_sha256(const.load())) for const in graph.used_state()]
    try:
        key = Digests().of((code_sha256(), torch.get_num_threads(), print_graph(graph), weights, read, asked))
    except NotANestError:  # settings of a package of others
        return gather()
    found = work.get_large(STATISTICS, key, ("matmorph",))
    if found is not None:
        return _of_sites(found, {site.path: site for site in sites})
    gathered = gather()
    if _read_batches(batches, samples) == read:
        work.put_large(STATISTICS, key, _by_paths(gathered), {"sites": str(len(gathered.stats))})
    return gathered


def _read_batches(batches: Iterable[Any], samples: int) -> str:
    """A hash of those that `samples` samples come from."""
    digest, done = hashlib.sha256(), 0
    for batch in batches:
        leaves, structure = tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)
        digest.update(str(structure).encode())
        tensors = [torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf for leaf in leaves]
        for leaf in tensors:
            digest.update((tensor_sha256(leaf) if isinstance(leaf, Tensor) else repr(leaf)).encode())
        first = next((leaf for leaf in tensors if isinstance(leaf, Tensor)), None)
        done += len(first) if first is not None and first.dim() else 1
        if done >= samples:
            break
    return digest.hexdigest()


def _by_paths(found: Gathered) -> _Written:
    felt = found.felt
    return _Written(
        {site.path: found.stats[site] for site in found.stats},
        None
        if felt is None
        else (
            {site.path: felt.moments[site] for site in felt.moments},
            {site.path: slope for site, slope in felt.slopes.items()},
            {site.path: count for site, count in felt.lookups.items()},
        ),
    )


def _of_sites(found: _Written, sites: Mapping[str, Site]) -> Gathered:
    stats = one_at_a_time({sites[path]: one for path, one in found.stats.items()})
    if found.felt is None:
        return Gathered(stats, None)
    moments, slopes, lookups = found.felt
    felt = Sensitivity(_renamed(moments, sites), _renamed(slopes, sites), _renamed(lookups, sites))
    return Gathered(stats, felt)


AnyValue = TypeVar("AnyValue")


def _renamed(by_path: Mapping[str, AnyValue], sites: Mapping[str, Site]) -> dict[Site, AnyValue]:
    return {sites[path]: one for path, one in by_path.items()}
