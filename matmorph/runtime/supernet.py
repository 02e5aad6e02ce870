"""A supernet's choices on the side of the Trainer: a configuration as gates, as a mask over theta, as a number of parameters, as values.

The parameters of all choices are one set (GLoRA, arXiv 2306.07967, section 3.3): `lora` is both factors, `vector` the first column of the
larger one, `scalar` its first entry. A configuration says for each site what each of the tensors A to E is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from matmorph.runtime.errors import InputMismatch, nearest
from matmorph.runtime.feeds import Array
from matmorph.runtime.format.training import GATES, TrainManifest

NONE = "none"
_NO_SUPERNET = "configuration: these training graphs are of no supernet (no rule said glora: {search: true})"

Configuration: TypeAlias = tuple[tuple[str, ...], ...]
"""A word per tensor, per site; both in the order of the supernet."""
Named: TypeAlias = Mapping[str, Mapping[str, str]]
"""The same by site and tensor: {"layer.0.fc": {"A": "lora", "E": "vector"}}; what is not named is none, or the only word there is."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A parameter: `offset` of its first number in theta."""

    name: str
    offset: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def of(self, vector: Array) -> Array:
        """The parameter within a flat vector, as columns [n, m]: a view."""
        return vector[self.offset : self.offset + self.size].reshape(self.shape[0], -1)


@dataclass(frozen=True, slots=True)
class Tensor:
    """What one of A to E may be, and its parameters: `up` [n, rank] or [n], and `down` where it may be lora. Both None: only none."""

    name: str
    words: tuple[str, ...]
    up: Piece | None
    down: Piece | None

    def unnamed(self, site: str) -> str:
        """What it is where a configuration does not say. Raises InputMismatch where it must."""
        if len(self.words) > 1 and NONE not in self.words:
            raise InputMismatch(f"configuration: {self.name} of {site} must be named: one of {', '.join(self.words)}")
        return self.words[0] if len(self.words) == 1 else NONE

    def count(self, word: str) -> int:
        """Parameters that it has as `word`."""
        if word == NONE or self.up is None:
            return 0
        return {"lora": self.up.size + (self.down.size if self.down else 0), "vector": self.up.shape[0], "scalar": 1}[word]

    def open(self, mask: Array, word: str) -> None:
        """Sets the mask to 1 where the parameters of `word` lie."""
        if word == NONE or self.up is None:
            return
        up = self.up.of(mask)
        if word == "lora":
            up[...] = 1
            if self.down is not None:
                self.down.of(mask)[...] = 1
        else:
            up[:, :1][: None if word == "vector" else 1] = 1

    def values(self, given: Mapping[str, Array], word: str) -> dict[str, Array]:
        """The numbers of `word` under the names that they have in a model of this one configuration."""
        if word == NONE or self.up is None:
            return {}
        up = np.asarray(given[self.up.name])
        if word == "lora":
            return {self.up.name: up, **({self.down.name: np.asarray(given[self.down.name])} if self.down else {})}
        column = up.reshape(up.shape[0], -1)[:, 0]
        return {self.up.name.rpartition(".")[0] + f".{self.name}": np.array(column if word == "vector" else column[:1])}


