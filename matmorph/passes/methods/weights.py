"""What methods do with a weight before and after their mathematics: read it, refuse what is not finite, whiten, store."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, TypeAlias

import torch
from torch import Tensor

from matmorph.errors import RewriteError
from matmorph.ir.core import Value
from matmorph.ir.site import Reject, Site
from matmorph.passes.linalg.curves import Directions
from matmorph.passes.linalg.svd import largest
from matmorph.passes.linalg.whiten import (
    Whitening,
    relative_weight_error,
    share,
    size_on_outputs,
    weighted,
    whitening_factor,
)
from matmorph.passes.methods.protocol import Error, FragmentBuilder, SiteStats
from matmorph.specs.schema import Rank

FLOATS = ("float16", "bfloat16", "float32", "float64")
"""Types of weights that methods can read."""

GRADIENT_DAMPING = 1e-2
"""Share of the mean of its diagonal that is added to the second moment of the gradients: it is estimated on few samples, and what they do
not feel others may (decision B4)."""


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


def whitening_of(site: Site, method: str, stats: SiteStats | None, damping: float | None) -> Whitening:
    """The whitening factor of the site's input; without a `damping` it is shrunk as the sample asks for. RewriteError without statistics,
    or where the second moment is no second moment."""
    if stats is None:
        raise RewriteError(f"{site.path}: {method} with whiten: true needs calibration data")
    try:
        found: Whitening = stats.once(("whitening", damping), lambda: whitening_factor(stats.second_moment, stats.rows, damping))
        return found
    except ValueError as error:
        raise RewriteError(f"{site.path}: {error}") from error


def weighting_of(site: Site, stats: SiteStats | None) -> Tensor | None:
    """C [out, out], lower triangular, with C C^T = the damped second moment of the gradients at the site's output; None where none was
    gathered, or where no gradient reaches the site. RewriteError where it is no second moment."""
    moment = None if stats is None else stats.output_moment
    if stats is None or moment is None:
        return None
    try:
        found: Tensor | None = stats.once(
            "weighting", lambda: whitening_factor(moment, 1, GRADIENT_DAMPING).factor if bool(moment.any()) else None
        )
        return found
    except ValueError as error:
        raise RewriteError(f"{site.path}: {error}") from error


Sizes: TypeAlias = tuple[float | None, float | None]


@dataclass(frozen=True, slots=True, eq=False)
class Difference:
    """What a dense approximation leaves over: `matrix` W - W' [out, in], `seen` C^T times it (itself without a weighting C), its relative
    `error`, and its `sizes` on the outputs and as they are felt, where they are known."""

    matrix: Tensor
    seen: Tensor
    error: Error
    sizes: Sizes = (None, None)


def difference(w: Tensor, approximation: Tensor, stats: SiteStats | None, weighting: Tensor | None) -> Difference:
    """With all errors that the statistics allow."""
    matrix = w - approximation.to(w.dtype)
    weight = relative_weight_error(w, approximation)
    if stats is None:
        return Difference(matrix, matrix, Error(weight))
    of_output, of_felt = _sizes(w, stats, weighting)
    output = size_on_outputs(matrix, stats.judged)
    if weighting is None:
        return Difference(matrix, matrix, Error(weight, share(output, of_output)), (output, None))
    seen = weighted(matrix, weighting)
    felt = size_on_outputs(seen, stats.judged)
    return Difference(matrix, seen, Error(weight, share(output, of_output), share(felt, of_felt)), (output, felt))


def _sizes(w: Tensor, stats: SiteStats, weighting: Tensor | None) -> tuple[float, float]:
    """Of the weight itself; the second is 0 without a weighting."""
    output: float = stats.once("size", lambda: size_on_outputs(w, stats.judged))
    felt: float = 0.0 if weighting is None else stats.once("felt size", lambda: size_on_outputs(weighted(w, weighting), stats.judged))
    return output, felt


def error_between(w: Tensor, approximation: Tensor, stats: SiteStats | None, weighting: Tensor | None) -> Error:
    """All errors of a dense approximation that the statistics allow."""
    return difference(w, approximation, stats, weighting).error


def curve_errors(found: Directions, stats: SiteStats | None, weighting: Tensor | None, left: Difference | None = None) -> list[Error]:
    """The same at every rank of a decomposition, of a weight or of what is `left` of it."""
    weight = found.relative_errors(None).tolist()
    if stats is None:
        return [Error(one) for one in weight]
    sizes: Sizes = left.sizes if left is not None else _sizes(found.w, stats, weighting) if found.w.dim() == 2 else (None, None)
    output = found.relative_errors(stats.judged, size=sizes[0]).tolist()
    felt = [None] * len(weight) if weighting is None else found.relative_errors(stats.judged, weighting, sizes[1]).tolist()
    return [Error(*three) for three in zip(weight, output, felt, strict=True)]


def rank_beyond(sites: Sequence[Site], rank: Rank) -> str | None:
    """Why a rank given as a number, or the least of one, is above min(in, out) of EVERY site; None where one has it."""
    largest = max(sites, key=lambda site: min(site.in_features, site.out_features))
    limit = min(largest.in_features, largest.out_features)
    asked = {"rank": int(rank.value or 0) if rank.kind == "fixed" else 0, "min": rank.min}
    above = next((f"{name} {value}" for name, value in asked.items() if value > max(limit, 1)), None)
    return None if above is None else f"{above} is above min(in, out) of every matched site; the largest is {limit} ({largest.path})"


def scaled_pair(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(`down`, `scale` `up`), in their own type: the two-factor form of what is one already."""
    return parts["down"], float(parts.get("scale", 1.0)) * parts["up"]


