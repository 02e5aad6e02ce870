"""What quantize, loftq and qlora share: the settings of a quantised base, what it takes, its weights and its nodes.

The base is y = x @ Q^T + bias as one node of ours whose weights are packed as ONNX Runtime's kernels read them (`linalg.packing`):
`matmorph.matmul_nbits` for uniform levels, `matmorph.matmul_codebook` for tables. "uniform_clipped" has one scale and one offset for the
whole matrix: scale * code + offset = scale * (code - 2^(bits-1)) + c, so it is the symmetric uniform layout with that scale in every block,
plus c * (sum of the features of x).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from matmorph.errors import RewriteError
from matmorph.ir.core import Const, Value
from matmorph.ir.site import Choice, Cost, Reject, Site, Statistic
from matmorph.ir.types import element_size
from matmorph.passes.linalg.choices import CHANNEL, CODEBOOK_BITS
from matmorph.passes.linalg.packing import Packed, expanded, pack_byte_table, pack_channels, pack_matmul_bnb4, pack_matmul_nbits
from matmorph.passes.linalg.pairs import held_to_pairs, widened_for_pairs
from matmorph.passes.linalg.quantize import Quantized, Quantizer, quantize, stored_width
from matmorph.passes.linalg.second_order import Curvature, compensated, curvature
from matmorph.passes.linalg.whiten import relative_output_error, relative_weight_error
from matmorph.passes.methods.protocol import FragmentBuilder, SiteStats
from matmorph.passes.methods.quantized_settings import QuantizedSpec, reads_inputs, searched, zero_points
from matmorph.passes.methods.weights import FLOATS, Difference, difference, readable
from matmorph.specs.schema import Rank

Array = tuple[str, str, tuple[int, ...]]
"""(name, dtype, shape) of one packed weight."""


AnySpec = TypeVar("AnySpec", bound=QuantizedSpec)


def with_bits(spec: AnySpec, choice: Choice) -> AnySpec:
    """The settings under one choice of the bits."""
    return replace(spec, bits=choice.bits) if spec.bits == "auto" else spec


def refuse_site(site: Site, spec: QuantizedSpec, method: str, *, tables: str) -> Reject | None:
    """Why no base of this kind can stand for the site, from shapes and types only. `tables`: the method that serves embedding tables."""
    kind = site.const.tensor.dtype
    guards = (
        (site.blocked is not None, site.blocked or ""),
        (site.batch is not None, f"{method} takes one matrix, this is a stack of {site.batch} experts"),
        (site.form == "embedding" and method != tables, f"{method} serves matmuls, this is an embedding table: {tables} serves it"),
        (
            bool(site.gathers) and method != tables,
            f"the weight is also read as an embedding table; {method} serves only the matmul: use untie: true",
        ),
        (
            bool(site.gathers) and spec.quantizer in CODEBOOK_BITS,
            f"rows of an embedding table can be looked up in uniform codes only (GatherBlockQuantized), not in {spec.quantizer}",
        ),
        (
            bool(site.gathers) and spec.zero_point == "float",
            "rows of an embedding table are looked up with integer zero points only (GatherBlockQuantized)",
        ),
        (
            bool(site.gathers) and spec.block_size == CHANNEL,
            "rows of an embedding table are looked up in blocks only (GatherBlockQuantized): give block_size a number",
        ),
        (
            kind == "float64" and bool(site.applications) and spec.quantizer not in ("nf3", "nf2"),
            f"no kernel multiplies {spec.quantizer} codes with float64 rows: convert the model with model.float()",
        ),
        (kind not in FLOATS, f"{method} needs a weight of {', '.join(FLOATS)}, this one is {kind}"),
    )
    return next((Reject(reason) for fails, reason in guards if fails), None)


def refuse_rank(site: Site, rank: Rank) -> Reject | None:
    """A rank that the matrix does not have."""
    full = min(site.in_features, site.out_features)
    return Reject(f"rank {rank.value} is above min(in, out) = {full}") if int(rank.value or 0) > full else None


def quantizer_for(site: Site, spec: QuantizedSpec) -> Quantizer:
    """Scales of uniform codes have the type of a float16 weight, else float32."""
    if spec.bits == "auto":
        raise RewriteError(f"{site.path}: bits auto is left to the budget, which has not decided it")
    half = site.const.tensor.torch_dtype == torch.float16 and spec.quantizer == "uniform"
    block = spec.block(site.in_features)
    return Quantizer(
        spec.quantizer,
        spec.bits,
        -(-block // _STEP) * _STEP,  # the rest of a row that is one block counts as zeros
        zero_points(spec),
        searched(spec),
        torch.float16 if half else torch.float32,
        spec.double_quant,
    )


_STEP = 8
"""Block sizes of a quantizer are multiples of it."""

# what it takes


def arrays(site: Site, spec: QuantizedSpec) -> tuple[Array, ...]:
    """The packed weights of the site, from shapes alone."""
    quantizer = quantizer_for(site, spec)
    n, k, block, width = site.out_features, site.in_features, spec.block(site.in_features), stored_width(quantizer.width)
    if spec.block_size == CHANNEL:
        return ("codes", "int8", (n, k)), ("scales", _scale_type(quantizer), (n,))
    if spec.quantizer in CODEBOOK_BITS:
        blocks = prod(quantizer.blocks((n, k)))
        shape = (-(-n * k // 2),) if spec.quantizer == "nf4" else (blocks, block * width // 8)
        return ("codes", "uint8", shape), ("scales", "float32", (blocks,))
    nb = -(-k // block)
    codes = (n, nb, block * width // 8) if site.applications else (n, nb * block * width // 8)
    scales: Array = ("scales", _scale_type(quantizer), (n, nb))
    if spec.zero_point == "float":
        return ("codes", "uint8", codes), scales, ("zero_points", "float32", (n, nb))
    zeros: tuple[Array, ...] = (("zero_points", "uint8", (n, -(-nb * width // 8))),) if spec.zero_point else ()
    return ("codes", "uint8", codes), scales, *zeros


def _scale_type(quantizer: Quantizer) -> str:
    return "float16" if quantizer.scale_dtype == torch.float16 else "float32"


def quantized_cost(site: Site, spec: QuantizedSpec, rank: int = 0, factor_type: str | None = None) -> Cost:
    """Of the base and of two factors of inner size `rank`, in the weight's type where `factor_type` says no other."""
    factors = rank * (site.in_features + site.out_features)
    counts: dict[str, int] = {}
    for _, dtype, shape in arrays(site, spec):
        counts[dtype] = counts.get(dtype, 0) + prod(shape)
    if factors:
        kind = factor_type or site.const.tensor.dtype
        counts[kind] = counts.get(kind, 0) + factors
    shift = site.in_features if spec.quantizer == "uniform_clipped" else 0
    return Cost(
        parameters=site.parameters + factors,
        bytes=sum(element_size(dtype) * count for dtype, count in counts.items()),
        macs=(site.parameters + factors + shift) * len(site.applications),
        coded=site.parameters,
        stored=tuple(counts.items()),
    )


