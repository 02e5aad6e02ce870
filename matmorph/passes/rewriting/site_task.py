"""The part of a site's rewrite that needs nothing of the graph: what its methods solve, and how large the errors of the result are.

It is run site by site, in this process or another (`passes.work`). The methods' fragments are made twice: here without nodes, to be
measured, and then in the graph, from what was solved here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from matmorph.errors import VerifyError
from matmorph.ir.core import Const, ConstKind, Value
from matmorph.ir.site import Choice, Fragment, Sample, Site
from matmorph.ir.types import TensorType, dtype_name
from matmorph.passes.linalg.whiten import relative_weight_error
from matmorph.passes.methods.protocol import Methods, SiteMethod, SiteStats, site_method
from matmorph.passes.rewriting.sample import sample_of, unseen, with_fitted_error
from matmorph.passes.work.nest import laid_out
from matmorph.passes.work.task import described, with_weight
from matmorph.specs.schema import MethodUse


@dataclass(frozen=True, slots=True, eq=False)
class Measures:
    """See `Outcome`."""

    weight_error: float
    output_error: float | None
    sample: Sample | None


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """`solution`: of the first method (`SiteMethod.solve`)."""

    solution: Any
    measures: Measures


@dataclass(frozen=True, slots=True, eq=False)
class SiteTask:
    """`site`: bare, as its methods see it. `uses`, `choices`: part by part. `weight` [out, in]: what the methods work on; `original`: the
    site's own, where that is another."""

    kind: ClassVar[str] = "site"
    site: Site
    uses: tuple[MethodUse, ...]
    choices: tuple[Choice, ...]
    stats: SiteStats | None
    weight: Tensor
    original: Tensor | None
    seed: int

    @property
    def path(self) -> str:
        return self.site.path

    def identity(self) -> Any:
        settings = tuple((use.method, use.spec) for use in self.uses)
        stats = None if self.stats is None else replace(self.stats, shared=None)
        return (self.kind, described(self.site), settings, self.choices, self.seed, stats, self.weight, self.original)

    def run(self, methods: Methods) -> Solved:
        """Raises RewriteError, as the methods do."""
        site, found = with_weight(self.site, self.weight), None
        parts: list[tuple[SiteMethod, MethodUse]] = []
        fragments: list[Fragment] = []
        for use, choice in zip(self.uses, self.choices, strict=True):
            method = standing(site_method(methods, use.method), [use for _, use in parts], methods)
            if not parts:
                found = laid_out(method.solve(site, use.spec, choice, self.stats, self.weight, self.seed))
            b = _WithoutNodes(site, self.weight, self.seed, found if not parts else None, tuple(fragments), method.trains == "adapters")
            fragments.append(method.build(site, use.spec, choice, self.stats, b))
            parts.append((method, use))
        return Solved(found, measured(site, parts, fragments, self.stats, self.weight if self.original is None else self.original))


def standing(method: SiteMethod, before: Sequence[MethodUse], methods: Methods) -> SiteMethod:
    """The form of a method for a site whose weight a method before it may have replaced."""
    beside = method.beside
    return method if beside is None or not any(methods[use.method].kind == "replace" for use in before) else beside


def keeps_node(fragments: Sequence[Fragment], parts: Sequence[tuple[SiteMethod, MethodUse]]) -> bool:
    """Whether the dense matmul stays beside the fragments."""
    return not any(method.kind == "replace" for method, _ in parts) and not any(fragment.holds_dense for fragment in fragments)


def measured(
    site: Site, parts: Sequence[tuple[SiteMethod, MethodUse]], fragments: Sequence[Fragment], stats: SiteStats | None, w: Tensor
) -> Measures:
    """Of what stands for `w` [out, in], the site's own weight."""
    approximation = _stands_for(w, fragments, keeps_node(fragments, parts))
    sample = with_fitted_error(sample_of(site, stats, parts), w, approximation, stats)
    output = None if stats is None or unseen(sample) else stats.output_error(w, approximation)
    return Measures(relative_weight_error(w, approximation), output, sample)


def _stands_for(w: Tensor, fragments: Sequence[Fragment], keeps_node: bool) -> Tensor:
    """W' = base + sum of updates, factors as they are stored."""
    terms = [*([w] if keeps_node else []), *(fragment.weight() for fragment in fragments)]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


@dataclass(slots=True, eq=False)
class _WithoutNodes:
    """What a method's `build` writes with where there is no graph: weights, and what they stand for."""

    site: Site
    held: Tensor
    seed: int
    solution: Any
    before: tuple[Fragment, ...]
    trains_adapters: bool
    names: set[str] = field(default_factory=set)

    def weight(self) -> Tensor:
        return self.held

    def residual(self) -> Tensor:
        left = self.held if dtype_name(self.held.dtype) == "float64" else self.held.float()
        for fragment in self.before:
            left = left - fragment.weight()
        return left

    def const(self, name: str, tensor: Tensor, *, trainable: bool = True, kind: ConstKind = "parameter") -> Const:
        made = tensor.detach()
        shape = TensorType(dtype_name(made.dtype), tuple(made.shape))
        return Const(name, shape, lambda: made, (f"{self.site.path}.{name}",), kind, trainable, part=name)

    def shared(self, name: str, key: Hashable, tensor: Callable[[], Tensor]) -> Const:
        return self.const(name, tensor(), trainable=False, kind="buffer")

    def __call__(self, op: str, *args: Any, name: str | None = None, **attrs: Any) -> Value:
        raise self._no_graph()

    def bias(self) -> Value | None:
        raise self._no_graph()

    def matmul(self, x: Value, const: Const, *, name: str | None = None) -> Value:
        raise self._no_graph()

    def _no_graph(self) -> VerifyError:
        return VerifyError(f"{self.site.path}: a method that has a solve writes nodes outside the body of its fragment")

    def fragment(
        self,
        body: Callable[[Value], Value],
        consts: Sequence[Const],
        weight: Callable[[], Tensor],
        *,
        lookup: Callable[[Value], Value] | None = None,
        **more: Any,
    ) -> Fragment:
        return Fragment((), (), tuple(consts), weight, **more)
