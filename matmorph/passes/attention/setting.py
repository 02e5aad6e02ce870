"""What the proofs of one graph share: its axes, the inputs that say which tokens there are, and tensors of any size for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from matmorph.ir.cache import Slot
from matmorph.ir.core import Graph, Value
from matmorph.ir.sites.attention_masks import attention_masks
from matmorph.ir.types import Dim


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """`batch`, `length`, `before`: symbols of rows, new tokens and tokens of the past. `mask`: the input [batch, before + length] that is
    0 for a pad."""

    batch: sympy.Symbol
    length: sympy.Symbol
    before: sympy.Symbol
    mask: Value

    @property
    def rows(self) -> tuple[Dim, Dim]:
        """The shape of an input with a number per new token."""
        return (self.batch, self.length)

    def sizes(self, batch: int, length: int, before: int) -> Mapping[str, int]:
        return {str(self.batch): batch, str(self.length): length, str(self.before): before}


def find_setting(graph: Graph, slot: Slot) -> Setting | str:
    """Of the graph that the slot belongs to, or why it has none."""
    axes = slot.past.tensor.shape[0], slot.new.tensor.shape[slot.axis], slot.before
    if not all(isinstance(axis, sympy.Symbol) for axis in axes) or set(graph.symbols()) != set(map(str, axes)):
        return "its axes are not a batch, new tokens and a past"
    masks = [value for value in attention_masks(graph) if value.tensor.shape == (axes[0], slot.total)]
    if len(masks) != 1:
        return (
            f"{len(masks) or 'no'} inputs say which tokens are pads, where one should" if masks else "no input says which tokens are pads"
        )
    return Setting(*axes, masks[0])


def masks_of(setting: Setting, batch: int, total: int) -> Iterator[Tensor]:
    """Masks of every kind: nothing padded, pads on the left, on the right, anywhere. Some token of each row is there."""
    kind = setting.mask.tensor.torch_dtype
    whole = torch.ones(batch, total, dtype=torch.int64)
    yield whole.to(kind)
    if total < 2:
        return
    places, widths = torch.arange(total), torch.arange(batch)[:, None] % total
    yield (places >= widths).to(kind)
    yield (places < total - widths).to(kind)
    drawn = torch.rand(batch, total, generator=torch.Generator().manual_seed(total)) < 0.6
    drawn[:, -1] = True
    yield drawn.to(kind)
