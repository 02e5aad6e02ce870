"""lora: two factors beside the matmul, y = x @ W^T + bias + scale (x @ down) @ up; the factors train, W does not.

LoRA (arXiv 2106.09685): `up` starts at zero, so the model starts unchanged; `down` is drawn as torch draws a linear layer (Kaiming uniform
with a = sqrt(5)) or from a normal distribution of deviation 1 / rank. rsLoRA (arXiv 2312.03732) scales by alpha / sqrt(rank). PiSSA
(arXiv 2404.02948) starts from the leading singular triples of W, MiLoRA (arXiv 2406.09044) from the last ones, OLoRA (arXiv 2406.01775)
from the first columns of its QR decomposition; what they hold is taken out of W, which becomes a frozen weight of its own,
W - scale (down @ up)^T. In the papers' notation down = A^T, up = B^T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor

from matmorph.ir.core import Const, Value
from matmorph.ir.site import Choice, Cost, Fragment, FragmentAdapter, Reject, Site
from matmorph.passes.linalg.svd import one_thread, truncated_svd
from matmorph.passes.methods.lora.settings import LoraLanguage, LoraSpec
from matmorph.passes.methods.protocol import Error, FragmentBuilder, Peft, SiteStats, UpdateMethod
from matmorph.passes.methods.weights import FLOATS, own_stream, rank_beyond, readable, scaled_pair, stored, times, widened

Factors = tuple[Tensor, Tensor]
"""(down [.., in, rank], up [.., rank, out])."""


class Lora(LoraLanguage, UpdateMethod):
    """Low-rank factors to be trained, beside a matmul that stays."""

    code: ClassVar[str | None] = "LO"
    colour: ClassVar[int | None] = 4
    peft: ClassVar[Peft | None] = Peft(takes_in=True)

    def splits_weight(self, spec: LoraSpec) -> str | None:
        """Where the factors start from a part of the dense weight, nothing may have taken its place."""
        return "with this init takes its start out of" if spec.init in _PARTS else None

    def impossible(self, sites: Sequence[Site], spec: LoraSpec) -> str | None:
        return rank_beyond(sites, spec.rank)

    def check(self, site: Site, spec: LoraSpec) -> Reject | None:
        full, rank = min(site.in_features, site.out_features), int(spec.rank.value or 1)
        guards = (
            (site.blocked is not None, site.blocked or ""),
            (site.form == "embedding", "lora serves matmuls, this is an embedding table"),
            (bool(site.gathers), "the weight is also read as an embedding table; lora serves only the matmul: use untie: true"),
            (site.const.tensor.dtype not in FLOATS, f"lora needs a floating-point weight, this one is {site.const.tensor.dtype}"),
            (rank > full, f"rank {rank} is above min(in, out) = {full}"),
        )
        return next((Reject(reason) for fails, reason in guards if fails), None)

    def choices(self, site: Site, spec: LoraSpec) -> Iterable[Choice]:
        return [Choice(int(spec.rank.value or 1))]

    def cost(self, site: Site, spec: LoraSpec, choice: Choice) -> Cost:
        """Of the factors alone."""
        per_row = (site.in_features + site.out_features) * (choice.rank or 0)
        parameters = per_row * (site.batch or 1)
        return Cost(parameters, parameters * site.const.tensor.torch_dtype.itemsize, per_row * len(site.applications))

    def errors(self, site: Site, spec: LoraSpec, choices: Sequence[Choice], stats: SiteStats | None) -> Sequence[Error]:
        """None: the start changes nothing."""
        return [Error(0.0, None if stats is None else 0.0) for _ in choices]

    def solve(self, site: Site, spec: LoraSpec, choice: Choice, stats: SiteStats | None, weight: Tensor, seed: int) -> Factors:
        """The starting factors in the weight's type. Raises RewriteError for NaN or infinity in a weight that they are taken from."""
        rank = choice.rank or 1
        if spec.init in _PARTS:
            found = _PARTS[spec.init](readable(site, weight), rank, spec.adapter_scale, seed)
        else:
            shape = (*((site.batch,) if site.batch else ()), rank, site.out_features)
            found = _drawn(site, spec.init, rank, seed), torch.zeros(shape)
        return stored(site, found[0]), stored(site, found[1])

    def build(self, site: Site, spec: LoraSpec, choice: Choice, stats: SiteStats | None, b: FragmentBuilder) -> Fragment:
        """Raises RewriteError as `solve`, and for factors or a base outside the weight's type."""
        scale = spec.adapter_scale
        factors = b.solution or self.solve(site, spec, choice, stats, b.weight(), b.seed)
        parts = dict(zip(("down", "up"), factors, strict=True))
        left = _base(site, b.weight(), factors, scale) if spec.init in _PARTS else None
        base = None if left is None else b.const("base", left, trainable=False)
        down, up = (b.const(name, factor) for name, factor in parts.items())

        def body(rows: Value) -> Value:
            narrow = b.matmul(rows, down, name="down")
            scaled = times(b, narrow, scale)
            update = b.matmul(scaled, up, name="up")
            return update if base is None else b("aten.add.Tensor", _product(site, rows, base, b), update)

        return b.fragment(
            body,
            [*(() if base is None else (base,)), down, up],
            lambda: self.merge({**parts, **({} if left is None else {"base": left}), "scale": torch.tensor(scale, dtype=torch.float64)})[0],
            choice=choice,
            adds_bias=base is not None and site.batch is None,
            holds_dense=base is not None,
            adapter=FragmentAdapter(
                {"down": down, "up": up}, scale, own_base=None if base is None else base.part, details={"rslora": spec.rslora}
            ),
        )

    def merge(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """`scale` (down @ up)^T [.., out, in] in float32 or better, plus the frozen `base` where there is one (as `build` stores it)."""
        update = float(parts.get("scale", 1.0)) * (widened(parts["down"]) @ widened(parts["up"])).transpose(-2, -1)
        if "base" not in parts:
            return update, None
        base = widened(parts["base"])
        return (base if base.dim() == 2 else base.transpose(-2, -1)) + update, None

    def two_factor(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return scaled_pair(parts)


def _product(site: Site, rows: Value, base: Const, b: FragmentBuilder) -> Value:
    """rows times the frozen base: [out, in] as a linear with the bias, an expert stack [batch, in, out] without."""
    if site.batch is not None:
        return b.matmul(rows, base, name="base")
    return b("aten.linear.default", rows, base, b.bias())


def _base(site: Site, weight: Tensor, factors: Factors, scale: float) -> Tensor:
    """W - scale (down @ up)^T of the stored factors, rounded once; [out, in], of an expert stack [batch, in, out]."""
    down, up = (factor.double() for factor in factors)
    left = weight.detach().double() - scale * (down @ up).transpose(-2, -1)
    return stored(site, left if site.batch is None else left.transpose(-2, -1))


def _drawn(site: Site, init: str, rank: int, seed: int) -> Tensor:
    """[.., in, rank]; every site has a stream of its own, whatever else is rewritten."""
    generator = own_stream(seed, site.path)
    empty = torch.empty(*((site.batch,) if site.batch else ()), site.in_features, rank)
    if init == "gaussian":
        return empty.normal_(0, 1 / rank, generator=generator)
    bound = 1 / sqrt(site.in_features)
    return empty.uniform_(-bound, bound, generator=generator)


def _pissa(w: Tensor, rank: int, scale: float, seed: int) -> Factors:
    """Leading singular triples, the values' roots on both sides: down = V sqrt(S / scale), up = sqrt(S / scale) U^T."""
    found = truncated_svd(w, rank, seed=seed)
    root = (found.s / scale).sqrt()
    return found.vh.transpose(-2, -1) * root.unsqueeze(-2), root.unsqueeze(-1) * found.u.transpose(-2, -1)


def _olora(w: Tensor, rank: int, scale: float, seed: int) -> Factors:
    """First columns of Q and rows of R in W = Q R; the first columns of Q depend on those of W alone. The scale is not divided out."""
    with one_thread():
        q = torch.linalg.qr(w[..., :rank].double()).Q
    return w.double().transpose(-2, -1) @ q, q.transpose(-2, -1)


def _milora(w: Tensor, rank: int, scale: float, seed: int) -> Factors:
    """The last singular triples instead, divided likewise: what the weight says most of stays in the frozen base."""
    with one_thread():
        u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    root = (s[..., -rank:] / scale).sqrt()
    return vh[..., -rank:, :].transpose(-2, -1) * root.unsqueeze(-2), root.unsqueeze(-1) * u[..., -rank:].transpose(-2, -1)


_PARTS: Mapping[str, Callable[[Tensor, int, float, int], Factors]] = {"pissa": _pissa, "olora": _olora, "milora": _milora}
