"""transact: only the width between the two matmuls of a block is pruned (TransAct, arXiv 2407.05690, Findings of ACL 2024).

MLP features, whole heads (all query heads of a key/value head with it) or dimensions of every head are kept by the energy of the
activations at the input of the last matmul. Here that matmul is then refitted (least squares on the same data), which is not in the
paper. Unlike the authors' code, dimensions of queries and keys go as rotary pairs with their own frequencies and the softmax keeps its
scale, so that a pruned graph is the original one with those activations set to zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import ceil, gcd
from typing import ClassVar

import torch
from torch import Tensor

from matmorph.errors import RewriteError
from matmorph.ir.build import Builder
from matmorph.ir.site import Choice, Cost, Reject, Site, Statistic
from matmorph.passes.linalg.refit import refit
from matmorph.passes.linalg.whiten import relative_output_error
from matmorph.passes.methods.protocol import BlockMethod, Error, SiteStats
from matmorph.passes.methods.transact.scores import Scores, block_scores, kept_units
from matmorph.passes.methods.transact.settings import TransactLanguage, TransactSpec
from matmorph.passes.methods.weights import FLOATS, readable, stored
from matmorph.passes.pruning.axes import HEADS, QK, WIDTH, Counts, V, positions, resized, units_of
from matmorph.passes.pruning.find_blocks import Block
from matmorph.passes.pruning.patch import Patch, make_patch
from matmorph.passes.pruning.widths import prune_schedule

_AUTO = 8
"""Steps of the width that `auto` may choose from."""
_NAME = "transact"


class Transact(TransactLanguage, BlockMethod):
    """Structural pruning of one block."""

    code: ClassVar[str | None] = "TA"
    colour: ClassVar[int | None] = 7

    def needs(self, spec: TransactSpec) -> frozenset[Statistic]:
        moment = spec.score == "activation" or spec.compensate == "least_squares"
        found = {Statistic.INPUT_SECOND_MOMENT: moment, Statistic.TAYLOR: spec.score == "taylor"}
        return frozenset(statistic for statistic, wanted in found.items() if wanted)

    def fitted(self, spec: TransactSpec) -> bool:
        """The refit is; which features are large shows on few rows."""
        return spec.compensate == "least_squares"

    def reads(self, block: Block, spec: TransactSpec) -> tuple[Site, ...]:
        """The sites whose statistics are read: the last matmul, and where dimensions of q and k are chosen also their own."""
        producers = tuple(p.site for p in block.producers if QK in units_of(p.axis)) if spec.unit == "head_dims" else ()
        return (block.consumer, *(producers if spec.score != "weight" else ()))

    def check(self, block: Block, spec: TransactSpec) -> Reject | None:
        """From shapes only: a block that cannot be cut this way, or that is as narrow already."""
        if block.reject is not None:
            return block.reject
        unit = _main_unit(block, spec)
        if unit in block.blocked:
            return Reject(f"{_WORDS[unit]} cannot be pruned: {block.blocked[unit]}")
        if unit not in units_of(block.axis):
            return Reject(f"{block.name} has no {_WORDS[unit]} to prune")
        floats = next((site for site in block.sites if site.const.tensor.dtype not in FLOATS), None)
        if floats is not None:
            return Reject(f"transact needs floating-point weights, {floats.path} is {floats.const.tensor.dtype}")
        if (reason := _odd(block, spec)) is not None:
            return Reject(reason)
        if spec.width.kind != "auto" and _target(block, spec) >= block.width:
            return Reject(f"nothing to prune: {block.name} is {block.width} wide, width {spec.width} asks for {_target(block, spec)}")
        return None

    def impossible(self, blocks: Sequence[Block], spec: TransactSpec) -> str | None:
        """Why these settings fit no block at all."""
        if spec.width.kind != "fixed" or not blocks:
            return None
        widest = max(blocks, key=lambda block: block.width)
        if int(spec.width.value or 0) > widest.width:
            return f"width {spec.width} is above that of every matched block; the widest is {widest.width} ({widest.consumer.path})"
        reasons = [_odd(block, spec) for block in blocks]
        return reasons[0] if None not in reasons else None

    def shots(self, spec: TransactSpec) -> int:
        return spec.shots

    def choices(self, block: Block, spec: TransactSpec) -> Iterable[Choice]:
        """One width; under `auto` about eighths of the width, each once."""
        if spec.width.kind != "auto":
            return [_choice(block, spec, _target(block, spec))]
        step = _step(block, spec)
        widths = {min(ceil(block.width * k / _AUTO / step) * step, block.width) for k in range(1, _AUTO)}
        return [Choice(width) for width in sorted(widths) if width < block.width]

    def schedule(self, block: Block, spec: TransactSpec) -> tuple[Choice, ...]:
        """The choice of each of `shots` shots, on the way from the block's width (`prune_schedule`)."""
        target = _target(block, spec)
        widths = prune_schedule(block.width, target, spec.shots, multiple_of=_step(block, spec))
        return tuple(_choice(block, spec, width) if width == target else Choice(width) for width in widths)

    def counts(self, block: Block, spec: TransactSpec, choice: Choice) -> Counts:
        """How many of each unit stay under a choice of this block."""
        width = int(choice.rank or 0)
        if block.heads is None:
            return {WIDTH: width}
        if spec.unit == "heads":
            return {HEADS: width // (block.heads.queries * block.heads.value_dim)}
        dims = width // (block.heads.queries * block.heads.groups)
        if QK in block.blocked:
            return {V: dims}
        own = dims if block.heads.dim == block.heads.value_dim else 2 * ceil(dims * block.heads.dim / block.heads.value_dim / 2)
        return {V: dims, QK: own // 2 if block.heads.pairs else own}

    def costs(self, block: Block, spec: TransactSpec, choice: Choice) -> Mapping[Site, Cost]:
        """What each matmul of the block takes under a choice, its bias excluded; shapes only."""
        counts = self.counts(block, spec, choice)
        sizes = {p.site: (int(resized(p.axis, counts)), p.site.in_features) for p in block.producers}
        sizes[block.consumer] = (block.consumer.out_features, int(resized(block.axis, counts)))
        return {site: _dense(site, out * width) for site, (out, width) in sizes.items()}

    def cost(self, block: Block, spec: TransactSpec, choice: Choice) -> Cost:
        """Of all matmuls of the block together."""
        costs = self.costs(block, spec, choice).values()
        return Cost(sum(c.parameters for c in costs), sum(c.bytes for c in costs), sum(c.macs for c in costs))

    def errors(self, block: Block, spec: TransactSpec, choices: Sequence[Choice], stats: Mapping[Site, SiteStats]) -> Sequence[Error]:
        """Relative output error of the last matmul for each choice, all from one scoring; what q and k lose is not in it."""
        scores = block_scores(block, spec.score, _units(block, spec), stats)
        w = readable(block.consumer, block.consumer.weight())
        found = []
        for choice in choices:
            features = positions(block.axis, kept_units(block, scores, self.counts(block, spec, choice)))
            own = _consumer(block, stats)
            found.append(Error(output_error=relative_output_error(w, _spread(w, _fitted(w, own, features, spec)[0], features), own.judged)))
        return found

    def scores(self, block: Block, spec: TransactSpec, stats: Mapping[Site, SiteStats]) -> Scores:
        """How much each unit matters: by unit, larger is kept first."""
        return block_scores(block, spec.score, _units(block, spec), stats)

    def build(self, block: Block, spec: TransactSpec, choice: Choice, stats: Mapping[Site, SiteStats], b: Builder) -> Patch:
        """The patch under a choice. Raises RewriteError for NaN or infinity in a weight (named) and for weights that leave their type."""
        kept = kept_units(block, self.scores(block, spec, stats), self.counts(block, spec, choice))
        features = positions(block.axis, kept)
        site = block.consumer
        w = readable(site, site.weight())
        sliced = w[:, features]
        if spec.compensate == "none":
            return make_patch(block, kept, stored(site, sliced), _NAME, b, choice)
        own = _consumer(block, stats)
        fitted, notes = _fitted(w, own, features, spec)
        narrow = stored(site, fitted)
        errors = [relative_output_error(w, _spread(w, matrix.to(w.dtype), features), own.judged) for matrix in (sliced, narrow)]
        if errors[1] > errors[0]:  # too few rows to fit to, or rounding to the stored type where there was next to nothing to gain
            narrow, notes = stored(site, sliced), (*notes, "not refitted: slicing alone is as good")
        return make_patch(block, kept, narrow, _NAME, b, choice, notes)


_WORDS: Mapping[str, str] = {WIDTH: "features", HEADS: "heads", V: "dimensions of the heads"}


def _main_unit(block: Block, spec: TransactSpec) -> str:
    """The unit that the block's width counts."""
    if block.kind == "mlp":
        return WIDTH
    return HEADS if spec.unit == "heads" else V


def _units(block: Block, spec: TransactSpec) -> tuple[str, ...]:
    main = _main_unit(block, spec)
    return (V, QK) if main == V and QK not in block.blocked else (main,)


def _heads(block: Block) -> int:
    return block.heads.groups * block.heads.queries if block.heads is not None else 1


def _step(block: Block, spec: TransactSpec) -> int:
    """What widths of this block are multiples of: whole groups of heads, an even number of dimensions of each head."""
    if block.heads is None:
        return spec.multiple_of
    if spec.unit == "heads":
        return block.heads.queries * block.heads.value_dim
    heads = _heads(block)
    dims = spec.multiple_of // gcd(spec.multiple_of, heads)
    return heads * (dims if dims % 2 == 0 else 2 * dims)


def _target(block: Block, spec: TransactSpec) -> int:
    value = spec.width.value or 0
    wanted = ceil(value * block.width - 1e-9) if spec.width.kind == "ratio" else int(value)
    step = _step(block, spec)
    return min(-(-wanted // step) * step, block.width)


def _odd(block: Block, spec: TransactSpec) -> str | None:
    """Why a width given in numbers gives no even dimension of the heads; percentages are rounded up to one."""
    if spec.width.kind != "fixed" or block.heads is None or spec.unit != "head_dims":
        return None
    width, heads = int(spec.width.value or 0), _heads(block)
    if width % (2 * heads) == 0:
        return None
    near = [2 * heads * k for k in (width // (2 * heads), width // (2 * heads) + 1) if k]
    return f"width {width} is no even dimension for each of {heads} heads ({block.consumer.path}); near: {', '.join(map(str, near))}"


def _choice(block: Block, spec: TransactSpec, width: int) -> Choice:
    wanted = spec.width.value or 0
    asked = ceil(wanted * block.width - 1e-9) if spec.width.kind == "ratio" else int(wanted)
    if spec.width.kind == "auto" or asked == width:
        return Choice(width)
    what = f"{width // _step(block, spec)} groups of heads" if block.heads and spec.unit == "heads" and block.heads.queries > 1 else None
    what = what or (
        f"{width // _step(block, spec)} heads" if block.heads and spec.unit == "heads" else f"a multiple of {_step(block, spec)}"
    )
    return Choice(width, notes=(f"width {asked} rounds up to {width}: {what}",))


def _dense(site: Site, parameters: int) -> Cost:
    return Cost(parameters, parameters * site.const.tensor.torch_dtype.itemsize, parameters * len(site.applications))


def _consumer(block: Block, stats: Mapping[Site, SiteStats]) -> SiteStats:
    found = stats.get(block.consumer)
    if found is None:
        raise RewriteError(f"{block.consumer.path}: transact needs calibration data")
    return found


def _fitted(w: Tensor, stats: SiteStats, features: Tensor, spec: TransactSpec) -> tuple[Tensor, tuple[str, ...]]:
    """The last matmul's matrix [out, kept], and notes."""
    if spec.compensate == "none":
        return w[:, features], ()
    fitted, notes = refit(w, stats.second_moment, features, spec.damping, int(torch.as_tensor(stats.rows).sum()))
    return fitted.to(w.dtype), notes


def _spread(w: Tensor, narrow: Tensor, features: Tensor) -> Tensor:
    """[out, in] with the kept columns in their places and zero elsewhere."""
    full = torch.zeros_like(w)
    full[:, features] = narrow.to(w.dtype)
    return full