def size_notes(site: Site, spec: QuantizedSpec) -> tuple[str, ...]:
    """Where a format would take less than what the kernels read: double quantisation, and codes of a width that they do not have."""
    quantizer = quantizer_for(site, spec)
    narrow = (_NARROW,) if spec.quantizer not in CODEBOOK_BITS and stored_width(quantizer.width) > quantizer.width else ()
    if not spec.double_quant:
        return narrow
    shape = (site.out_features, site.in_features)
    twice, plain = quantizer.nbytes(shape), replace(quantizer, double=False).nbytes(shape)
    return (*narrow, f"double quantisation: {twice:,} bytes as a storage format, {plain:,} here, where the kernel takes expanded scales")


_NARROW = "codes of 3 bits are stored 4 bits wide: no kernel takes narrower ones"


_SAFE_BITS = 8
"""Codes of an embedding table that cost a language model nothing that was measured."""


def table_notes(site: Site, spec: QuantizedSpec, w: Tensor, found: Quantized) -> tuple[str, ...]:
    """What narrow codes of an embedding table save and cost beside those of 8 bits: every token is read through them, and written too where
    the table is the head."""
    quantizer = quantizer_for(site, spec)
    if not site.gathers or quantizer.width >= _SAFE_BITS:
        return ()
    safe = replace(quantizer, bits=_SAFE_BITS)
    wide = quantized_or_refused(site, lambda: quantize(w, safe))
    mine, other = (relative_weight_error(w, one.dequantize()) for one in (found, wide))
    what = "an embedding table that is also the head" if site.applications else "an embedding table"
    return (
        f"{what} in {quantizer.width} bits: {found.nbytes:,} bytes at a weight error of {mine:.3g}; in {_SAFE_BITS} bits {wide.nbytes:,} "
        f"at {other:.2g}",
    )


