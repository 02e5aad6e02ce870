"""sparse_grad: W + U delta V^T, where delta trains in a basis in which gradients are sparse, and few of its entries move at a step.

SparseGrad (arXiv 2410.07383) trains W~ = U^T W V between two frozen rotations, three linears, and keeps the largest entries of its gradient
U^T G V. Here the rotations act on the weight, once per step, and the tokens see one dense matmul. What trains is the difference
delta = W~ - U^T W V, from zero: the start is W to the bit, its gradient is the same U^T G V, and so is every step of an optimizer without
weight decay. Decay is that of delta, towards the W that training started from; entries that do not take part do not decay.

`mask: step` chooses anew at every update, inside the optimizer graph (`exporters.training.apply_graph.Kept`); `mask: fixed` chooses once,
by the mean |U^T G V| over the preliminary phase, and only the chosen entries are parameters. `basis: none` leaves the rotations out:
W + delta.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from matmorph.errors import RewriteError
from matmorph.ir.core import Const, Graph, Value
from matmorph.ir.site import Choice, Cost, Fragment, FragmentAdapter, Reject, Site, Statistic
from matmorph.passes.linalg.hosvd import GradientStats, top_entries
from matmorph.passes.methods.protocol import Error, FragmentBuilder, Preliminary, SiteStats, UpdateMethod
from matmorph.passes.methods.sparse_grad.inference import inference_graph
from matmorph.passes.methods.sparse_grad.settings import SparseGradLanguage, SparseGradSpec
from matmorph.passes.methods.weights import FLOATS, dense_matrix, refuse_computed, stored, widened

DELTA, INDICES, OUT, INTO = "delta", "indices", "u", "vt"
"""Short names of the weights: what trains, [out, in] or the chosen entries [k]; their flat positions; U [out, out]; V^T [in, in]."""

ADAM_VECTORS = 3
"""theta, m and v."""


class SparseGrad(SparseGradLanguage, UpdateMethod):
    """A dense weight of which few entries learn at a time."""

    code: ClassVar[str | None] = "SG"
    colour: ClassVar[int | None] = 9

    def needs(self, spec: SparseGradSpec) -> frozenset[Statistic]:
        wanted = {Statistic.GRADIENT_GRAMS: spec.basis == "hosvd", Statistic.GRADIENT_SCORES: spec.mask == "fixed"}
        return frozenset(statistic for statistic, asked in wanted.items() if asked)

    def preliminary(self, site: Site, spec: SparseGradSpec) -> Preliminary | None:
        """What is wanted of gradients before training; None where the settings need none."""
        if not self.needs(spec):
            return None
        group = f"{site.out_features} x {site.in_features}" if spec.share == "shape" else site.path
        return Preliminary(spec.steps, group, spec.basis == "hosvd", spec.mask == "fixed", spec.count(site.parameters))

    def splits_weight(self, spec: SparseGradSpec) -> str | None:
        """It changes the dense weight, whose place nothing may have taken."""
        return "works on"

    def impossible(self, sites: Sequence[Site], spec: SparseGradSpec) -> str | None:
        largest = max(sites, key=lambda site: site.parameters)
        if spec.count(largest.parameters) <= largest.parameters:
            return None
        limit = f"the entries of every matched weight; the largest has {largest.parameters} ({largest.path})"
        return f"keep {spec.count(largest.parameters)} is above {limit}"

    def check(self, site: Site, spec: SparseGradSpec) -> Reject | None:
        count, dtype = spec.count(site.parameters), site.const.tensor.dtype
        guards = (
            (site.blocked is not None, site.blocked or ""),
            (bool(site.parts), refuse_computed(site, self.name)),
            (site.form == "embedding", "sparse_grad serves matmuls, this is an embedding table"),
            (bool(site.gathers), "the weight is also read as an embedding table; sparse_grad serves only the matmul: use untie: true"),
            (dtype not in FLOATS, f"sparse_grad needs a floating-point weight, this one is {dtype}"),
            (site.batch is not None, "sparse_grad treats one matrix, this is a stack of experts"),
            (count > site.parameters, f"keep {count} is above the {site.parameters} entries of the weight"),
        )
        return next((Reject(reason) for fails, reason in guards if fails), None)

    def choices(self, site: Site, spec: SparseGradSpec) -> Iterable[Choice]:
        entries, count = site.parameters, spec.count(site.parameters)
        whole, some = (4 * ADAM_VECTORS * number for number in (entries, count))
        if spec.mask == "step":
            note = f"{count:,} of {entries:,} entries learn at each step; any may, so parameters and Adam's moments take {whole:,} bytes"
        else:
            note = f"{count:,} of {entries:,} entries learn: parameters and Adam's moments take {some:,} bytes, of all entries {whole:,}"
        return [Choice(notes=(note,))]

    def cost(self, site: Site, spec: SparseGradSpec, choice: Choice) -> Cost:
        """Nothing: inference is the dense matmul that it was. `trains`: numbers in theta."""
        return Cost(0, 0, 0, trains=site.parameters if spec.mask == "step" else spec.count(site.parameters))

    def errors(self, site: Site, spec: SparseGradSpec, choices: Sequence[Choice], stats: SiteStats | None) -> Sequence[Error]:
        """None: the start changes nothing."""
        return [Error(0.0, None if stats is None else 0.0) for _ in choices]

    def build(self, site: Site, spec: SparseGradSpec, choice: Choice, stats: SiteStats | None, b: FragmentBuilder) -> Fragment:
        """RewriteError where the preliminary phase is missing."""
        found = _found(site, spec, None if stats is None else stats.gradients)
        weights = _Weights.of(site, spec, found, b)
        made: list[Value] = []
        count = spec.count(site.parameters)

        def body(rows: Value) -> Value:
            if not made:  # once, however often the weight is used
                made.append(weights.changed(dense_matrix(site, b)))
            return b("aten.linear.default", rows, made[0], b.bias())

        return b.fragment(
            body,
            weights.all,
            lambda: widened(site.weight().detach()),
            choice=choice,
            adds_bias=True,
            holds_dense=True,
            notes=_said(found, count),
            adapter=FragmentAdapter({DELTA: weights.delta}, inside=True, kept={DELTA: count} if spec.mask == "step" else {}),
        )

    def merge(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """W + U delta V^T [out, in] in float32 or better, from `base` = W, `delta`, and `u`, `vt`, `indices` where there are such."""
        base, delta = widened(parts["base"]), widened(parts[DELTA])
        if INDICES in parts:
            delta = torch.zeros_like(base).reshape(-1).scatter(0, parts[INDICES], delta.to(base.dtype))
        update = delta.reshape(base.shape).to(base.dtype)
        if OUT in parts:
            update = widened(parts[OUT]).to(base.dtype) @ update @ widened(parts[INTO]).to(base.dtype)
        return base + update, None

    def for_inference(self, graph: Graph) -> Graph:
        """What it trains is put into the weights."""
        return inference_graph(graph, self.name)


def _found(site: Site, spec: SparseGradSpec, found: GradientStats | None) -> GradientStats | None:
    missing = (
        spec.basis == "hosvd" and (found is None or found.bases is None),
        spec.mask == "fixed" and (found is None or found.scores is None),
    )
    if any(missing):
        raise RewriteError(f"{site.path}: sparse_grad needs gradients of labelled calibration data")
    return found


def _said(found: GradientStats | None, count: int) -> tuple[str, ...]:
    """What the preliminary phase says of the choice of the basis."""
    if found is None or found.shares is None:
        return ()
    raw, rotated = found.shares
    return (f"in its basis {count:,} entries hold {rotated:.1%} of a gradient's energy, {raw:.1%} without",)


@dataclass(frozen=True, slots=True, eq=False)
class _Weights:
    """The new weights of one site."""

    site: Site
    delta: Const
    indices: Const | None
    u: Const | None
    vt: Const | None
    b: FragmentBuilder

    @classmethod
    def of(cls, site: Site, spec: SparseGradSpec, found: GradientStats | None, b: FragmentBuilder) -> _Weights:
        places = None
        if spec.mask == "fixed" and found is not None and found.scores is not None:
            places = top_entries(found.scores, spec.count(site.parameters))
        shape = (site.out_features, site.in_features) if places is None else (len(places),)
        delta = b.const(DELTA, stored(site, torch.zeros(shape)))
        indices = None if places is None else b.const(INDICES, places, trainable=False, kind="buffer")
        if found is None or found.bases is None:
            return cls(site, delta, indices, None, None, b)
        bases, dtype = found.bases, site.const.tensor.dtype
        u = b.shared(OUT, (bases, OUT, dtype), lambda: stored(site, bases.u))
        vt = b.shared(INTO, (bases, INTO, dtype), lambda: stored(site, bases.v.T))
        return cls(site, delta, indices, u, vt, b)

    @property
    def all(self) -> list[Const]:
        return [const for const in (self.delta, self.indices, self.u, self.vt) if const is not None]

    def changed(self, w: Value) -> Value:
        """W + U delta V^T as nodes."""
        b, update = self.b, self.delta
        moved: Value = update
        if self.indices is not None:
            empty = b("aten.new_zeros.default", update, [self.site.parameters])
            moved = b("aten.scatter.src", empty, 0, self.indices, update)
            moved = b("aten.reshape.default", moved, [self.site.out_features, self.site.in_features])
        if self.u is not None and self.vt is not None:
            moved = b("aten.mm.default", b("aten.mm.default", self.u, moved), self.vt)
        return b("aten.add.Tensor", w, moved)
