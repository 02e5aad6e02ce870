"""Tensor trains: TT-SVD, rounding and reconstruction (Oseledets, SIAM J. Sci. Comput. 33, 2011: algorithms 1 and 2).

A TT-vector of modes n_1..n_d has cores G_k [r_{k-1}, n_k, r_k] with r_0 = r_d = 1 and T(i_1..i_d) = G_1[:, i_1, :] ... G_d[:, i_d, :].
A TT-matrix of W [out, in] has cores G_k [r_{k-1}, out_k, in_k, r_k]; W's rows run row-major over the output modes, its columns over the
input modes. The TT-LoRA papers' form of a weight is a TT-vector with a convention of its own (`weight_to_vector_tensor`).

TT-SVD cuts one unfolding after the other: each step projects what is left on the leading singular vectors, so the squared errors of the
steps add up exactly. With tails t_k, the errors of the steps,

    max_k t_k  <=  smallest possible error at these ranks  <=  |T - T'|_F  =  sqrt(sum t_k^2)  <=  sqrt(d - 1) * smallest possible

The first: any train of ranks r_k has a k-th unfolding of rank r_k, and what a step cuts is an unfolding of T multiplied by a matrix with
orthonormal rows, whose singular values are no larger (Eckart-Young for each).

Cores are orthonormal but the last of the sweep, which carries the norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, prod, sqrt
from typing import Literal

import torch
from torch import Tensor

from matmorph.passes.linalg.choices import Solver
from matmorph.passes.linalg.modes import Modes, boundary
from matmorph.passes.linalg.svd import largest
from matmorph.passes.linalg.sweeps import SWEEPS, ErrorBudget, Sweep, cheaper_sweep, left_orthogonal, truncated
from matmorph.passes.linalg.unfolding import ROUNDING, UnfoldingStep, left_step

Ranks = int | Sequence[int]
"""One rank for all edges, or the d - 1 inner ranks."""

_FINEST_FLOAT32 = 1e-4
"""Error targets below this are worked on in float64: a sweep in float32 rounds at some 1e-6."""


@dataclass(frozen=True, eq=False)
class TensorTrain:
    """Cores [r_{k-1}, n_k, r_k], or [r_{k-1}, out_k, in_k, r_k] for a TT-matrix. Raises ValueError where they do not fit together."""

    cores: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        axes = {core.dim() for core in self.cores}
        if axes not in ({3}, {4}):
            raise ValueError(f"cores have 3 axes each, or 4 each in a TT-matrix, not {sorted(axes)}")
        ranks = [1, *(core.shape[-1] for core in self.cores)]
        if [core.shape[0] for core in self.cores] != ranks[:-1] or ranks[-1] != 1:
            raise ValueError(f"cores {[list(core.shape) for core in self.cores]} do not fit together")

    @property
    def ranks(self) -> tuple[int, ...]:
        """The d - 1 inner ranks."""
        return tuple(core.shape[-1] for core in self.cores[:-1])

    @property
    def modes(self) -> tuple[int, ...]:
        """n_k of each core; out_k * in_k in a TT-matrix."""
        return tuple(prod(core.shape[1:-1]) for core in self.cores)

    @property
    def matrix_modes(self) -> Modes | None:
        """Output and input modes of a TT-matrix, None for a TT-vector."""
        if self.cores[0].dim() == 3:
            return None
        return Modes(tuple(core.shape[1] for core in self.cores), tuple(core.shape[2] for core in self.cores))

    @property
    def parameters(self) -> int:
        return sum(core.numel() for core in self.cores)


@dataclass(frozen=True, slots=True)
class Info:
    """What a decomposition did.

    `ranks`: the inner ranks it has; `limits`: those that were asked for, clamped to what the modes allow (in rounding, to what the train
    had); `clamped`: whether that lowered any. Edge by edge: `tails`, the error |.|_F of each step, `optima`, a proven lower bound on it at
    its rank, `solvers`. `norm` = |T|_F. `sweep`: "forward" began at the first core. `rounding`: errors up to this share of the norm are
    rounding."""

    ranks: tuple[int, ...]
    limits: tuple[int, ...]
    clamped: bool
    tails: tuple[float, ...]
    optima: tuple[float, ...]
    norm: float
    solvers: tuple[Solver, ...]
    sweep: Sweep
    rounding: float

    @property
    def error(self) -> float:
        """|T - T'|_F / |T|_F up to rounding: the root of the summed squares of the tails. 0 for a zero tensor."""
        return sqrt(sum(tail**2 for tail in self.tails)) / self.norm if self.norm > 0 else 0.0

    @property
    def bound(self) -> float:
        """Proven lower bound on |T - T'|_F / |T|_F of every train of these ranks: the largest Eckart-Young tail met."""
        return max(self.optima, default=0.0) / self.norm if self.norm > 0 else 0.0

    @property
    def guard(self) -> float:
        """Proven upper bound on the error over the smallest possible at these ranks; 1 where the error is rounding."""
        return 1.0 if self.error <= self.rounding else self.error / self.bound if self.bound > 0 else float("inf")