# weights and nodes


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """A quantised matrix in the graph: `consts` its packed weights, `matmul(rows)` and `lookup(indices)` write its nodes inside a body,
    `dense()` is the matrix [out, in] it stands for, float32."""

    consts: tuple[Const, ...]
    matmul: Callable[[Value], Value]
    lookup: Callable[[Value], Value]
    dense: Callable[[], Tensor]


def base_of(site: Site, spec: QuantizedSpec, quantized: Quantized, b: FragmentBuilder) -> Base:
    """The base that `quantized` [out, in] is; its bias is added by the node where the builder gives it out."""
    uniform, shift = _per_block(quantized, quantizer_for(site, spec).block_size)
    packed = pack_channels(uniform) if spec.block_size == CHANNEL else _packed(uniform)
    shapes = {name: shape for name, _, shape in arrays(site, spec)}
    tensors = {"codes": packed.codes, "scales": packed.scales, "zero_points": packed.zero_points}
    consts = {
        name: b.const(name, tensor.reshape(shapes[name]), trainable=False, kind="buffer")
        for name, tensor in tensors.items()
        if tensor is not None
    }
    codes, scales, zeros = (consts.get(name) for name in tensors)
    n, k, block, bits = site.out_features, site.in_features, spec.block(site.in_features), stored_width(uniform.quantizer.width)

    def matmul(rows: Value) -> Value:
        if spec.quantizer in CODEBOOK_BITS:
            return b("matmorph.matmul_codebook.default", rows, codes, scales, b.bias(), spec.quantizer, k, n, block)
        y = b("matmorph.matmul_nbits.default", rows, codes, scales, zeros, b.bias(), k, n, bits, block)
        if shift == 0:
            return y
        total = b("aten.sum.dim_IntList", rows, (-1,), True)
        return b("aten.add.Tensor", y, b("aten.mul.Scalar", total, shift))

    def lookup(indices: Value) -> Value:
        rows = b("matmorph.gather_nbits.default", indices, codes, scales, zeros, k, bits, block)
        if shift != 0:
            rows = b("aten.add.Scalar", rows, shift)
        wanted = site.const.tensor
        return rows if rows.tensor.dtype == wanted.dtype else b("aten._to_copy.default", rows, dtype=wanted.torch_dtype)

    return Base(tuple(consts.values()), matmul, lookup, lambda: uniform.dequantize().add_(shift))


# codes


@dataclass(frozen=True, slots=True, eq=False)
class Rounding:
    """How a site's weight becomes codes: by itself, or by what the calibration data says of its inputs. `paired`: for integer products,
    which must not overflow. `notes`: what had to be changed."""

    quantizer: Quantizer
    curved: Curvature | None
    compensates: bool
    weighs: bool
    paired: bool = False

    def __call__(self, w: Tensor) -> Quantized:
        """Raises ValueError as `quantize`."""
        grid = quantize(w, self.quantizer, self.curved.power if self.curved is not None and self.weighs else None)
        if self.paired:
            grid = widened_for_pairs(w, grid)
        if self.curved is None or not self.compensates:
            return grid
        found = compensated(w, grid, self.curved)
        return held_to_pairs(found) if self.paired else found

    @property
    def notes(self) -> tuple[str, ...]:
        return () if self.curved is None else self.curved.notes