def refuse_matrix(site: Site, method: str) -> Reject | None:
    """Why what treats one matrix of a matmul cannot stand at the site, whatever its settings."""
    kind = site.const.tensor.dtype
    guards = (
        (site.blocked is not None, site.blocked or ""),
        (site.batch is not None, f"{method} takes one matrix, this is a stack of {site.batch} experts"),
        (site.form == "embedding", f"{method} serves matmuls, this is an embedding table"),
        (bool(site.gathers), f"the weight is also read as an embedding table; {method} serves only the matmul: use untie: true"),
        (kind not in FLOATS, f"{method} needs a floating-point weight, this one is {kind}"),
    )
    return next((Reject(reason) for fails, reason in guards if fails), None)


def own_stream(seed: int, *names: str) -> torch.Generator:
    """A stream of random numbers that belongs to these names (a site, a tensor of it), whatever else is rewritten."""
    return torch.Generator().manual_seed(zlib.crc32(" ".join((str(seed), *names)).encode()))  # torch uses 32 bits of a seed


def refuse_computed(site: Site, method: str) -> str:
    """Why a method that trains or changes the stored weight itself cannot have this site; "" where the weight is stored."""
    if not site.parts:
        return ""
    return f"its weight is computed from {', '.join(part.path for part in site.parts)}, and {method} works on a stored weight"


def dense_matrix(site: Site, b: FragmentBuilder) -> Value:
    """W [out, in] as a value over the stored weight, whatever its layout."""
    total = site.const.numel // site.in_features
    start, stop = site.rows or (0, total)
    sides = [total, site.in_features] if site.layout == "oi" else [site.in_features, total]
    w: Value = site.operands[0]
    if list(w.tensor.shape) != sides:
        w = b("aten.reshape.default", w, sides)
    if (start, stop) != (0, total):
        w = b("aten.slice.Tensor", w, 0 if site.layout == "oi" else 1, start, stop)
    return w if site.layout == "oi" else b("aten.t.default", w)


def times(b: FragmentBuilder, value: Value, scale: float) -> Value:
    """The nodes of value * scale: none for 1."""
    return value if scale == 1 else b("aten.mul.Scalar", value, scale)


def leading(b: FragmentBuilder, rows: Value) -> tuple[Any, ...]:
    """The sizes of rows before its features: -1 for the first that is not fixed, nodes for others. For `aten.reshape`."""
    sizes = rows.tensor.shape[:-1]
    first = next((axis for axis, size in enumerate(sizes) if not isinstance(size, int)), None)

    def size_of(axis: int, size: Any) -> Any:
        return size if isinstance(size, int) else -1 if axis == first else b("aten.sym_size.int", rows, axis)

    return tuple(size_of(axis, size) for axis, size in enumerate(sizes))