def clamp_ranks(modes: Sequence[int], ranks: Ranks) -> tuple[int, ...]:
    """The inner ranks that cores of these modes can have: r_k <= r_{k-1} n_k and r_k <= n_{k+1} r_{k+1}.

    `modes`: n_k, for a TT-matrix out_k * in_k (`Modes.sizes`). Raises ValueError for a list of another length than d - 1 and for a rank
    below 1."""
    inner = [ranks] * (len(modes) - 1) if isinstance(ranks, int) else list(ranks)
    if len(inner) != len(modes) - 1:
        raise ValueError(f"{len(modes)} modes have {len(modes) - 1} inner ranks, not {len(inner)}: {inner}")
    if any(rank < 1 for rank in inner):
        raise ValueError(f"ranks are at least 1, not {inner}")
    left = 1
    for k, rank in enumerate(inner):
        left = inner[k] = min(rank, left * modes[k])
    right = 1
    for k in reversed(range(len(inner))):
        right = inner[k] = min(inner[k], right * modes[k + 1])
    return tuple(inner)


def full_ranks(modes: Sequence[int]) -> tuple[int, ...]:
    """The smallest inner ranks that represent every tensor: min(product of the modes before, product of those after)."""
    return clamp_ranks(modes, prod(modes))


def tt_parameters(modes: Sequence[int], ranks: Ranks) -> int:
    """Entries of all cores, sum of r_{k-1} n_k r_k, at the ranks the modes allow."""
    edges = (1, *clamp_ranks(modes, ranks), 1)
    return sum(edges[k] * mode * edges[k + 1] for k, mode in enumerate(modes))


def tt_svd(
    tensor: Tensor,
    ranks: Ranks | None = None,
    *,
    error: float | None = None,
    energy: float | None = None,
    multiple_of: int = 1,
    solver: Solver = "auto",
    sweep: Literal["auto", "forward", "backward"] = "auto",
    seed: int = 0,
) -> tuple[TensorTrain, Info]:
    """`tensor` [n_1, .., n_d] as a TT-vector.

    `ranks` alone: that of each edge, clamped to what the modes allow. `error`: the smallest ranks whose |T - T'|_F / |T|_F is at most that,
    guaranteed up to rounding; `energy`: the same with error = sqrt(1 - energy); `ranks` beside them are upper limits, which come first.
    `multiple_of` rounds ranks that data decides up. `sweep`: from which end; "auto" = forward unless the other costs less than half.

    Cores are float64 for float64 tensors and error targets below 1e-4, float32 otherwise. Memory: one or two copies of the tensor; two to
    four in float64 where the guard has to fall back to the exact solver.
    Deterministic for one seed and thread count. Raises ValueError for NaN or infinity, a wrong rank or target, or an unknown solver.
    """
    if tensor.dim() < 1 or tensor.numel() == 0:
        raise ValueError(f"a tensor with entries is needed, not one of shape {list(tensor.shape)}")
    tensor = tensor.detach()
    peak = largest(tensor)
    if not isfinite(peak):
        raise ValueError("NaN or infinity in the tensor")
    target = _target(ranks, error, energy)
    modes = tuple(tensor.shape)
    limits = full_ranks(modes) if ranks is None else clamp_ranks(modes, ranks)
    double = tensor.dtype == torch.float64 or 0 <= target < _FINEST_FLOAT32
    work = tensor.to(torch.float64 if double else torch.float32).contiguous()
    scale = peak if peak > 0 and not 1e-6 < peak < 1e6 else 1.0  # squares must not leave the range of the type
    work = work if scale == 1.0 else work / scale
    budget = ErrorBudget.of(work, target, limits, multiple_of)
    end = cheaper_sweep(modes, limits) if sweep == "auto" else sweep
    cores, steps = SWEEPS[end](work, budget, lambda c, rank: left_step(c, rank, solver=solver, seed=seed))
    heavy = -1 if end == "forward" else 0
    cores[heavy] = cores[heavy] * scale
    train = TensorTrain(tuple(core.contiguous() for core in cores))
    if train.ranks != clamp_ranks(modes, train.ranks):  # a later edge became so narrow that an earlier one is too wide
        train = round_tt(train, train.ranks)[0]
    return train, _info(train, steps, limits, ranks, budget.norm, end, scale)


