"""What updates of one dense matrix have in common: a method says which tensors a site gets, and what they do.

`AddedUpdate` stands beside a matmul, whatever that is: y = x W^T + b + update(x). `InsideUpdate` makes another weight, W' = weight(W), and
the matmul is one with W'; its nodes read constants alone, so that ONNX Runtime computes them when it loads a file.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any, TypeAlias

import torch
from torch import Generator, Tensor

from matmorph.ir.core import Const, Value
from matmorph.ir.site import Choice, Cost, Fragment, FragmentAdapter, Reject, Site
from matmorph.passes.methods.protocol import Error, FragmentBuilder, SiteStats, UpdateMethod
from matmorph.passes.methods.weights import dense_matrix, own_stream, refuse_computed, refuse_matrix, stored

Start: TypeAlias = Callable[[tuple[int, ...], Generator, Callable[[], Tensor]], Tensor]
"""The first numbers of a tensor: from its shape, random numbers of its own, and the weight [out, in], which is read when asked for."""


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of an update. `shared`: all sites with the same key have the same tensor, which does not train."""

    shape: tuple[int, ...]
    start: Start
    shared: Hashable | None = None


class TensorUpdate(UpdateMethod):
    """See `AddedUpdate` and `InsideUpdate`."""

    @abstractmethod
    def parts(self, site: Site, spec: Any) -> Mapping[str, Part]:
        """Its tensors by short name, of a site that `misfit` lets pass."""

    def misfit(self, site: Site, spec: Any) -> str | None:
        """Why its structure does not fit the sizes of the site, with the nearest that does."""
        return None

    def scale(self, spec: Any) -> float:
        """What the update is multiplied by; `merge` is given it as `scale`."""
        return 1.0

    def details(self, spec: Any) -> Mapping[str, Any]:
        """Of the adapter's record."""
        return {}

    def impossible(self, sites: Sequence[Site], spec: Any) -> str | None:
        problems = [self.misfit(site, spec) for site in sites]
        return f"{sites[0].path}: {problems[0]}" if problems and all(problems) else None

    def check(self, site: Site, spec: Any) -> Reject | None:
        why = self.misfit(site, spec)
        return refuse_matrix(site, self.name) or (None if why is None else Reject(why))

    def choices(self, site: Site, spec: Any) -> Iterable[Choice]:
        rank = getattr(spec, "rank", None)
        return [Choice(rank)]

    def cost(self, site: Site, spec: Any, choice: Choice) -> Cost:
        """Of the tensors alone. One that sites share is none of any site's own."""
        own = sum(prod(part.shape) for part in self.parts(site, spec).values() if part.shared is None)
        return Cost(own, own * site.const.tensor.torch_dtype.itemsize, self.macs(site, spec) * len(site.applications))

    @abstractmethod
    def macs(self, site: Site, spec: Any) -> int:
        """Multiply-accumulates per row that the update adds."""

    def errors(self, site: Site, spec: Any, choices: Sequence[Choice], stats: SiteStats | None) -> Sequence[Error]:
        """None: the start changes nothing."""
        return [Error(0.0, None if stats is None else 0.0) for _ in choices]

    def started(self, site: Site, spec: Any, b: FragmentBuilder) -> tuple[dict[str, Const], dict[str, Tensor]]:
        """(the tensors as weights of the graph, their numbers). Raises RewriteError for numbers outside the weight's type."""
        consts, numbers = dict[str, Const](), dict[str, Tensor]()
        for name, part in self.parts(site, spec).items():
            own = (site.path, name) if part.shared is None else (str(part.shared),)
            numbers[name] = stored(site, part.start(part.shape, own_stream(b.seed, *own), b.weight))
            if part.shared is None:
                consts[name] = b.const(name, numbers[name])
            else:
                consts[name] = b.shared(name, part.shared, lambda tensor=numbers[name]: tensor)  # type: ignore[misc]
        return consts, numbers

    def _scaled(self, numbers: Mapping[str, Tensor], spec: Any) -> dict[str, Tensor]:
        return {**numbers, "scale": torch.tensor(self.scale(spec), dtype=torch.float64)}


class AddedUpdate(TensorUpdate):
    """y = x W^T + b + update(x), beside a dense weight or what took its place."""

    @abstractmethod
    def update(self, rows: Value, parts: Mapping[str, Const], spec: Any, b: FragmentBuilder) -> Value:
        """Its nodes: rows [.., in] to [.., out]."""

    def build(self, site: Site, spec: Any, choice: Choice, stats: SiteStats | None, b: FragmentBuilder) -> Fragment:
        consts, numbers = self.started(site, spec, b)
        adapter = FragmentAdapter(consts, self.scale(spec), details=self.details(spec))
        return b.fragment(
            lambda rows: self.update(rows, consts, spec, b),
            list(consts.values()),
            lambda: self.merge(self._scaled(numbers, spec))[0],
            choice=choice,
            adapter=adapter,
        )


class InsideUpdate(TensorUpdate):
    """y = x W'^T + b', where W' is made of the dense W."""

    @abstractmethod
    def weight(self, w: Value, parts: Mapping[str, Const], spec: Any, b: FragmentBuilder) -> Value:
        """Its nodes: W [out, in] to W' [out, in]."""

    def bias(self, site: Site, own: Value | None, parts: Mapping[str, Const], spec: Any, b: FragmentBuilder) -> Value | None:
        """The bias [out] of the new matmul, where `own` is what the fragment may add itself, if anything."""
        return own

    def macs(self, site: Site, spec: Any) -> int:
        """None: W' is computed once."""
        return 0

    def splits_weight(self, spec: Any) -> str | None:
        return "works on"

    def check(self, site: Site, spec: Any) -> Reject | None:
        return super().check(site, spec) or (Reject(refuse_computed(site, self.name)) if site.parts else None)

    def build(self, site: Site, spec: Any, choice: Choice, stats: SiteStats | None, b: FragmentBuilder) -> Fragment:
        consts, numbers = self.started(site, spec, b)

        def body(rows: Value) -> Value:
            new = self.weight(dense_matrix(site, b), consts, spec, b)
            return b("aten.linear.default", rows, new, self.bias(site, b.bias(), consts, spec, b))

        return b.fragment(
            body,
            list(consts.values()),
            lambda: self.merge({**self._scaled(numbers, spec), "base": b.weight()})[0],
            choice=choice,
            adds_bias=True,
            holds_dense=True,
            adapter=FragmentAdapter(consts, self.scale(spec), inside=True, details=self.details(spec)),
        )


def constant(value: float) -> Start:
    return lambda shape, generator, weight: torch.full(shape, value)


def kaiming(fan_in: int) -> Start:
    """As torch draws a linear layer: uniform within +- 1 / sqrt(fan in)."""
    bound = 1 / sqrt(fan_in)
    return lambda shape, generator, weight: torch.empty(shape).uniform_(-bound, bound, generator=generator)


def normal(deviation: float) -> Start:
    return lambda shape, generator, weight: torch.empty(shape).normal_(0, deviation, generator=generator)


def rank_above(site: Site, rank: int) -> str | None:
    full = min(site.in_features, site.out_features)
    return f"rank {rank} is above min(in, out) = {full}" if rank > full else None
