"""What a manifest says of a model's key/value cache: which inputs and outputs hold it, and how prompts are padded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Padding: TypeAlias = Literal["any", "right"]
"""On which side the rows of a batch may be padded: on both, as the mask says; or only behind their tokens."""


@dataclass(frozen=True, slots=True)
class CacheSlot:
    """One tensor of the cache: the input that holds what came before, the output that holds it with the new tokens behind, and the axis
    along which tokens lie."""

    past: str
    present: str
    axis: int


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """`share_buffer`: past and present may be one buffer of `max_length` tokens, written in place. `max_length`: tokens that the model has
    positions for, None = no limit of its own. `bytes_per_token`: of all slots, for one row."""

    slots: tuple[CacheSlot, ...]
    padding: Padding
    share_buffer: bool
    max_length: int | None
    bytes_per_token: int
