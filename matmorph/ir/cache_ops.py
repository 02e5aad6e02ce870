"""A key/value cache in codes: an operator of the torch library `matmorph`, registered when this module is imported.

Each token of each head has a scale of its own, s = max |x| / 127, and is kept as the integers round(x / s), so that s / 2 is the largest
error of a number. What is appended is never scaled anew. A call sees the tokens that it brings as they are: their error begins when they
come back as the past.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from matmorph.runtime.format.cache import LEVELS

_LIBRARY = torch.ops.matmorph
CODED = "matmorph.append_codes.default"
CODED_SLOTS = ((0, 1), (1, 2))
"""For codes and for scales: where the past is among the arguments, the present among the results."""

Appended = tuple[Tensor, Tensor, Tensor]


def coded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [.., D] as int8 codes of its shape and scales [.., 1] in its type."""
    scales = (x.abs().amax(-1, keepdim=True) / LEVELS).clamp(min=torch.finfo(x.dtype).tiny)
    return (x * scales.float().reciprocal()).round().clamp(-LEVELS, LEVELS).to(torch.int8), scales


def _append(codes: Tensor, scales: Tensor, new: Tensor, axis: int) -> Appended:
    """(the past as numbers; codes and scales of the past and the new tokens, one after the other along `axis`). codes int8 [.., D], scales
    [.., 1], new [.., D] with its own length along `axis`."""
    more, their = coded(new)
    return codes.to(new.dtype) * scales, torch.cat([codes, more], axis), torch.cat([scales, their], axis)


def _append_types(codes: Tensor, scales: Tensor, new: Tensor, axis: int) -> Appended:
    def longer(past: Tensor) -> Tensor:
        return past.new_empty([size + new.shape[axis] if k == axis else size for k, size in enumerate(past.shape)])

    return new.new_empty(codes.shape), longer(codes), longer(scales)


def _register() -> None:
    """Once per process: replacing an operator would leave those who hold it with a dangling one."""
    if not hasattr(_LIBRARY, "append_codes"):
        custom_op("matmorph::append_codes", _append, mutates_args=()).register_fake(_append_types)


_register()
