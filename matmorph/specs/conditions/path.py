"""`path`: the dotted path of the weight, by globs and regular expressions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, ClassVar

from matmorph.errors import SpecError
from matmorph.specs.conditions.base import Condition, SelectionContext
from matmorph.specs.conditions.values import TEXT, OneOrMore, as_glob
from matmorph.specs.expressions import Expression, ExpressionError
from matmorph.specs.globs import Glob
from matmorph.specs.kinds import Kind
from matmorph.specs.tree import Scalar

if TYPE_CHECKING:
    from matmorph.ir.site import Site


NEAREST = 3
LONGEST = 200
"""Characters that are compared: the time grows with their square."""


def site_names(site: Site) -> tuple[str, ...]:
    """The path and the same under each further name of the parameter (a tied weight has several), the path first."""
    base = _stem(site.const.path)
    suffix = site.path[len(base) :] if site.path.startswith(base) else None
    aliases = () if suffix is None else tuple(_stem(name) + suffix for name in site.const.names)
    return tuple(dict.fromkeys((site.path, *aliases)))


def _stem(name: str) -> str:
    return name.removesuffix(".weight")


def nearest_paths(text: str, paths: Sequence[str]) -> list[str]:
    """The paths that read most like `text`, the best first."""
    matcher = SequenceMatcher(b=text[:LONGEST], autojunk=False)
    ranked = []
    for index, path in enumerate(paths):
        matcher.set_seq1(path)
        ranked.append((-matcher.ratio(), index, path))
    return [path for _, _, path in sorted(ranked)[:NEAREST]]


def _as_paths(item: Scalar) -> Glob | Expression:
    if not item.text.startswith("re:"):
        return as_glob(item)
    try:
        return Expression(item.text.removeprefix("re:"))
    except ExpressionError as error:
        at = item.place(len("re:") + error.offset)
        raise SpecError(f"not a regular expression: {error}", at=at, keypath=item.keypath) from None


@dataclass(frozen=True, slots=True, eq=False)
class PathCondition(Condition):
    """Any of the site's names matches one of the globs or regular expressions as a whole."""

    key: ClassVar[str] = "path"
    doc: ClassVar[str] = 'dotted path of the weight: a glob (** crosses dots) or "re:..."'
    kind: ClassVar[Kind] = OneOrMore('a path ("encoder.**.dense" or "re:...")', TEXT, _as_paths)
    notation: ClassVar[str] = "Globs"

    value: tuple[Glob | Expression, ...]

    def test(self, site: Site, context: SelectionContext) -> bool:
        return any(_matches(pattern, site) for pattern in self.value)

    def found(self, site: Site, context: SelectionContext) -> str:
        return " = ".join(site_names(site))

    def nearby(self, sites: Sequence[Site], context: SelectionContext) -> str:
        first = self.value[0]
        text = first.alternatives[0] if isinstance(first, Glob) else first.pattern
        return f"nearest paths: {', '.join(nearest_paths(text, [site.path for site in sites]))}"

    def unmatched(self, sites: Sequence[Site]) -> tuple[str, ...]:
        alternatives = self._alternatives()
        dead = tuple(text for text, pattern in alternatives if not any(_matches(pattern, site) for site in sites))
        return dead if len(dead) < len(alternatives) else ()

    def _alternatives(self) -> list[tuple[str, Glob | Expression]]:
        """Each brace-free glob and each regular expression, with its text."""
        found: list[tuple[str, Glob | Expression]] = []
        for pattern in self.value:
            if isinstance(pattern, Glob):
                found += [(text, Glob(text)) for text in pattern.alternatives]
            else:
                found.append((f"re:{pattern.pattern}", pattern))
        return found


def _matches(pattern: Glob | Expression, site: Site) -> bool:
    names = site_names(site)
    return any(pattern.matches(name) for name in names)