def round_tt(
    train: TensorTrain,
    ranks: Ranks | None = None,
    *,
    error: float | None = None,
    energy: float | None = None,
    multiple_of: int = 1,
    solver: Solver = "auto",
    seed: int = 0,
) -> tuple[TensorTrain, Info]:
    """A train of smaller ranks near `train`, without its tensor: a QR sweep, then a sweep of truncated SVDs; arguments as in `tt_svd`.

    Without any target the ranks become the smallest that hold the same tensor, up to rounding of float64. Works in float64; the cores keep
    the type of the given ones, a TT-matrix stays one. `Info.norm` is that of `train`. Raises ValueError as `tt_svd` does."""
    target = _target(ranks, error, energy, needed=False)
    plain = [core.detach().double() for core in merge_modes(train).cores]
    if not all(isfinite(largest(core)) for core in plain):
        raise ValueError("NaN or infinity in the cores")
    if ranks is None and target < 0:
        target = ROUNDING * torch.finfo(torch.float64).eps
    limits = clamp_ranks(train.modes, train.ranks if ranks is None else ranks)
    limits = tuple(map(min, limits, clamp_ranks(train.modes, train.ranks)))
    cores = left_orthogonal(plain)
    budget = ErrorBudget.of(cores[-1], target, limits, multiple_of)
    done, steps = truncated(cores, budget, lambda c, rank: left_step(c, rank, solver=solver, seed=seed))
    rounded = TensorTrain(tuple(core.to(train.cores[0].dtype).contiguous() for core in done))
    modes = train.matrix_modes
    return split_modes(rounded, modes) if modes else rounded, _info(rounded, steps, limits, ranks, budget.norm, "backward")


def reconstruct(train: TensorTrain) -> Tensor:
    """The tensor [n_1, .., n_d] of a TT-vector, the matrix W [out, in] of a TT-matrix, in the type of the cores."""
    whole = train.cores[0].new_ones(1, 1)
    for core in merge_modes(train).cores:
        whole = (whole @ core.reshape(core.shape[0], -1)).reshape(-1, core.shape[-1])
    modes = train.matrix_modes
    tensor = whole.reshape(train.modes)
    return tensor_to_matrix(tensor, modes) if modes else tensor


def matrix_to_tensor(w: Tensor, modes: Modes) -> Tensor:
    """W [out, in] as the tensor [out_1 * in_1, .., out_d * in_d] that a TT-matrix of `modes` decomposes. ValueError for another shape."""
    _check_shape(w, (modes.out_features, modes.in_features))
    d = len(modes)
    axes = [axis for k in range(d) for axis in (k, d + k)]
    return w.reshape(*modes.out, *modes.in_).permute(axes).reshape(modes.sizes)


def tensor_to_matrix(tensor: Tensor, modes: Modes) -> Tensor:
    """The inverse of `matrix_to_tensor`: [out, in]."""
    d = len(modes)
    pairs = [size for pair in zip(modes.out, modes.in_, strict=True) for size in pair]
    axes = [*range(0, 2 * d, 2), *range(1, 2 * d, 2)]
    return tensor.reshape(pairs).permute(axes).reshape(modes.out_features, modes.in_features)


def split_modes(train: TensorTrain, modes: Modes) -> TensorTrain:
    """A TT-vector over the sizes out_k * in_k as the TT-matrix of `modes`; no arithmetic."""
    cores = zip(train.cores, modes.out, modes.in_, strict=True)
    return TensorTrain(tuple(core.reshape(core.shape[0], out, in_, core.shape[-1]) for core, out, in_ in cores))


