"""What methods of tensor trains share: modes by hand, ranks that shapes decide, the planned contraction, and its nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import floor
from typing import Any

import torch
from torch import Tensor

from matmorph.errors import VerifyError
from matmorph.ir.core import Const, Value
from matmorph.ir.site import Choice, Cost, Site
from matmorph.passes.linalg.contraction import TrainShape, contract
from matmorph.passes.linalg.contraction_cost import Planned, plan_contraction, planning_target
from matmorph.passes.linalg.tensor_train import clamp_ranks, full_ranks, tt_parameters
from matmorph.passes.methods.protocol import FragmentBuilder
from matmorph.passes.methods.train_settings import ContractionSpec
from matmorph.passes.methods.weights import leading
from matmorph.specs.ranks import Ranks
from matmorph.specs.schema import Export

# ranks


def chosen_ranks(rank: Ranks, modes: Sequence[int], elements: int) -> Choice:
    """The inner ranks for cores of these modes (out_k * in_k of a TT-matrix) in place of a matrix of `elements` numbers; upper limits
    where the weight decides. What the modes do not allow is clamped, and said where a number or a list asked for it."""
    if rank.kind in ("energy", "error"):
        limits = full_ranks(modes) if rank.max is None else clamp_ranks(modes, rank.max)
        return Choice(max(limits), at_most=True, ranks=limits)
    wanted: int | tuple[int, ...] = rank.each or (int(rank.value or 1) if rank.kind == "fixed" else _rank_of_ratio(rank, modes, elements))
    ranks = clamp_ranks(modes, wanted)
    asked = (wanted,) * len(ranks) if isinstance(wanted, int) else wanted
    clamped = rank.kind == "fixed" and ranks != asked
    text = f"rank {rank} is above what the modes allow: clamped to {list(ranks)}" if clamped else None
    return Choice(max(ranks), ranks=ranks, clamped=text)


def _rank_of_ratio(rank: Ranks, modes: Sequence[int], elements: int) -> int:
    """The largest rank for all cores with at most that share of the matrix's parameters, down to the multiple, within min and max."""
    allowed, low, high = floor(float(rank.value or 0) * elements), 1, max(full_ranks(modes))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tt_parameters(modes, middle) <= allowed else (low, middle - 1)
    rounded = max(max(low // rank.multiple_of, 1) * rank.multiple_of, rank.min)
    return rounded if rank.max is None else min(rounded, rank.max)


RANKS = 12


def automatic_ranks(rank: Ranks, modes: Sequence[int], elements: int) -> list[Choice]:
    """What `auto` may pick: the ranks with at most 1/12, 2/12 ... of the matrix's parameters, ascending, each once."""
    shares = (replace(rank, kind="ratio", value=step / RANKS) for step in range(1, RANKS + 1))
    found = {clamp_ranks(modes, _rank_of_ratio(share, modes, elements)) for share in shares}
    return [Choice(max(ranks), ranks=ranks) for ranks in sorted(found)]


# the contraction


def planned(train: TrainShape, spec: ContractionSpec) -> Planned:
    """The contraction for the rows and devices that the spec names."""
    default = Export()
    target = planning_target(spec.target or default.target)
    return plan_contraction(train, spec.tokens or default.tokens, target, spec.plan == "contract")


def train_cost(site: Site, train: TrainShape, spec: ContractionSpec) -> Cost:
    """Of the cores, and of the contraction that runs."""
    found = planned(train, spec)
    parameters = tt_parameters([o * i for o, i in zip(train.outputs, train.inputs, strict=True)], train.ranks[1:-1])
    dense = is_dense(found, spec)
    last = found.predicted[-1]
    macs = site.in_features * site.out_features if dense else last.flops // (2 * last.tokens)
    times = tuple((each.tokens, 1.0 if dense else ratio) for each, ratio in zip(found.predicted, found.ratios, strict=True))
    size = site.const.tensor.torch_dtype.itemsize
    return Cost(parameters, parameters * size, macs * len(site.applications), times=times)


def is_dense(found: Planned, spec: ContractionSpec) -> bool:
    """Whether the matrix is rebuilt when the session loads."""
    return spec.plan == "rebuild" or found.plan.is_dense


def plan_note(found: Planned, spec: ContractionSpec) -> str:
    if spec.plan == "rebuild":
        return "contraction: dense, rebuilt when the file is loaded, as the spec asks"
    return f"contraction: {found.explanation}"


def matmul_train(
    b: FragmentBuilder, train: TrainShape, spec: ContractionSpec, rows: Value, consts: Sequence[Const], out: int, scale: float = 1.0
) -> Value:
    """scale times y [.., out] of rows [.., in], inside a body. Modes that multiply to more than the rows hold stand for zeros around the
    matrix. The scale goes into the smallest core: it costs nothing after the session has loaded."""
    found = planned(train, spec)
    in_features = int(rows.tensor.shape[-1])
    ops = _Nodes(b, consts)
    smallest = min(range(len(consts)), key=lambda k: consts[k].numel)
    cores = [ops.scaled(core, scale) if k == smallest and scale != 1 else core for k, core in enumerate(consts)]
    if is_dense(found, spec):
        return ops.matmul(rows, _rebuilt(found, train, cores, ops, in_features, out))
    padded = train.in_features - in_features
    x = b("aten.constant_pad_nd.default", rows, (0, padded), 0.0) if padded else rows
    y = contract(found.plan, x, cores, ops, leading(b, rows))
    return y if train.out_features == out else b("aten.slice.Tensor", y, -1, 0, out)


def _rebuilt(found: Planned, train: TrainShape, cores: Sequence[Value], ops: _Nodes, in_features: int, out: int) -> Value:
    """W^T [in, out], of cores alone: the dense plan without its product."""
    dense = found.candidates[-1].plan
    *steps, product = dense.steps
    if product.op != "matmul" or product.operands[0] != 0:
        raise VerifyError("the dense plan ends in a product with x")
    whole = contract(replace(dense, steps=tuple(steps)), cores[0], cores, ops, (train.in_features,))
    for axis, (kept, size) in enumerate(((in_features, train.in_features), (out, train.out_features))):
        if kept < size:
            whole = ops.slice(whole, axis, kept)
    return whole


class _Nodes:
    """`contraction.Ops` on values of the graph. Steps that read cores only become nodes over constants, which ONNX Runtime computes when it
    loads the file; it does that with kernels of the CPU, which has none for products in half precision, so those are in float32."""

    def __init__(self, b: FragmentBuilder, cores: Sequence[Value]) -> None:
        self.b = b
        self._fixed = set(cores)

    def reshape(self, value: Value, sizes: Sequence[Any]) -> Value:
        return self._noted(self.b("aten.reshape.default", value, tuple(sizes)), value)

    def permute(self, value: Value, axes: Sequence[int]) -> Value:
        return self._noted(self.b("aten.permute.default", value, tuple(axes)), value)

    def slice(self, value: Value, axis: int, size: int) -> Value:
        return self._noted(self.b("aten.slice.Tensor", value, axis, 0, size), value)

    def scaled(self, core: Value, factor: float) -> Value:
        return self._noted(self.b("aten.mul.Scalar", self._cast(core, _of_constants(core.tensor.torch_dtype)), factor), core)

    def matmul(self, left: Value, right: Value) -> Value:
        seen = [value for value in (left, right) if value not in self._fixed]
        wanted = seen[0].tensor.torch_dtype if seen else _of_constants(left.tensor.torch_dtype)
        product = self.b("aten.matmul.default", *(self._cast(value, wanted) for value in (left, right)))
        return self._noted(product, left, right)

    def _cast(self, value: Value, dtype: torch.dtype) -> Value:
        return value if value.tensor.torch_dtype == dtype else self._noted(self.b("aten._to_copy.default", value, dtype=dtype), value)

    def _noted(self, result: Value, *sources: Value) -> Value:
        if all(source in self._fixed for source in sources):
            self._fixed.add(result)
        return result


def _of_constants(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def core_consts(b: FragmentBuilder, cores: Sequence[Tensor]) -> list[Const]:
    """Trainable weights `core_0`, `core_1` ..., in canonical layout."""
    return [b.const(f"core_{k}", core) for k, core in enumerate(cores)]


def times_text(modes: Sequence[int]) -> str:
    """8 x 8 x 6."""
    return " x ".join(map(str, modes))
