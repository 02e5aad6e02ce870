"""What the tests of supernets and their search share: a supernet written by hand, with consts of small sizes."""

from __future__ import annotations

import numpy as np

from matmorph.runtime.supernet import Configuration, Piece, SearchSite, Supernet, Tensor

WORDS = {
    "A": ("lora", "vector", "scalar", "none"),
    "B": ("lora", "vector", "scalar", "none"),
    "C": ("lora", "vector", "none"),
    "D": ("vector", "scalar", "none"),
    "E": ("vector", "scalar", "none"),
}
COLUMNS = tuple((tensor, word) for tensor, words in WORDS.items() for word in words)
OUT, IN, RANK = 5, 7, 2


def supernet(sites: int = 3, words: dict[str, tuple[str, ...]] = WORDS) -> tuple[Supernet, int]:
    """(the supernet, length of theta): layers of 5 outputs and 7 inputs, rank 2; behind them a head of 3 numbers."""
    sides = {"A": (OUT, IN), "B": (OUT, IN), "C": (IN, 1), "D": (OUT, None), "E": (OUT, None)}
    offset, found = 0, []
    for site in range(sites):
        tensors = []
        for name, (n, m) in sides.items():
            shapes = [(n,)] if m is None else [(n, RANK), (RANK, m)]
            pieces = []
            for part, shape in zip(("_up", "_down") if m else ("",), shapes, strict=True):
                pieces.append(Piece(f"layer.{site}.glora.{name}{part}", offset, shape))
                offset += int(np.prod(shape))
            tensors.append(Tensor(name, words[name], pieces[0], pieces[1] if m else None))
        found.append(SearchSite(f"layer.{site}", tuple(tensors)))
    return Supernet(COLUMNS, tuple(found)), offset + 3


def everywhere(net: Supernet, *words: str) -> Configuration:
    """The same five words at every site."""
    return tuple(words for _ in net.sites)
