"""Hashes that tell whether weights are the ones something was made for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

from matmorph.ir.core import Const


def weights_sha256(consts: Iterable[Const]) -> str:
    """Name, type and bytes of each weight in order, one in memory at a time."""
    digest = hashlib.sha256()
    for const in consts:
        digest.update(f"{const.path} {const.type}\n".encode())
        data = const.load().detach().cpu().contiguous()
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data if data.numel() else b"")
    return digest.hexdigest()


def names_sha256(consts: Iterable[Const]) -> str:
    """Name and shape of each weight in order: two sets of values for the same places have one hash."""
    lines = (f"{const.path} {[int(dim) for dim in const.tensor.shape]}\n" for const in consts)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
