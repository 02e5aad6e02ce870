"""One colour and one short code per method: the same method looks the same on every page.

Colours are classes of page.css (k0 .. k9, from the palette of Okabe and Ito, safe for colour-blind readers); the code says the same without
colour.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from matmorph.passes.methods import method_table
from matmorph.report.charts import TIMES
from matmorph.report.model import SiteRow
from matmorph.report.table import outcome

COLOURS = 10
_KEPT = {"kept": ("kept", "·"), "rejected": ("refused", TIMES)}


@dataclass(frozen=True, slots=True)
class Palette:
    """`kinds`: class of each outcome; `codes`: short name of a method."""

    kinds: Mapping[str, str]
    codes: Mapping[str, str]

    def kind(self, row: SiteRow) -> str:
        return self.kinds[outcome(row)]

    def code(self, row: SiteRow) -> str:
        name = outcome(row)
        return _KEPT[name][1] if name in _KEPT else self._code(name)

    def legend(self, rows: Sequence[SiteRow]) -> tuple[tuple[str, str, str, int], ...]:
        """(outcome, class, code, sites) in order of first appearance, what was left alone last."""
        counts: dict[str, int] = {}
        for row in rows:
            counts[outcome(row)] = counts.get(outcome(row), 0) + 1
        names = sorted(counts, key=lambda name: name in _KEPT)
        return tuple((name, self.kinds[name], _KEPT[name][1] if name in _KEPT else self._code(name), counts[name]) for name in names)

    def _code(self, name: str) -> str:
        parts = name.split(" + ")
        first = self.codes.get(parts[0], parts[0][:2].upper())
        return first if len(parts) == 1 else f"{first}+"


def palette(rows: Iterable[SiteRow]) -> Palette:
    """Our methods have colours of their own; others, and sums of several, take those that are free, in order of first appearance."""
    names = list(dict.fromkeys(outcome(row) for row in rows))
    methods = method_table()
    colours = {name: method.colour for name, method in methods.items() if method.colour is not None}
    taken = {name: f"k{colours[name]}" for name in names if name in colours}
    free = [f"k{number}" for number in range(COLOURS) if f"k{number}" not in taken.values()] or ["k0"]
    others = [name for name in names if name not in taken and name not in _KEPT]
    return Palette(
        {**{name: kind for name, (kind, _) in _KEPT.items()}, **taken, **{name: free[k % len(free)] for k, name in enumerate(others)}},
        {name: method.code for name, method in methods.items() if method.code is not None},
    )