def merge_modes(train: TensorTrain) -> TensorTrain:
    """A TT-matrix as the TT-vector over out_k * in_k; a TT-vector as it is."""
    return TensorTrain(tuple(core.reshape(core.shape[0], -1, core.shape[-1]) for core in train.cores))


def weight_to_vector_tensor(w: Tensor, shape: Sequence[int], in_features: int) -> Tensor:
    """W [out, in] as the tensor T of the TT-LoRA papers' `shape`: input modes first, the rest output modes.

    Their contraction reads the features of x as the input modes in reverse, and appends output modes in the order of the cores:
    W = T.permute(output axes, reversed(input axes)).reshape(out, in). Raises ValueError where `shape` does not fit W."""
    p = boundary(shape, in_features)
    _check_shape(w, (prod(shape[p:]), in_features))
    outputs = len(shape) - p
    axes = [*reversed(range(outputs, len(shape))), *range(outputs)]
    return w.reshape(*shape[p:], *reversed(shape[:p])).permute(axes)


def vector_tensor_to_weight(tensor: Tensor, in_features: int) -> Tensor:
    """The inverse of `weight_to_vector_tensor`: W [out, in] from T [shape]."""
    p = boundary(tensor.shape, in_features)
    axes = [*range(p, tensor.dim()), *reversed(range(p))]
    return tensor.permute(axes).reshape(-1, in_features)


def two_factors(train: TensorTrain, in_features: int) -> tuple[Tensor, Tensor]:
    """(down [in, r], up [r, out]) of a TT-vector in the papers' convention, exactly: x @ down @ up = x @ W^T, r = the rank at the border
    between input and output modes. Raises ValueError for a TT-matrix, or where no border lies there."""
    if train.matrix_modes:
        raise ValueError("a TT-matrix has no border between input and output modes")
    p = boundary(train.modes, in_features)
    if p == len(train.cores):
        raise ValueError(f"shape {list(train.modes)} has no output modes after in_features = {in_features}")
    left, right = train.cores[0], train.cores[-1]
    for core in train.cores[1:p]:
        left = torch.tensordot(left, core, 1)
    for core in reversed(train.cores[p:-1]):
        right = torch.tensordot(core, right, 1)
    axes = [0, *reversed(range(1, p + 1)), p + 1]
    rank = train.ranks[p - 1]
    return left.permute(axes).reshape(in_features, rank), right.reshape(rank, -1)


def _info(
    train: TensorTrain,
    steps: Sequence[UnfoldingStep],
    limits: tuple[int, ...],
    asked: Ranks | None,
    norm: float,
    sweep: Sweep,
    scale: float = 1.0,
) -> Info:
    """`norm` and the steps are those of the tensor divided by `scale`."""
    wanted = limits if asked is None else (asked,) * len(limits) if isinstance(asked, int) else tuple(asked)
    floor = max((ROUNDING * torch.finfo(step.u.dtype).eps for step in steps), default=0.0)
    optima = tuple(scale * max(0.0, step.optimum - floor * norm) for step in steps)
    tails, solvers = tuple(scale * step.error for step in steps), tuple(step.solver for step in steps)
    return Info(train.ranks, limits, limits != wanted, tails, optima, scale * norm, solvers, sweep, sqrt(len(steps)) * floor)


def _target(ranks: Ranks | None, error: float | None, energy: float | None, *, needed: bool = True) -> float:
    """Relative error aimed at; -1 where ranks alone decide."""
    if error is not None and energy is not None:
        raise ValueError("an error or an energy, not both")
    if needed and ranks is None and error is None and energy is None:
        raise ValueError("ranks, an error or an energy are needed")
    if error is not None and not 0 <= error < 1:
        raise ValueError(f"an error is at least 0 and below 1, not {error}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"an energy is above 0 and at most 1, not {energy}")
    return error if error is not None else sqrt(1 - energy) if energy is not None else -1.0


def _check_shape(w: Tensor, shape: tuple[int, int]) -> None:
    if tuple(w.shape) != shape:
        raise ValueError(f"the modes make a matrix of {list(shape)}, not {list(w.shape)}")
