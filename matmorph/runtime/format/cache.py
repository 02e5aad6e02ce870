"""What a manifest says of a model's key/value cache: which inputs and outputs hold it, and how prompts are padded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from matmorph.runtime.format.plain import stored

Padding: TypeAlias = Literal["any", "right"]
"""On which side the rows of a batch may be padded: on both, as the mask says; or only behind their tokens."""

LEVELS = 127
"""Codes of a cache go from -LEVELS to LEVELS: -128 has no counterpart."""


@dataclass(frozen=True, slots=True)
class CacheSlot:
    """One tensor of the cache: the input that holds what came before, the output that holds it with the new tokens behind, and the axis
    along which tokens lie. `scales`: of a slot of int8 codes, the past of the slot that holds what they are to be multiplied by."""

    past: str
    present: str
    axis: int
    scales: str | None = field(default=None, metadata=stored(omitted=True))


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """`share_buffer`: past and present may be one buffer of `max_length` tokens, written in place. `max_length`: tokens that the model has
    positions for, None = no limit of its own. `bytes_per_token`: of all slots, for one row."""

    slots: tuple[CacheSlot, ...]
    padding: Padding
    share_buffer: bool
    max_length: int | None
    bytes_per_token: int
