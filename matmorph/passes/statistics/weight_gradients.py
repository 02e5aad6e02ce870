"""The preliminary phase of training: gradients of the loss by weights, on labelled calibration batches, before anything is rewritten.

The model's own gradient graph is evaluated once per batch, at the weights as they are. Of each gradient only sums stay: two Gram matrices
per basis, then, where a mask is asked for, the mean magnitude in that basis, which takes a second reading of the batches. At no time is
there more than one gradient of a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor

from matmorph.errors import InputError, SpecError
from matmorph.ir.core import Const, Graph, Value
from matmorph.ir.evaluate import evaluate
from matmorph.ir.site import Site, Statistic
from matmorph.ir.training.gradient import gradient_graph
from matmorph.passes.linalg.hosvd import Bases, GradientGrams, GradientStats, top_share
from matmorph.passes.methods.protocol import Methods, Preliminary, SiteStats, site_method
from matmorph.passes.statistics.loss_gradients import Classes, classes_of, label_names, labelled_batch, loss_of
from matmorph.progress import StepProgress
from matmorph.runtime.format.training import GRADIENT, LOSS_SCALE, THETA
from matmorph.specs.schema import MethodUse, Rule, Train

Claims: TypeAlias = Sequence[tuple[Site, Rule]]
Gradients: TypeAlias = Mapping[Site, Tensor]
"""[out, in] of each site, of one batch."""

_GRADIENTS = frozenset({Statistic.GRADIENT_GRAMS, Statistic.GRADIENT_SCORES})
_HINT = "for instance: train: {loss: cross_entropy}"


@dataclass(frozen=True, slots=True)
class _Asked:
    """What one method wants at one site."""

    site: Site
    rule: Rule
    use: MethodUse
    wanted: Preliminary

    @property
    def group(self) -> tuple[str, str]:
        return self.rule.name, self.wanted.group

    def error(self, message: str, *details: str) -> SpecError:
        return SpecError(f"rule {self.rule.name}: {self.use.method} {message}", at=self.use.at, details=details)


@dataclass(slots=True, eq=False)
class _Sum:
    """The running sum of |gradient| of one site in its basis, and the energies of its first one."""

    bases: Bases | None
    total: Tensor | None = None
    shares: tuple[float, float] | None = None
    batches: int = field(default=0)


def asks_for_gradients(uses: Iterable[MethodUse], methods: Methods) -> bool:
    """Whether any of these methods has a preliminary phase, so that batches may have labels."""
    return any(_GRADIENTS & methods[use.method].needs(use.spec) for use in uses)


def refuse_without_train(claims: Claims, methods: Methods, train: Train | None) -> None:
    """SpecError at a method that needs gradients of a loss where the spec has none."""
    asked = _asked(claims, methods) if train is None else []
    if asked:
        raise asked[0].error("takes gradients of a loss, and the spec has none", _HINT)


def with_gradients(
    graph: Graph,
    claims: Claims,
    methods: Methods,
    stats: Mapping[Site, SiteStats],
    batches: Iterable[Any] | None,
    train: Train | None,
    progress: StepProgress | None = None,
) -> Mapping[Site, SiteStats]:
    """`stats` with what the methods of the claims want of gradients. `batches`: mappings with the labels beside the inputs.

    Raises SpecError for a batch without labels, and for fewer batches than a method asks for; InputError where a gradient is NaN or
    infinite, and as `calibrate`.
    """
    asked = [one for one in _asked(claims, methods) if one.site in stats]
    if not asked or batches is None or train is None:
        return stats
    source = _Source.of(graph, asked, batches, train, progress)
    bases = _bases(source, asked)
    sums = _sums(source, asked, bases)
    return {**stats, **{one.site: replace(stats[one.site], gradients=_stats(one, sums[one.site])) for one in asked}}


def _asked(claims: Claims, methods: Methods) -> list[_Asked]:
    """Of sites that a method takes; a rule that the budget decides counts with all its alternatives."""
    found: dict[Site, _Asked] = {}
    for site, rule in claims:
        for use in (use for uses in rule.alternatives for use in uses):
            method = site_method(methods, use.method)
            wanted = method.preliminary(site, use.spec)
            if wanted is not None and method.check(site, use.spec) is None:
                found.setdefault(site, _Asked(site, rule, use, wanted))
    return list(found.values())


def _bases(source: _Source, asked: Sequence[_Asked]) -> dict[tuple[str, str], Bases]:
    wanting = [one for one in asked if one.wanted.bases]
    grams = {one.group: GradientGrams.of(one.site.out_features, one.site.in_features) for one in wanting}
    for number, gradients in source.gradients(max((one.wanted.steps for one in wanting), default=0)):
        for one in wanting:
            if number < one.wanted.steps:
                grams[one.group].add(gradients[one.site])
    return {group: found.bases() for group, found in grams.items()}


def _sums(source: _Source, asked: Sequence[_Asked], bases: Mapping[tuple[str, str], Bases]) -> dict[Site, _Sum]:
    """Scores where they are wanted, and the energies of the first gradient where there are bases."""
    sums = {one.site: _Sum(bases.get(one.group) if one.wanted.bases else None) for one in asked}
    steps = {one.site: one.wanted.steps if one.wanted.scores else min(one.wanted.steps, 1) for one in asked}
    for number, gradients in source.gradients(max(steps.values())):
        for one in asked:
            if number < steps[one.site]:
                _add(sums[one.site], gradients[one.site].double(), one.wanted)
    return sums


def _add(found: _Sum, gradient: Tensor, wanted: Preliminary) -> None:
    rotated = gradient if found.bases is None else found.bases.rotated(gradient)
    if found.bases is not None and found.shares is None:
        found.shares = top_share(gradient, wanted.count), top_share(rotated, wanted.count)
    if wanted.scores:
        found.total = rotated.abs() if found.total is None else found.total + rotated.abs()
    found.batches += 1


def _stats(one: _Asked, found: _Sum) -> GradientStats:
    scores = None if found.total is None else found.total / found.batches
    return GradientStats(found.bases, scores, found.shares)


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """Where gradients come from, as often as they are read. `consts`: the weights of theta, in order."""

    graph: Graph
    gradient: Graph
    consts: tuple[Const, ...]
    asked: Sequence[_Asked]
    batches: Iterable[Any]
    labels: Mapping[str, Value]
    classes: Classes | None
    progress: StepProgress | None

    @classmethod
    def of(cls, graph: Graph, asked: Sequence[_Asked], batches: Iterable[Any], train: Train, progress: StepProgress | None) -> _Source:
        consts = tuple(dict.fromkeys(one.site.const for one in asked))
        gradient = gradient_graph(graph, consts, loss_of(train))
        names = label_names(graph, train)
        labels = {entry.name: entry.value for entry in gradient.signature.inputs if entry.name in names and entry.value is not None}
        return cls(graph, gradient, consts, asked, batches, labels, classes_of(graph, train), progress)

    def gradients(self, steps: int) -> Iterator[tuple[int, Gradients]]:
        """(number from 0, the gradients) of the first `steps` batches."""
        if steps == 0:
            return
        wide = self.gradient.signature.inputs[0].value
        dtype = torch.float32 if wide is None else wide.tensor.torch_dtype
        theta = torch.cat([const.load().detach().reshape(-1).to(dtype) for const in self.consts])
        done = 0
        for number, batch in enumerate(islice(self.batches, steps)):
            yield number, self._of_batch(theta, batch, number)
            done = number + 1
            if self.progress is not None:
                self.progress(done, steps)
        short = next((one for one in self.asked if one.wanted.steps > done), None)
        if done < steps and short is not None:
            raise short.error(
                f"takes the gradients of {short.wanted.steps} batches, and the calibration data has {done}",
                f"give more batches, or set steps: {done}",
            )

    def _of_batch(self, theta: Tensor, batch: Any, number: int) -> Gradients:
        device = self.graph.device
        inputs, labels = labelled_batch(self.graph, self.labels, self.classes, batch, number, self._unlabelled)
        tensors = dict(zip(self.graph.inputs, inputs, strict=True))
        given = {entry.name: tensors[entry.value] for entry in self.graph.signature.inputs if entry.value is not None}
        given |= {**labels, THETA: theta, LOSS_SCALE: torch.ones((), dtype=theta.dtype, device=device)}
        entries = [entry for entry in self.gradient.signature.inputs if entry.value is not None]
        with torch.no_grad():
            results = dict(zip(self.gradient.signature.outputs, evaluate(self.gradient, [given[e.name] for e in entries]), strict=True))
        pieces = results[GRADIENT].split([const.numel for const in self.consts])
        flat = dict(zip(self.consts, pieces, strict=True))
        found = {one.site: one.site.read(flat[one.site.const].reshape([int(d) for d in one.site.const.tensor.shape])) for one in self.asked}
        for site, gradient in found.items():
            if not bool(torch.isfinite(gradient).all()):
                raise InputError(f"the gradient of the loss by {site.path} is NaN or infinite on calibration batch {number + 1}")
        return found

    def _unlabelled(self, what: str, hint: str) -> SpecError:
        return self.asked[0].error(f"takes gradients of a loss, and {what}", hint)
