"""What a decoder's manifest says of the values that go round: which inputs take tokens, which hold the cache, how large it is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from matmorph.runtime.errors import ArtifactError, InputMismatch
from matmorph.runtime.format.artifact import Manifest, NamedDim, TensorInfo
from matmorph.runtime.format.cache import CacheInfo, CacheSlot

IDS, MASK, POSITIONS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of the cache. `past`, `present`: names; `shape`: with None where the rows are; `axis`: where tokens lie."""

    past: str
    present: str
    shape: tuple[int | None, ...]
    axis: int
    dtype: np.dtype[np.float64]

    def sized(self, rows: int, tokens: int) -> tuple[int, ...]:
        """The shape for so many rows and tokens."""
        return tuple(tokens if axis == self.axis else rows if size is None else size for axis, size in enumerate(self.shape))


@dataclass(frozen=True, slots=True)
class Decoder:
    """`slots`: in the manifest's order. `takes_mask`, `takes_positions`: whether there are such inputs. `vocabulary`: number of token ids,
    None where the file does not say. `ids`: the input that takes tokens."""

    cache: CacheInfo
    slots: tuple[Slot, ...]
    takes_mask: bool
    takes_positions: bool
    vocabulary: int | None
    ids: str = IDS

    def refuse_long(self, longest: int, width: int, new: int) -> None:
        """Raises InputMismatch for no new token, and for more than there are positions behind prompts of at most `longest` tokens, padded
        to `width`."""
        if new < 1:
            raise InputMismatch(f"max_new_tokens is {new}; it must be 1 or more")
        limit = self.cache.max_length
        if limit is not None and width + new > limit:
            raise InputMismatch(f"a prompt of {longest} tokens and {new} new ones are {longest + new}; the model has positions for {limit}")

    @classmethod
    def of(cls, manifest: Manifest, where: str, ids: str = IDS, beside: Collection[str] = ()) -> Decoder:
        """`ids`: the input that takes tokens; `beside`: inputs that somebody else gives. Raises ArtifactError for a model without a cache,
        and for inputs and outputs that do not go together."""
        cache = manifest.cache
        if cache is None:
            raise ArtifactError(f"{where}: the model keeps no key/value cache; compile it with one to generate with it")
        inputs, outputs = ({info.name: info for info in infos} for infos in (manifest.inputs, manifest.outputs))
        if ids not in inputs or LOGITS not in outputs:
            raise ArtifactError(f"{where}: a model that generates takes {ids} and gives {LOGITS}")
        unknown = inputs.keys() - {ids, MASK, POSITIONS, *beside, *(slot.past for slot in cache.slots)}
        if unknown:
            raise ArtifactError(f"{where}: the model takes {', '.join(sorted(unknown))} too, which generation has no value for")
        rows = inputs[ids].shape[0]
        slots = tuple(_slot(where, slot, rows, inputs, outputs) for slot in cache.slots)
        last = outputs[LOGITS].shape[-1]
        takes_mask, takes_positions = (name in inputs and name not in beside for name in (MASK, POSITIONS))
        return cls(cache, slots, takes_mask, takes_positions, last if isinstance(last, int) else None, ids)


def _slot(where: str, slot: CacheSlot, rows: NamedDim, inputs: dict[str, TensorInfo], outputs: dict[str, TensorInfo]) -> Slot:
    for name, known in ((slot.past, inputs), (slot.present, outputs)):
        if name not in known:
            raise ArtifactError(f"{where}: the cache's {name} is no {'input' if known is inputs else 'output'} of the model")
    past, present = inputs[slot.past], outputs[slot.present]
    if not 0 <= slot.axis < len(past.shape):
        raise ArtifactError(f"{where}: {past} has no axis {slot.axis}, along which the manifest says that tokens lie")
    if past.dtype != present.dtype or _fixed(past.shape, slot.axis, rows) != _fixed(present.shape, slot.axis, rows):
        raise ArtifactError(f"{where}: {present} cannot go where {past} came from")
    return Slot(slot.past, slot.present, _sizes(where, past, slot.axis, rows), slot.axis, np.dtype(past.dtype))


def _fixed(shape: Sequence[NamedDim], axis: int, rows: NamedDim) -> list[NamedDim | None]:
    return [None if number == axis or dim == rows else dim for number, dim in enumerate(shape)]


def _sizes(where: str, info: TensorInfo, axis: int, rows: NamedDim) -> tuple[int | None, ...]:
    sizes: list[int | None] = []
    for number, dim in enumerate(info.shape):
        if number != axis and dim != rows and not isinstance(dim, int):
            raise ArtifactError(f"{where}: {info} has a size {dim} that neither the rows nor the tokens give")
        sizes.append(None if number == axis or dim == rows else int(dim))
    return tuple(sizes)
