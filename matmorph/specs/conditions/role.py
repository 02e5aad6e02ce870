"""`role`: what a matmul is in its layer, found from the dataflow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from matmorph.errors import did_you_mean
from matmorph.specs.conditions.base import Condition, SelectionContext
from matmorph.specs.conditions.values import TEXT, OneOrMore, as_glob
from matmorph.specs.globs import Glob
from matmorph.specs.kinds import Kind
from matmorph.specs.tree import Scalar

if TYPE_CHECKING:
    from matmorph.ir.site import Site


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


def _as_roles(item: Scalar) -> Glob:
    glob = as_glob(item)
    for alternative in glob.alternatives:
        one = Glob(alternative)
        if not any(map(one.matches, ROLES)):
            raise item.error(f"{alternative!r} matches no role{_near_role(alternative)}")
    return glob


def _near_role(text: str) -> str:
    """The nearest role: by its last component, by its first (as a glob), else by spelling; all of them where none is near."""
    last = [role for role in ROLES if "." in role and role.endswith(f".{text}")]
    families = dict.fromkeys(role.split(".")[0] for role in ROLES if "." in role)
    if last:
        return f"; did you mean {last[0]}?"
    if text in families:
        return f"; did you mean {text}.*?"
    return did_you_mean(text, [*ROLES, *(f"{family}.*" for family in families)]) or f"; roles: {', '.join(ROLES)}"


@dataclass(frozen=True, slots=True, eq=False)
class RoleCondition(Condition):
    key: ClassVar[str] = "role"
    doc: ClassVar[str] = "role by dataflow: a glob, a quoted brace form, or a list"
    kind: ClassVar[Kind] = OneOrMore("a role", {"anyOf": [{"enum": list(ROLES)}, TEXT]}, _as_roles)
    about: ClassVar[str] = f"Roles, found from the dataflow: {', '.join(f'`{role}`' for role in ROLES)}."
    notation: ClassVar[str] = "Globs"

    value: tuple[Glob, ...]

    def test(self, site: Site, context: SelectionContext) -> bool:
        return any(glob.matches(site.role) for glob in self.value)

    def found(self, site: Site, context: SelectionContext) -> str:
        return site.role

    def nearby(self, sites: Sequence[Site], context: SelectionContext) -> str:
        return f"roles here: {', '.join(dict.fromkeys(site.role for site in sites))}"