@dataclass(frozen=True, slots=True)
class SearchSite:
    """A layer of the supernet."""

    path: str
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Supernet:
    """`sites`: in the order of the rows of the gates; `columns`: (tensor, word) of each column."""

    columns: tuple[tuple[str, str], ...]
    sites: tuple[SearchSite, ...]

    def gates(self, configuration: Configuration) -> Array:
        """float32 [sites, columns], a one in each tensor's columns."""
        rows = np.zeros((len(self.sites), len(self.columns)), np.float32)
        for row, site, words in zip(rows, self.sites, configuration, strict=True):
            for tensor, word in zip(site.tensors, words, strict=True):
                row[self.columns.index((tensor.name, word))] = 1
        return rows

    def mask(self, configuration: Configuration, length: int) -> Array:
        """float32 [length]: 0 for parameters of the supernet that the configuration does not use, 1 for all others."""
        mask = np.ones(length, np.float32)
        for site in self.sites:
            for piece in (piece for tensor in site.tensors for piece in (tensor.up, tensor.down) if piece is not None):
                mask[piece.offset : piece.offset + piece.size] = 0
        for site, words in zip(self.sites, configuration, strict=True):
            for tensor, word in zip(site.tensors, words, strict=True):
                tensor.open(mask, word)
        return mask

    def count(self, configuration: Configuration) -> int:
        """Parameters of the supernet that the configuration uses."""
        pairs = zip(self.sites, configuration, strict=True)
        return sum(tensor.count(word) for site, words in pairs for tensor, word in zip(site.tensors, words, strict=True))

    def limits(self) -> tuple[int, int]:
        """The smallest and the largest count of any configuration."""
        counts = [[tensor.count(word) for word in tensor.words] for site in self.sites for tensor in site.tensors]
        return sum(map(min, counts)), sum(map(max, counts))

    @property
    def size(self) -> int:
        """How many configurations there are."""
        return math.prod(len(tensor.words) for site in self.sites for tensor in site.tensors)

    def sample(self, generator: np.random.Generator) -> Configuration:
        """Each tensor of each site on its own, its words equally likely."""
        return tuple(tuple(tensor.words[generator.integers(len(tensor.words))] for tensor in site.tensors) for site in self.sites)

    def values(self, given: Mapping[str, Array], configuration: Configuration) -> dict[str, Array]:
        """`given` (all parameters by name) as a model of this one configuration has them; those outside of the supernet as they are."""
        pieces = [piece.name for site in self.sites for tensor in site.tensors for piece in (tensor.up, tensor.down) if piece is not None]
        found = {name: np.asarray(value) for name, value in given.items() if name not in set(pieces)}
        for site, words in zip(self.sites, configuration, strict=True):
            for tensor, word in zip(site.tensors, words, strict=True):
                found |= tensor.values(given, word)
        return found

    def named(self, configuration: Configuration) -> dict[str, dict[str, str]]:
        """By site and tensor, as files keep it."""
        pairs = zip(self.sites, configuration, strict=True)
        return {site.path: {tensor.name: word for tensor, word in zip(site.tensors, words, strict=True)} for site, words in pairs}

    def read(self, named: Named) -> Configuration:
        """Raises InputMismatch for a site, tensor or word that there is not, naming the nearest."""
        tensors = {site.path: {tensor.name: tensor.words for tensor in site.tensors} for site in self.sites}
        for path, words in named.items():
            if path not in tensors:
                raise InputMismatch(f"configuration: the supernet has no layer {path!r}{nearest(path, list(tensors))}")
            for name, word in words.items():
                if name not in tensors[path]:
                    raise InputMismatch(f"configuration: {path} has no tensor {name!r}; there are {', '.join(tensors[path])}")
                if word not in tensors[path][name]:
                    raise InputMismatch(
                        f"configuration: {name} of {path} cannot be {word!r}; it is one of {', '.join(tensors[path][name])}"
                    )
        return tuple(
            tuple(named.get(site.path, {}).get(tensor.name) or tensor.unnamed(site.path) for tensor in site.tensors) for site in self.sites
        )


class Chooser:
    """What each step of a Trainer feeds and updates: of a supernet a configuration per step, drawn from (seed, step); else nothing.

    `fixed`: the configuration of every step, None = drawn. `mask`: what may train at all, None = everything.
    """

    def __init__(self, supernet: Supernet | None, length: int, seed: int, fixed: Named | None, mask: Array | None) -> None:
        if seed < 0:
            raise InputMismatch(f"seed must be 0 or more, got {seed}")
        if fixed is not None and supernet is None:
            raise InputMismatch(_NO_SUPERNET)
        self.supernet, self._length, self._seed, self._mask = supernet, length, seed, mask
        self.fixed = None if fixed is None or supernet is None else supernet.read(fixed)

    def at(self, step: int) -> Configuration | None:
        """The configuration of update number `step`."""
        if self.supernet is None or self.fixed is not None:
            return self.fixed
        return self.supernet.sample(np.random.default_rng([self._seed, step]))

    def chosen(self, configuration: Named | Configuration | None) -> Configuration | None:
        """What to evaluate in: the one given, else the fixed one. Raises InputMismatch for what the supernet cannot be."""
        if configuration is None:
            return self.fixed
        if self.supernet is None:
            raise InputMismatch(_NO_SUPERNET)
        return self.supernet.read(configuration) if isinstance(configuration, Mapping) else configuration

    def feeds(self, configuration: Configuration | None) -> dict[str, Array]:
        """Further inputs of grad.onnx and eval.onnx. Raises InputMismatch where a supernet has no configuration."""
        if self.supernet is None:
            return {}
        if configuration is None:
            raise InputMismatch("a supernet is evaluated in one configuration: evaluate(..., configuration={site: {tensor: word}})")
        return {GATES: self.supernet.gates(configuration)}

    def mask(self, configuration: Configuration | None) -> Array | None:
        """Of this step alone; None = as ever."""
        if self.supernet is None or configuration is None:
            return None
        found = self.supernet.mask(configuration, self._length)
        return found if self._mask is None else found * self._mask


def supernet_of(manifest: TrainManifest) -> Supernet | None:
    """What a training folder searches, None where nothing is searched."""
    if manifest.supernet is None:
        return None
    pieces: dict[str | None, Piece] = {one.name: Piece(one.name, one.offset, one.shape) for one in manifest.parameters}
    sites = []
    for one in manifest.supernet.sites:
        tensors = [Tensor(name, told.words, pieces.get(told.up), pieces.get(told.down)) for name, told in one.tensors.items()]
        sites.append(SearchSite(one.site, tuple(tensors)))
    return Supernet(manifest.supernet.columns, tuple(sites))
