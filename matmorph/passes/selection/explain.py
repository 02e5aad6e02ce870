"""Why one matmul was selected or not: every rule of a stage, condition by condition."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from matmorph.errors import InputError
from matmorph.ir.core import Graph
from matmorph.ir.site import Site
from matmorph.passes.selection.context import context_of
from matmorph.passes.selection.survey import Survey
from matmorph.specs.conditions.base import Clause, Condition, SelectionContext
from matmorph.specs.conditions.nesting import GroupClause, NotClause
from matmorph.specs.conditions.path import nearest_paths, site_names

if TYPE_CHECKING:
    from matmorph.specs.schema import Rule, Stage


@dataclass(frozen=True, slots=True)
class ConditionRow:
    """`hit` None: not asked, since it reads the weight and something cheaper already fails. `depth`: nesting in not, any, all and use."""

    text: str
    at: str
    hit: bool | None
    value: str
    depth: int = 0


@dataclass(frozen=True, slots=True)
class RuleRow:
    """`matched`: whether the rule matches; `owns`: whether it is the first that does."""

    name: str
    at: str
    matched: bool
    owns: bool
    conditions: tuple[ConditionRow, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """One site and what each rule of the stage says of it. `owner`: the rule that owns it, None where none matches."""

    path: str
    role: str
    layer: int | None
    form: str
    shape: tuple[int, int]
    applications: int
    owner: str | None
    blocked: str | None
    rules: tuple[RuleRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return asdict(self)

    def lines(self) -> tuple[str, ...]:
        """The explanation as plain text."""
        return tuple(self._lines())

    def _lines(self) -> Iterator[str]:
        layer = "" if self.layer is None else f", layer {self.layer}"
        yield f"{self.path}: {self.form} {self.shape[1]} -> {self.shape[0]}, role {self.role}{layer}"
        yield f"owned by rule {self.owner}" if self.owner else "no rule matches"
        if self.blocked:
            yield f"no method may take it: {self.blocked}"
        for rule in self.rules:
            outcome = "owns it" if rule.owns else "matches, but an earlier rule owns it" if rule.matched else "does not match"
            yield f"rule {rule.name}{f' ({rule.at})' if rule.at else ''}: {outcome}"
            for row in rule.conditions:
                mark = {True: "yes", False: "no ", None: "?  "}[row.hit]
                yield f"  {mark} {'  ' * row.depth}{row.text}{f'  [{row.value}]' if row.value else ''}"


def explain(stage: Stage, graph: Graph, sites: Sequence[Site], path: str) -> Explanation:
    """Every rule of the stage and every condition for one site; `path` is any of its names, with or without ".weight".

    InputError: there is no such site (the nearest paths are named). SpecError: a statistic asked of a weight on the meta device.
    """
    site = find_site(sites, path)
    context = context_of(Survey.of(graph, sites))
    owner = next((rule for rule in stage.rules if rule.match.test(site, context)), None)
    rules = tuple(_rule_row(rule, site, context, rule is owner) for rule in stage.rules)
    shape = (site.out_features, site.in_features)
    name = owner.name if owner else None
    return Explanation(site.path, site.role, site.layer, site.form, shape, len(site.applications), name, site.blocked, rules)


def find_site(sites: Sequence[Site], path: str) -> Site:
    """The site of that name. InputError where there is none."""
    names: Mapping[str, Site] = {name: site for site in reversed(sites) for name in site_names(site)}
    found = names.get(path) or names.get(path.removesuffix(".weight"))
    if found is None:
        details = [f"nearest paths: {', '.join(nearest_paths(path, [site.path for site in sites]))}"] if sites else []
        raise InputError(f"the model has no matmul {path!r}", details)
    return found


def _rule_row(rule: Rule, site: Site, context: SelectionContext, owns: bool) -> RuleRow:
    failed = [condition for condition in rule.match.implied if not condition.test(site, context)]
    implied = tuple(_leaf_row(condition, site, context, 0, read=True) for condition in failed)
    open_so_far = not implied and rule.match.root.holds(site, context, read=False) is not False
    rows = [row for child in rule.match.root.children for row in _rows(child, site, context, 0, open_so_far)]
    matched = bool(rule.match.test(site, context))
    return RuleRow(rule.name, str(rule.at or ""), matched, owns, (*rows, *implied))


def _rows(clause: Clause, site: Site, context: SelectionContext, depth: int, read: bool) -> Iterator[ConditionRow]:
    """A row for the clause and, below it, one for each of its parts."""
    if isinstance(clause, Condition):
        yield _leaf_row(clause, site, context, depth, read)
        return
    yield ConditionRow(clause.text, str(clause.at or ""), clause.holds(site, context, read=read), "", depth)
    for part in _parts(clause):
        yield from _rows(part, site, context, depth + 1, read)


def _parts(clause: Clause) -> tuple[Clause, ...]:
    """The parts of what joins conditions; a mapping within it stands for its own parts, where that says the same."""
    if isinstance(clause, NotClause):
        return _parts(clause.child)
    if not isinstance(clause, GroupClause):
        return ()
    found: list[Clause] = []
    for child in clause.children:
        inner = () if child.key else _parts(child)
        found.extend(inner if inner and (clause.conjunctive or len(inner) == 1) else (child,))
    return tuple(found)


def _leaf_row(condition: Condition, site: Site, context: SelectionContext, depth: int, read: bool) -> ConditionRow:
    hit = condition.holds(site, context, read=read)
    found = "not read: a cheaper condition fails" if hit is None else condition.found(site, context)
    return ConditionRow(condition.text, str(condition.at or ""), hit, found, depth)
