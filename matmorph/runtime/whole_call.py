"""A call of a model that keeps a cache, as one of a model that keeps none: all tokens at once, behind an empty cache."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from matmorph.runtime.decoder import MASK, POSITIONS
from matmorph.runtime.feeds import Array
from matmorph.runtime.format.artifact import Manifest


def positions_of(mask: Array) -> Array:
    """The place of each token among those of its row that the mask shows, int64 from 0; what is hidden has a place too, and nobody asks."""
    places: Array = np.maximum(mask.astype(np.int64).cumsum(-1) - 1, 0)
    return places


def with_empty_cache(manifest: Manifest, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """The feeds with what they lack: positions, counted from the mask, and a past without a token for as many rows as the first feed has.
    The feeds themselves for a model without a cache."""
    if manifest.cache is None:
        return dict(feeds)
    rows = len(next(iter(feeds.values())))
    pasts = {slot.past: slot.axis for slot in manifest.cache.slots}
    found = dict(feeds)
    for info in manifest.inputs:
        if info.name in pasts:
            sizes = [0 if axis == pasts[info.name] else rows if isinstance(dim, str) else dim for axis, dim in enumerate(info.shape)]
            found.setdefault(info.name, np.zeros(sizes, np.dtype(info.dtype)))
        elif info.name == POSITIONS and MASK in feeds:
            found.setdefault(POSITIONS, positions_of(feeds[MASK]))
    return found