def quantized_needs(spec: QuantizedSpec) -> frozenset[Statistic]:
    """What the base reads of the calibration data."""
    return frozenset({Statistic.INPUT_SECOND_MOMENT}) if reads_inputs(spec) or spec.equalise else frozenset()


def trial_error(site: Site, spec: QuantizedSpec, stats: SiteStats) -> float:
    """The relative error of the outputs of codes rounded to nearest: what scales of input channels are judged by."""
    plain = replace(spec, rounding="nearest")
    w = readable(site, site.weight())
    rounding = rounding_for(site, plain, curvature_of(site, plain, w, stats))
    return relative_output_error(w, quantized_or_refused(site, lambda: rounding(w)).dequantize(), stats.judged)


def curvature_of(site: Site, spec: QuantizedSpec, w: Tensor, stats: SiteStats | None) -> Curvature | None:
    """What the inputs say, where the settings ask for it. A table that is only looked up has no inputs: its errors do not add up, and
    nearest is best. One that is also the head counts both uses. RewriteError where there are no statistics, or where they are no second
    moment."""
    if not reads_inputs(spec) or not site.applications:
        return None
    if stats is None:
        raise RewriteError(f"{site.path}: rounding: {spec.rounding} with scale: {spec.scale} needs calibration data")
    moment, rows = stats.second_moment, int(stats.rows)
    try:
        found: Curvature = stats.once("curvature", lambda: curvature(_of_both_uses(w, moment) if site.gathers else moment, rows))
        return found
    except ValueError as error:
        raise RewriteError(f"{site.path}: {error}") from error


def _of_both_uses(w: Tensor, moment: Tensor) -> Tensor:
    """With tr(E H E^T) / tr(W H W^T) for the head and |E|^2 / |W|^2 for the look-ups, each row as often as any other, their sum is that of
    the moment H + tr(W H W^T) / |W|^2 I, up to a factor."""
    exact = moment.to(w.dtype)
    share = float(((w @ exact) * w).sum(dtype=torch.float64)) / max(
        float(w.square().sum(dtype=torch.float64)), torch.finfo(torch.float64).tiny
    )
    return moment.double() + share * torch.eye(len(moment), dtype=torch.float64)


def rounding_for(site: Site, spec: QuantizedSpec, curved: Curvature | None) -> Rounding:
    """As the settings say it."""
    return Rounding(quantizer_for(site, spec), curved, spec.rounding == "gptq", spec.scale == "weighted", paired=spec.block_size == CHANNEL)


def rounded(
    site: Site, spec: QuantizedSpec, w: Tensor, curved: Curvature | None, stats: SiteStats | None, weighting: Tensor | None
) -> Difference:
    """What the codes leave over. Methods that round alike share it while a site is priced."""

    def find() -> Difference:
        dense = quantized_or_refused(site, lambda: rounding_for(site, spec, curved)(w)).dequantize()
        return difference(w, dense, stats, weighting)

    key = ("rounded", *(getattr(spec, entry.name) for entry in fields(QuantizedSpec)))
    found: Difference = find() if stats is None else stats.once(key, find)
    return found


def quantized_or_refused(site: Site, find: Callable[[], Quantized]) -> Quantized:
    """RewriteError naming the weight where the quantizer refuses it (scales outside their type)."""
    try:
        return find()
    except ValueError as error:
        raise RewriteError(f"{site.const.path}: {error}") from error


def _packed(q: Quantized) -> Packed:
    if q.quantizer.name == "nf4":
        return pack_matmul_bnb4(expanded(q))
    return pack_byte_table(expanded(q)) if q.quantizer.name in CODEBOOK_BITS else pack_matmul_nbits(q)


def _per_block(q: Quantized, block: int) -> tuple[Quantized, float]:
    """(the same with a scale per block, what is added to every weight): see the docstring of this module."""
    if q.offset is None:
        return q, 0.0
    like = Quantizer("uniform", q.quantizer.width, block)
    shift = float(q.offset) + 2 ** (q.quantizer.width - 1) * float(q.scales)
    return Quantized(like, q.codes, q.scales.expand(like.blocks(q.shape)).contiguous()), shift
