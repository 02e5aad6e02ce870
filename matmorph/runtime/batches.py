"""Batches for the Trainer, from arrays or files: seeded shuffling that depends on nothing but seed and epoch, so that it resumes exactly.

A loader is any iterable of dicts of numpy arrays. One with `epoch(number, start)` is asked for each epoch's batches from the `start`-th on;
of any other the first ones are read and dropped when training resumes in the middle of an epoch.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import safetensors
import safetensors.numpy

from matmorph.runtime.errors import InputMismatch
from matmorph.runtime.feeds import Array

Batch = Mapping[str, Array]


@runtime_checkable
class EpochLoader(Protocol):
    """A loader that knows its epochs."""

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch `number` (from 0) from the `start`-th on."""
        ...


Loader = Iterable[Batch] | EpochLoader


class Batches:
    """Arrays by name, rows first, cut into batches of `batch_size` rows.

    `shuffle`: the order of epoch e is drawn from (seed, e). `drop_last`: leave a last smaller batch out. `part` (k, parts): of every batch
    the rows k, k + parts, ... only, so that the processes of a data-parallel run share each batch. `transform`: applied to each batch, for
    instance `trim_padding`. Iterating gives epoch 0. Raises InputMismatch for arrays of different lengths, none, and for sizes that
    do not work.
    """

    def __init__(
        self,
        arrays: Batch,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        part: tuple[int, int] = (0, 1),
        transform: Callable[[Batch], Batch] | None = None,
    ) -> None:
        self._arrays = {name: np.asarray(array) for name, array in arrays.items()}
        self._rows = _rows(self._arrays)
        if batch_size < 1:
            raise InputMismatch(f"batch_size must be 1 or more, got {batch_size}")
        if not 0 <= part[0] < part[1]:
            raise InputMismatch(f"part must be (k, parts) with 0 <= k < parts, got {part}")
        self._size, self._shuffle, self._seed, self._part, self._transform = batch_size, shuffle, seed, part, transform
        whole, rest = divmod(self._rows, batch_size)
        self._count = whole if drop_last or not rest else whole + 1
        if not self._count:
            raise InputMismatch(f"{self._rows} rows make no batch of {batch_size}: drop_last leaves nothing")
        smallest = rest if self._count > whole else batch_size
        if smallest < part[1]:
            raise InputMismatch(f"a batch of {smallest} rows cannot be shared by {part[1]} parts; use a larger batch_size, or drop_last")

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._count

    @property
    def arrays(self) -> Batch:
        """All that there is, by name, in the order in which it was given."""
        return self._arrays

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch `number` from the `start`-th on."""
        generator = np.random.default_rng([self._seed, number])
        order = generator.permutation(self._rows) if self._shuffle else np.arange(self._rows)
        which, parts = self._part
        for index in range(start, self._count):
            rows = order[index * self._size : (index + 1) * self._size][which::parts]
            batch: Batch = {name: array[rows] for name, array in self._arrays.items()}
            yield self._transform(batch) if self._transform else batch


def load_batches(path: str | os.PathLike[str], batch_size: int, **how: Any) -> Batches:
    """`Batches` of the arrays in a .npz or .safetensors file, by their names there.

    Raises InputMismatch for a file that is not there or not of these kinds, and what `Batches` raises.
    """
    file = Path(path)
    read = _READERS.get(file.suffix)
    if read is None:
        raise InputMismatch(f"{file}: expected a file that ends in {' or '.join(_READERS)}")
    if not file.is_file():
        raise InputMismatch(f"{file}: no such file")
    try:
        arrays = read(file)
    except Exception as error:  # zip, header, pickle and value errors alike: the file is not what its name says
        raise InputMismatch(f"{file}: cannot be read: {error}") from error
    try:
        return Batches(arrays, batch_size, **how)
    except InputMismatch as error:
        raise InputMismatch(f"{file}: {error}") from error


def trim_padding(mask: str = "attention_mask") -> Callable[[Batch], Batch]:
    """A `transform` that cuts columns off in which `mask` [rows, columns] is 0 for every row, at the right end of all arrays as wide."""

    def trim(batch: Batch) -> Batch:
        if mask not in batch:
            raise InputMismatch(f"trim_padding: the batch has no {mask}")
        width = batch[mask].shape[1]
        used = np.flatnonzero(batch[mask].any(axis=0))
        longest = int(used[-1]) + 1 if used.size else width
        return {name: array[:, :longest] if array.ndim > 1 and array.shape[1] == width else array for name, array in batch.items()}

    return trim


def epoch_batches(loader: Loader, number: int, start: int) -> Iterator[Batch]:
    """What `loader` has for epoch `number` from its `start`-th batch on."""
    if isinstance(loader, EpochLoader):
        return loader.epoch(number, start)
    return itertools.islice(iter(loader), start, None)


def batches_per_epoch(loader: Loader) -> int | None:
    """None where the loader cannot say."""
    try:
        return len(loader)  # type: ignore[arg-type] # not every loader has a length
    except TypeError:
        return None


def _npz(path: Path) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


_READERS: Mapping[str, Callable[[Path], dict[str, Array]]] = {".npz": _npz, ".safetensors": safetensors.numpy.load_file}


def _rows(arrays: Batch) -> int:
    sizes = {name: array.shape[0] if array.ndim else None for name, array in arrays.items()}
    flat = [name for name, size in sizes.items() if size is None]
    if flat:
        raise InputMismatch(f"array {flat[0]} is a single number; the first axis of each array counts the samples")
    if not sizes or not all(sizes.values()):
        raise InputMismatch("there is no sample in the data")
    if len(set(sizes.values())) > 1:
        raise InputMismatch(f"the arrays have different numbers of samples: {', '.join(f'{n}: {s}' for n, s in sizes.items())}")
    return int(next(size for size in sizes.values() if size))
