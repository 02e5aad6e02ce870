"""The keys of a `match`, in the order in which people are shown them. A condition is its own file and its line here."""

from __future__ import annotations

from collections.abc import Mapping

from matmorph.specs.conditions.base import Clause
from matmorph.specs.conditions.block import BlockCondition
from matmorph.specs.conditions.inserted_by import InsertedByCondition
from matmorph.specs.conditions.layer import LayerCondition
from matmorph.specs.conditions.nesting import AllClause, AnyClause, NotClause, UseClause
from matmorph.specs.conditions.op import OpCondition
from matmorph.specs.conditions.path import PathCondition
from matmorph.specs.conditions.pattern import PatternCondition
from matmorph.specs.conditions.role import RoleCondition
from matmorph.specs.conditions.shape import InFeaturesCondition, OutFeaturesCondition, ParamsCondition
from matmorph.specs.conditions.shared import SharedCondition
from matmorph.specs.conditions.stack import StackCondition
from matmorph.specs.conditions.statistics import EffectiveRankCondition, OutlierRatioCondition

_ENTRIES: tuple[type[Clause], ...] = (
    RoleCondition,
    PathCondition,
    LayerCondition,
    StackCondition,
    OpCondition,
    BlockCondition,
    InFeaturesCondition,
    OutFeaturesCondition,
    ParamsCondition,
    SharedCondition,
    InsertedByCondition,
    PatternCondition,
    UseClause,
    NotClause,
    AnyClause,
    AllClause,
    EffectiveRankCondition,
    OutlierRatioCondition,
)

CONDITIONS: Mapping[str, type[Clause]] = {entry.key: entry for entry in _ENTRIES}
