"""Which rows of a batch are tokens and which are padding, by the model's `attention_mask` input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from matmorph.ir.cache import find_slots
from matmorph.ir.core import Graph, Value
from matmorph.ir.types import Dim, as_dim
from matmorph.ir.without_cache import MASK


@dataclass(frozen=True, slots=True, eq=False)
class TokenMask:
    """`value`: the input; `axes`: of the rows that it speaks of. With a cache it shows what came before too, and its last columns are the
    rows of this call."""

    value: Value
    axes: tuple[Dim, ...]


def token_mask(graph: Graph) -> TokenMask | None:
    """None where no input has the name."""
    mask = next((entry.value for entry in graph.signature.inputs if entry.name == MASK and entry.value is not None), None)
    if mask is None:
        return None
    axes = mask.tensor.shape
    behind = [slot for slot in find_slots(graph)[:1] if axes and axes[-1] == slot.total]  # the mask of an encoder shows what that reads
    return TokenMask(mask, (*axes[:-1], as_dim(axes[-1] - behind[0].before)) if behind else axes)


def of_rows(mask: Tensor, rows: int) -> Tensor:
    """What a mask says of the `rows` of this call, all samples together."""
    return mask[..., mask.shape[-1] - rows // max(mask[..., 0].numel(), 1) :] if mask.dim() else mask
