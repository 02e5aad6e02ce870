"""What methods do with a weight before and after their mathematics: read it, refuse what is not finite, whiten, store."""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from matmorph.errors import RewriteError
from matmorph.ir.site import Site
from matmorph.passes.linalg.svd import largest
from matmorph.passes.linalg.whiten import Whitening, whitening_factor
from matmorph.passes.methods import SiteStats

FLOATS = ("float16", "bfloat16", "float32", "float64")
"""Types of weights that methods can read."""


def readable(site: Site, w: Tensor) -> Tensor:
    """The weight in float32 or better; RewriteError where it holds NaN or infinity."""
    if not isfinite(largest(w)):
        bad = int((~torch.isfinite(w)).sum())
        raise RewriteError(f"{site.const.path}: {bad} of {w.numel()} entries are NaN or infinite")
    return w.detach() if w.dtype == torch.float64 else w.detach().float()


def stored(site: Site, factor: Tensor) -> Tensor:
    """A factor in the weight's own type; RewriteError where that cannot hold it."""
    narrow = factor.to(site.const.tensor.torch_dtype).contiguous()
    if not isfinite(largest(narrow)):
        raise RewriteError(f"{site.path}: the factors leave the range of {site.const.tensor.dtype}")
    return narrow


def widened(part: Tensor) -> Tensor:
    """In float32 or better, as errors and dense matrices are computed."""
    return part if part.dtype == torch.float64 else part.float()


def whitening_of(site: Site, method: str, stats: SiteStats | None, damping: float) -> Whitening:
    """The whitening factor of the site's input. RewriteError without statistics, or where the second moment is no second moment."""
    if stats is None:
        raise RewriteError(f"{site.path}: {method} with whiten: true needs calibration data")
    try:
        return whitening_factor(stats.second_moment, stats.rows, damping)
    except ValueError as error:
        raise RewriteError(f"{site.path}: {error}") from error
