"""A parsed `match:` of a rule: an immutable tree of conditions, and what it says of a site (`specs.selectors` reads it).

Mappings and `all` hold when all their parts do, `any` when one does; `use` stands for a named selection. Conditions that read weights are
asked last, and only where the others leave the answer open.

Two conditions are implied: a match that nowhere names `op` (outside a `not`) matches no pure embedding table, and one that nowhere names
`inserted_by` matches no matmul that a rule inserted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from matmorph.errors import Position
from matmorph.specs.conditions import Condition, Facts, GroupCondition, NotCondition, PatternCondition, StatisticCondition


def evaluate(condition: Condition, facts: Facts, *, read: bool = True) -> bool | None:
    """Whether the condition holds. `read` False never touches a weight: None then means that the weights decide.

    Three-valued (Kleene) logic: a group reads weights only while its cheap parts leave it open.
    """
    if isinstance(condition, NotCondition):
        inner = evaluate(condition.child, facts, read=read)
        return None if inner is None else not inner
    if isinstance(condition, GroupCondition):
        return _evaluate_group(condition, facts, read)
    if isinstance(condition, StatisticCondition) and not read:
        return None
    return condition.holds(facts)


def _evaluate_group(group: GroupCondition, facts: Facts, read: bool) -> bool | None:
    deciding = not group.conjunctive
    answers = [evaluate(child, facts, read=False) for child in group.children]
    if deciding in answers:
        return deciding
    if None not in answers:
        return group.conjunctive
    if not read:
        return None
    undecided = (child for child, answer in zip(group.children, answers, strict=True) if answer is None)
    return deciding if any(evaluate(child, facts) == deciding for child in undecided) else group.conjunctive


@dataclass(frozen=True, slots=True)
class Verdict:
    """`failed`: the conditions that should all hold (those of `use` and `all` one by one) and do not, in the order of the spec."""

    matched: bool
    failed: tuple[Condition, ...] = ()

    def __bool__(self) -> bool:
        return self.matched


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """A parsed `match`. `at` and `keypath` are those of the mapping, `root` its conditions, `implied` those that hold unless named."""

    at: Position | None
    keypath: str
    root: GroupCondition
    implied: tuple[Condition, ...]

    def test(self, facts: Facts) -> Verdict:
        """Whether the site matches, else every condition that fails; weights are read only where nothing cheaper fails."""
        implied = tuple(condition for condition in self.implied if not condition.holds(facts))
        matched = evaluate(self.root, facts, read=not implied)
        if matched and not implied:
            return Verdict(True)
        failed = tuple(condition for condition in self.conditions() if evaluate(condition, facts, read=False) is False)
        if matched is False and not failed:
            failed = tuple(condition for condition in self.conditions() if not evaluate(condition, facts))
        return Verdict(False, failed + implied)

    def conditions(self) -> tuple[Condition, ...]:
        """The conditions that must all hold, named selections and `all` opened up; the implied ones are not among them."""
        return tuple(_conjuncts(self.root))

    def patterns(self) -> tuple[PatternCondition, ...]:
        """The patterns that stand outside every `not`."""
        return tuple(leaf for leaf, positive in leaves(self.root) if positive and isinstance(leaf, PatternCondition))


def _conjuncts(condition: Condition) -> Iterator[Condition]:
    if isinstance(condition, GroupCondition) and condition.conjunctive:
        for child in condition.children:
            yield from _conjuncts(child)
    else:
        yield condition


def leaves(condition: Condition, positive: bool = True) -> Iterator[tuple[Condition, bool]]:
    """The single conditions of a tree in order, and whether each stands un-negated (under an even number of `not`)."""
    if isinstance(condition, NotCondition):
        yield from leaves(condition.child, not positive)
    elif isinstance(condition, GroupCondition):
        for child in condition.children:
            yield from leaves(child, positive)
    else:
        yield condition, positive


EVERYTHING = Match(None, "", GroupCondition(None, "", "", "", ()), ())
"""Of a rule that is made for a matmul which is chosen already."""
