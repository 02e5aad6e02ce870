"""Second-order rounding: each code makes up for the errors of those before it, on the outputs (GPTQ, arXiv 2210.17323).

With H the second moment of the inputs, an error E of the weight costs tr(E H E^T) on the outputs. Rounding feature j of a row with an error
e, the best change of the features not yet rounded is -e [H^-1]_j. / [H^-1]_jj, and what is left of them has the inverse
H^-1 - [H^-1]_.j [H^-1]_j. / [H^-1]_jj (Optimal Brain Surgeon; equations 2 and 3 of the paper). All rows share the order of the features, so
all of that is the upper Cholesky factor U of H^-1 = U^T U: row j of U over U_jj is the change, and e^2 / U_jj^2 what it costs.

The features go by falling diagonal of H: what is large is rounded while most others can still make up for it. Scales and zero points are
those of the weight as it was, per block in the ORIGINAL order of the features: kernels need no index. H is damped (`DAMPING` of the mean of
its diagonal), more where the sample is too small for its features (`shrinkage`) or float64 cannot factor it; a note says so.

The updates of what comes later are applied for `_LAZY` features at a time (the paper's lazy batches). Memory: H, U and two copies of the
weight, one of them its codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from matmorph.passes.linalg.affine import affine_codes
from matmorph.passes.linalg.choices import CODEBOOK_BITS
from matmorph.passes.linalg.codebook import nearest
from matmorph.passes.linalg.quantize import Quantized
from matmorph.passes.linalg.shrinkage import shrinkage_damping
from matmorph.passes.linalg.svd import one_thread
from matmorph.passes.linalg.whiten import whitening_factor

DAMPING = 0.01
"""Share of the mean of the diagonal that is added to it, as in the paper."""

_LAZY = 128

Rounding = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""(feature j, its weights [out]) -> (codes uint8 [out], the numbers they stand for [out])."""


@dataclass(frozen=True, slots=True, eq=False)
class Curvature:
    """What the inputs say of errors of a weight. `order` [n]: the features as they are rounded. `factor` U [n, n], float64, upper
    triangular, of the features in that order, U^T U the inverse of the damped moment. `power` [n], float64: the diagonal of that moment, of
    the features as they stand. `notes`: what had to be changed."""

    order: Tensor
    factor: Tensor
    power: Tensor
    notes: tuple[str, ...] = ()


def curvature(second_moment: Tensor, rows: int) -> Curvature:
    """Of `second_moment` [n, n], a sum over `rows` rows. Raises ValueError where it holds NaN or infinity, or is no second moment."""
    moment = second_moment.double()
    n = len(moment)
    if bool(torch.isfinite(moment).all()) and not bool(moment.diagonal().sum() > 0):
        identity = torch.eye(n, dtype=torch.float64)
        return Curvature(torch.arange(n), identity, identity.diagonal(), ("no calibration data reached this input: rounded to nearest",))
    damping, notes = _damping(moment, rows)
    power = moment.diagonal()
    order = power.argsort(descending=True, stable=True)
    backwards = order.flip(0)
    found = whitening_factor(moment[backwards][:, backwards], rows, damping)
    # with the features reversed H = L L^T is H = R R^T for the upper triangular R = J L J, and U = R^-1
    with one_thread():
        upper = torch.linalg.solve_triangular(found.factor.flip(0, 1), torch.eye(n, dtype=torch.float64), upper=True)
    return Curvature(order, upper, power / max(rows, 1) + found.shift, (*notes, *found.notes))


def _damping(moment: Tensor, rows: int) -> tuple[float, tuple[str, ...]]:
    """What is added to the diagonal, and a note where that is more than usual: fewer rows than features leave directions empty that the
    data would fill."""
    if rows >= len(moment):
        return DAMPING, ()
    wanted = shrinkage_damping(moment, rows)
    if wanted <= DAMPING:
        return DAMPING, ()
    return wanted, (f"damping raised from {DAMPING:g} to {wanted:.3g}: {rows:,} rows do not determine {len(moment):,} features",)


def compensated(w: Tensor, grid: Quantized, curved: Curvature) -> Quantized:
    """Other codes for `w` [out, in] on the scales and zero points of `grid`, which is `w` rounded to nearest."""
    rounding, factor, order = rounding_of(grid), curved.factor.float(), curved.order.tolist()
    rest = w.detach().float().T[curved.order].contiguous()  # [in, out]: a feature is a run of memory
    codes = torch.empty(rest.shape, dtype=torch.uint8)
    errors = rest.new_empty(_LAZY, rest.shape[1])
    for start in range(0, len(order), _LAZY):
        stop = min(start + _LAZY, len(order))
        for at in range(start, stop):
            row = factor[at, at:stop]
            found, level = rounding(order[at], rest[at])
            codes[order[at]] = found
            error = torch.sub(rest[at], level, out=errors[at - start]).div_(row[0])
            rest[at + 1 : stop].addr_(row[1:], error, alpha=-1)
        rest[stop:].addmm_(factor[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    return replace(grid, codes=codes.T.contiguous())


def rounding_of(grid: Quantized) -> Rounding:
    """To the nearest level of a quantised matrix, as `quantize` rounds; ValueError for a quantizer that has no blocks."""
    quantizer, block = grid.quantizer, grid.quantizer.block_size
    if quantizer.name in CODEBOOK_BITS:
        return _table_rounding(grid, grid.scales.float())
    if quantizer.name != "uniform":
        raise ValueError(f"{quantizer.name} has one scale for the whole tensor: second-order rounding is for scales per block")
    top = 2**quantizer.width - 1
    scales = grid.scales.float().T.contiguous()
    divisor = torch.where(scales == 0, 1.0, scales)
    zeros = torch.full_like(scales, 2 ** (quantizer.width - 1)) if grid.zero_points is None else grid.zero_points.float().T.contiguous()
    if quantizer.zero_point == "float":

        def affine(j: int, x: Tensor) -> tuple[Tensor, Tensor]:
            here = j // block
            code = affine_codes(x[:, None], scales[here], zeros[here], top)[:, 0]
            return code.to(torch.uint8), (code - zeros[here]).mul_(scales[here])

        return affine
    low, high = -zeros, top - zeros

    def uniform(j: int, x: Tensor) -> tuple[Tensor, Tensor]:
        here = j // block
        index = torch.div(x, divisor[here]).round_().clamp_(low[here], high[here])
        return (index + zeros[here]).to(torch.uint8), index.mul_(scales[here])

    return uniform


def _table_rounding(grid: Quantized, scales: Tensor) -> Rounding:
    """Blocks are of the flattened weight, so that one may span rows."""
    finder, block = nearest(grid.quantizer.width), grid.quantizer.block_size
    out, n = grid.shape
    starts = torch.arange(out) * n

    def table(j: int, x: Tensor) -> tuple[Tensor, Tensor]:
        here = scales[(starts + j).div_(block, rounding_mode="floor")]
        codes = finder.codes(x / torch.where(here == 0, torch.inf, here))
        return codes, finder.table.index_select(0, codes.int()).mul_(here)

    return table
