"""The conditions of a `match`: immutable, each knows its text and its place in the spec, and answers for one site at a time."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from matmorph.errors import Position, RewriteError, SpecError
from matmorph.ir.site import Site
from matmorph.specs.globs import Glob
from matmorph.specs.numbers import Comparison, Layers
from matmorph.specs.pattern import Pattern
from matmorph.specs.pattern_match import Occurrence

_ATTENTION = ("q", "k", "v", "qkv", "kv", "qk", "qv", "o")
_MLP = ("gate", "up", "gate_up", "fc1", "fc2", "down")
ROLES: tuple[str, ...] = (
    *(f"attention.{part}" for part in _ATTENTION),
    *(f"cross_attention.{part}" for part in _ATTENTION),
    *(f"mlp.{part}" for part in _MLP),
    "moe.router",
    *(f"moe.{part}" for part in (*_MLP, "other")),
    "head",
    "embedding",
    "other",
)
"""The closed set of roles that dataflow inference gives."""

OPS: tuple[str, ...] = ("matmul", "linear", "addmm", "mm", "einsum", "conv1x1", "expert", "embedding")
"""What `op` takes: `matmul` = every weight matmul in whatever form, `embedding` = tables (also one tied to a head), else one form."""


def read_statistic(name: str, site: Site) -> float | None:
    """A statistic of `site.weight()`, read one matrix at a time, in float64; of an expert stack, the largest over its matrices. None for
    a weight on the meta device, which has no numbers.

    `effective_rank`: exp of the Shannon entropy of the singular values divided by their sum (Roy & Vetterli, "The effective rank: a
    measure of effective dimensionality", EUSIPCO 2007, eq. 1-4); between 1 and min(in, out), 0 for a zero matrix.
    `outlier_ratio`: max |w| / sqrt(mean(w^2)), at least 1; 0 for a zero matrix. RewriteError: NaN or Inf in the weight.
    """
    weight = site.weight().detach()
    if weight.is_meta:
        return None
    matrices = weight.unbind(0) if weight.dim() == 3 else (weight,)
    values = []
    for matrix in matrices:
        exact = matrix.to(torch.float64)
        if not bool(torch.isfinite(exact).all()):
            raise RewriteError(f"{site.path}: the weight has NaN or Inf")
        values.append(_STATISTICS[name](exact))
    return max(values)


def _effective_rank(weight: torch.Tensor) -> float:
    gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    total = singular.sum()
    share = singular[singular > 0] / total
    return float(torch.exp(-(share * share.log()).sum())) if total > 0 else 0.0


def _outlier_ratio(weight: torch.Tensor) -> float:
    rms = weight.square().mean().sqrt()
    return float(weight.abs().max() / rms) if rms > 0 else 0.0


_STATISTICS: Mapping[str, Callable[[torch.Tensor], float]] = {"effective_rank": _effective_rank, "outlier_ratio": _outlier_ratio}
STATISTICS: tuple[str, ...] = tuple(_STATISTICS)


def _no_occurrences(_: Pattern) -> tuple[Occurrence, ...]:
    return ()


def _no_block(_: Site) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Facts:
    """What conditions may ask about a site. `layers`: number of layers of the model (largest layer index + 1); `occurrences` finds a
    pattern in the whole graph; `statistic(name, site)` reads the weight; `block` gives the kind of block that a site is part of."""

    site: Site
    layers: int = 0
    occurrences: Callable[[Pattern], tuple[Occurrence, ...]] = _no_occurrences
    statistic: Callable[[str, Site], float | None] = read_statistic
    block: Callable[[Site], str | None] = _no_block


@dataclass(frozen=True, slots=True, eq=False)
class Condition(ABC):
    """One condition. `text` shows it as the spec has it ("role: mlp.*"), `key` is its key in the spec."""

    at: Position | None
    keypath: str
    key: str
    text: str

    @abstractmethod
    def holds(self, facts: Facts) -> bool:
        """Whether the site satisfies it."""

    @abstractmethod
    def value(self, facts: Facts) -> str:
        """What the site has there, for people."""


@dataclass(frozen=True, slots=True, eq=False)
class RoleCondition(Condition):
    globs: tuple[Glob, ...]

    def holds(self, facts: Facts) -> bool:
        return any(glob.matches(facts.site.role) for glob in self.globs)

    def value(self, facts: Facts) -> str:
        return facts.site.role


def site_names(site: Site) -> tuple[str, ...]:
    """The path and the same under each further name of the parameter (a tied weight has several), the path first."""
    base = _stem(site.const.path)
    suffix = site.path[len(base) :] if site.path.startswith(base) else None
    aliases = () if suffix is None else tuple(_stem(name) + suffix for name in site.const.names)
    return tuple(dict.fromkeys((site.path, *aliases)))


def _stem(name: str) -> str:
    return name.removesuffix(".weight")


@dataclass(frozen=True, slots=True, eq=False)
class PathCondition(Condition):
    """Any of the site's names matches one of the globs or regular expressions."""

    patterns: tuple[Glob | re.Pattern[str], ...]

    def holds(self, facts: Facts) -> bool:
        return any(path_matches(pattern, name) for pattern in self.patterns for name in site_names(facts.site))

    def value(self, facts: Facts) -> str:
        return " = ".join(site_names(facts.site))


def path_matches(pattern: Glob | re.Pattern[str], name: str) -> bool:
    """Whether the whole name matches."""
    return pattern.matches(name) if isinstance(pattern, Glob) else pattern.fullmatch(name) is not None


@dataclass(frozen=True, slots=True, eq=False)
class LayerCondition(Condition):
    sets: tuple[Layers, ...]

    def holds(self, facts: Facts) -> bool:
        layer = facts.site.layer
        return layer is not None and any(chosen.holds(layer, facts.layers) for chosen in self.sets)

    def value(self, facts: Facts) -> str:
        return "no layer" if facts.site.layer is None else f"layer {facts.site.layer} of {facts.layers}"


def op_matches(name: str, site: Site) -> bool:
    """Whether `op: name` holds for the site; a table that a head is tied to is both a matmul and an embedding."""
    if name == "matmul":
        return site.form != "embedding"
    return site.form == name or (name == "embedding" and bool(site.gathers))


@dataclass(frozen=True, slots=True, eq=False)
class OpCondition(Condition):
    ops: tuple[str, ...]

    def holds(self, facts: Facts) -> bool:
        return any(op_matches(name, facts.site) for name in self.ops)

    def value(self, facts: Facts) -> str:
        site = facts.site
        return f"{site.form}, also an embedding" if site.gathers and site.form != "embedding" else site.form


NUMBERS: Mapping[str, Callable[[Site], int]] = {
    "in_features": lambda site: site.in_features,
    "out_features": lambda site: site.out_features,
    "params": lambda site: site.parameters,
}


@dataclass(frozen=True, slots=True, eq=False)
class NumberCondition(Condition):
    """All comparisons hold for in_features, out_features or params."""

    comparisons: tuple[Comparison, ...]

    def holds(self, facts: Facts) -> bool:
        return all(comparison.holds(NUMBERS[self.key](facts.site)) for comparison in self.comparisons)

    def value(self, facts: Facts) -> str:
        return f"{NUMBERS[self.key](facts.site):,}"


@dataclass(frozen=True, slots=True, eq=False)
class StatisticCondition(Condition):
    """All comparisons hold for a statistic of the weight: the only conditions that read weights."""

    comparisons: tuple[Comparison, ...]

    def _read(self, facts: Facts) -> float:
        number = facts.statistic(self.key, facts.site)
        if number is None:
            message = f"{self.key} reads the weight of {facts.site.path}, and this model is on the meta device"
            raise SpecError(message, at=self.at, keypath=self.keypath)
        return number

    def holds(self, facts: Facts) -> bool:
        number = self._read(facts)
        return all(comparison.holds(number) for comparison in self.comparisons)

    def value(self, facts: Facts) -> str:
        return f"{self._read(facts):.4g}"


@dataclass(frozen=True, slots=True, eq=False)
class SharedCondition(Condition):
    """Whether the weight is used more than once (applications and gathers together) or goes by more than one name (tied)."""

    wanted: bool

    def holds(self, facts: Facts) -> bool:
        site = facts.site
        shared = len(site.applications) + len(site.gathers) > 1 or len(site.const.names) > 1
        return shared == self.wanted

    def value(self, facts: Facts) -> str:
        site = facts.site
        counts = {"application": len(site.applications), "gather": len(site.gathers), "name": len(site.const.names)}
        return ", ".join(f"{count} {word}{'s' * (count > 1)}" for word, count in counts.items() if count)


@dataclass(frozen=True, slots=True, eq=False)
class InsertedByCondition(Condition):
    rules: tuple[str, ...]

    def holds(self, facts: Facts) -> bool:
        return facts.site.const.rule in self.rules

    def value(self, facts: Facts) -> str:
        return f"inserted by {facts.site.const.rule}" if facts.site.const.rule else "of the source model"


@dataclass(frozen=True, slots=True, eq=False)
class BlockCondition(Condition):
    """The site is part of an attention or MLP block, whether or not that can be pruned."""

    kinds: tuple[str, ...]

    def holds(self, facts: Facts) -> bool:
        return facts.block(facts.site) in self.kinds

    def value(self, facts: Facts) -> str:
        return facts.block(facts.site) or "in no block"


@dataclass(frozen=True, slots=True, eq=False)
class PatternCondition(Condition):
    """The site is one that an occurrence of the pattern claims."""

    pattern: Pattern
    claim: tuple[str, ...]

    def claiming(self, facts: Facts) -> tuple[Occurrence, ...]:
        """The occurrences that claim the site."""
        found = facts.occurrences(self.pattern)
        return tuple(occurrence for occurrence in found if any(occurrence.captures[name] is facts.site for name in self.claim))

    def holds(self, facts: Facts) -> bool:
        return bool(self.claiming(facts))

    def value(self, facts: Facts) -> str:
        found = facts.occurrences(self.pattern)
        names = {name for occurrence in found for name, captured in occurrence.captures.items() if captured is facts.site}
        shown = ", ".join(name for name in self.pattern.captures if name in names)
        total = f"{len(found)} occurrence{'s' * (len(found) != 1)}"
        if not names:
            return f"in none of the pattern's {total}"
        return f"captured as {shown}" if names & set(self.claim) else f"captured as {shown}, which is not claimed"


@dataclass(frozen=True, slots=True, eq=False)
class NoTableCondition(Condition):
    """Implied where a match names no `op`: pure embedding tables stay out."""

    def holds(self, facts: Facts) -> bool:
        return facts.site.form != "embedding"

    def value(self, facts: Facts) -> str:
        return facts.site.form


@dataclass(frozen=True, slots=True, eq=False)
class NotInsertedCondition(Condition):
    """Implied where a match names no `inserted_by`: matmuls that a rule made stay out."""

    def holds(self, facts: Facts) -> bool:
        return facts.site.const.rule is None

    def value(self, facts: Facts) -> str:
        return f"inserted by {facts.site.const.rule}" if facts.site.const.rule else "of the source model"


@dataclass(frozen=True, slots=True, eq=False)
class NotCondition(Condition):
    child: Condition

    def holds(self, facts: Facts) -> bool:
        return not self.child.holds(facts)

    def value(self, facts: Facts) -> str:
        return self.child.value(facts)


@dataclass(frozen=True, slots=True, eq=False)
class GroupCondition(Condition):
    """Several conditions: all must hold, or any of them (`conjunctive` False)."""

    children: tuple[Condition, ...] = field(repr=False)
    conjunctive: bool = True

    def holds(self, facts: Facts) -> bool:
        return (all if self.conjunctive else any)(child.holds(facts) for child in self.children)

    def value(self, facts: Facts) -> str:
        return ", ".join(child.value(facts) for child in self.children)
