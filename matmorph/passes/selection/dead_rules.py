"""Errors of selection, with what a person needs to mend the spec: what exists nearby and which condition excludes the most sites."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

from matmorph.errors import SpecError
from matmorph.ir.core import Graph
from matmorph.ir.site import Site
from matmorph.specs.conditions import (
    NUMBERS,
    Condition,
    Facts,
    InsertedByCondition,
    LayerCondition,
    NumberCondition,
    OpCondition,
    PathCondition,
    PatternCondition,
    RoleCondition,
)
from matmorph.specs.globs import Glob
from matmorph.specs.pattern_match import operator_counts

if TYPE_CHECKING:
    from matmorph.specs.schema import Rule

MAX_LISTED = 20
NEAREST = 3


def dead_rule(rule: Rule, owners: Mapping[Site, Rule], facts: Mapping[Site, Facts], graph: Graph) -> SpecError:
    """The error of a rule that owns nothing: because earlier rules own all it matches, or because of its conditions."""
    expected = f" (expect is {rule.expect})" if rule.expect is not None else ""
    owned = [site for site in owners if rule.match.test(facts[site])]
    if owned:
        message = f"rule {rule.name} owns nothing{expected}: earlier rules own {_all(len(owned))} that it matches"
        return SpecError(message, at=rule.match.at, keypath=rule.match.keypath, details=_owned_lines(owned, owners))
    message = f"rule {rule.name} matches no matmul{expected}"
    return SpecError(message, at=rule.match.at, keypath=rule.match.keypath, details=[*_reasons(rule, facts, graph), *_quantised(graph)])


def _quantised(graph: Graph) -> list[str]:
    """Weights that an earlier stage put into codes: they are there, and no matmul of floats any more."""
    paths = [const.path.rsplit(".", 2)[0] for const in graph.state if const.rule is not None and const.path.endswith(".codes")]
    more = f" and {len(paths) - NEAREST} more" if len(paths) > NEAREST else ""
    return [f"quantised already by an earlier stage: {', '.join(paths[:NEAREST])}{more}"] if paths else []


def wrong_count(rule: Rule, taken: Sequence[Site], owners: Mapping[Site, Rule], facts: Mapping[Site, Facts]) -> SpecError:
    """The error of a rule that owns another number of sites than its `expect` says."""
    owned = [site for site in owners if rule.match.test(facts[site])]
    keypath = f"{rule.match.keypath.removesuffix('match')}expect"
    details = [*_listed([site.path for site in taken]), *_owned_lines(owned, owners)]
    return SpecError(f"rule {rule.name} owns {_sites(len(taken))}, expect is {rule.expect}", at=rule.at, keypath=keypath, details=details)


def nearest_paths(text: str, paths: Sequence[str]) -> list[str]:
    """The paths that read most like `text`, the best first."""
    matcher = SequenceMatcher(b=text, autojunk=False)
    ranked = []
    for index, path in enumerate(paths):
        matcher.set_seq1(path)
        ranked.append((-matcher.ratio(), index, path))
    return [path for _, _, path in sorted(ranked)[:NEAREST]]


def _owned_lines(owned: Sequence[Site], owners: Mapping[Site, Rule]) -> list[str]:
    counts = Counter(owners[site].name for site in owned)
    return [f"rule {name} already owns {_sites(count)} that it matches too" for name, count in counts.items()]


def _listed(lines: Sequence[str]) -> list[str]:
    more = [f"... and {len(lines) - MAX_LISTED} more"] if len(lines) > MAX_LISTED else []
    return [*lines[:MAX_LISTED], *more]


def _sites(count: int) -> str:
    return f"{count} site{'s' * (count != 1)}"


def _all(count: int) -> str:
    return "the only site" if count == 1 else f"all {count} sites"


# ------------------------------------------------------------------------------------------------------------------ reasons


def _reasons(rule: Rule, facts: Mapping[Site, Facts], graph: Graph) -> list[str]:
    """A line per condition that excludes sites, the one that excludes the most first, each with what there is instead."""
    if not facts:
        return ["the model has no weight matmul"]
    failed = Counter(condition for one in facts.values() for condition in rule.match.test(one).failed)
    in_spec_order = [condition for condition in (*rule.match.conditions(), *rule.match.implied) if condition in failed]
    lines = []
    for condition in sorted(in_spec_order, key=failed.__getitem__, reverse=True):
        count = failed[condition]
        hint = _hint(condition, facts, graph)
        lines.append(f"{condition.text}: excludes {count} of {_sites(len(facts))}{f'; {hint}' if hint else ''}")
    if max(failed.values(), default=0) < len(facts):
        lines.append("each condition holds for some site, but never all of them for the same one")
    return lines


def _hint(condition: Condition, facts: Mapping[Site, Facts], graph: Graph) -> str:
    """What the model has where the condition looks."""
    sites = list(facts)
    if isinstance(condition, RoleCondition):
        return f"roles here: {', '.join(dict.fromkeys(site.role for site in sites))}"
    if isinstance(condition, PathCondition):
        return f"nearest paths: {', '.join(_nearest(condition, [site.path for site in sites]))}"
    if isinstance(condition, LayerCondition):
        layers = sorted({site.layer for site in sites if site.layer is not None})
        return f"layers here: {layers[0]}..{layers[-1]}" if layers else "no site lies in a numbered layer"
    if isinstance(condition, OpCondition):
        return f"ops here: {', '.join(dict.fromkeys(site.form for site in sites))}"
    if isinstance(condition, NumberCondition):
        values = [NUMBERS[condition.key](site) for site in sites]
        return f"here from {min(values):,} to {max(values):,}"
    if isinstance(condition, InsertedByCondition):
        rules = dict.fromkeys(site.const.rule for site in sites if site.const.rule)
        return f"matmuls here were inserted by: {', '.join(rules)}" if rules else "no rule has inserted a matmul so far"
    if isinstance(condition, PatternCondition):
        return _pattern_hint(condition, facts, graph)
    return ""


def _nearest(condition: PathCondition, paths: Sequence[str]) -> list[str]:
    texts = [pattern.alternatives[0] if isinstance(pattern, Glob) else pattern.pattern for pattern in condition.patterns]
    return nearest_paths(texts[0], paths)


def _pattern_hint(condition: PatternCondition, facts: Mapping[Site, Facts], graph: Graph) -> str:
    found = next(iter(facts.values())).occurrences(condition.pattern)
    if found:
        return f"found {len(found)} times"
    counts = operator_counts(condition.pattern, graph, list(facts))
    return f"found nowhere; the graph has {', '.join(f'{count} {op}' for op, count in counts.items())}"
