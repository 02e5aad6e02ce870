"""A model whose weights stay in their files: its parameters are on the meta device, and each weight of its graph is mapped when it is read.

    with weights.filled(module) as filled:      # the parameters lie over the files for the block
        graph = weights.referred(trace(module, ...))

Whether a parameter is what a file has is told by where it lies in memory, not by its name: transformers renames, converts and ties as it
loads, and what it converts has left the files and is held in memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matmorph.errors import InputError
from matmorph.ir.core import Const, Graph
from matmorph.ir.mapped import Place, tensor_in
from matmorph.ir.rewiring import exchanged


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """Of one module: `places` of what is read from the files of `folder`, by each dotted name that it goes by. `held`: bytes of
    parameters that are none of these, and are in memory."""

    folder: Path
    places: Mapping[str, Place]
    held: int = 0

    @contextmanager
    def filled(self, module: nn.Module) -> Iterator[Filled]:
        """For the block, the module's parameters and buffers lie over the files, from which nothing is read by that. InputError where a
        file has changed."""
        files: dict[Path, mmap.mmap] = {}
        made: dict[Tensor, Tensor] = {}
        for name, tensor in _tensors(module):
            if name in self.places and tensor not in made:
                place = self.places[name]
                if place.path not in files:
                    files[place.path] = _mapped(place)
                made[tensor] = _alike(tensor, tensor_in(files[place.path], place.offset, place.dtype, place.shape))
        _exchange(module, made)
        try:
            yield Filled(module, self, files)
        finally:
            _exchange(module, {new: old for old, new in made.items()})

    def referred(self, graph: Graph) -> Graph:
        """The graph of a filled module with each weight mapped anew whenever it is loaded, so that none of them stays resident."""
        change: dict[Const, Const] = {}
        for const in graph.state:
            place = next((self.places[name] for name in const.names if name in self.places), None)
            if place is not None:
                change[const] = replace(const, load=place.load)
        return replace(exchanged(graph, change), notes=(*graph.notes, *self._notes()))

    def _notes(self) -> tuple[str, ...]:
        if not self.held:
            return ()
        return (f"{self.held / 2**20:.1f} MiB of the model's weights are held in memory: its files have them in another form",)


@dataclass(frozen=True, slots=True, eq=False)
class Filled:
    """A module whose parameters lie over mapped files."""

    module: nn.Module
    weights: Weights
    files: Mapping[Path, mmap.mmap]

    @contextmanager
    def frugal(self) -> Iterator[None]:
        """For the block, each part of the module lets go of the pages that it read once it has run."""
        parts: dict[nn.Module, list[Place]] = {}
        for name, _ in _tensors(self.module):
            if name in self.weights.places:
                parts.setdefault(self.module.get_submodule(name.rpartition(".")[0]), []).append(self.weights.places[name])
        handles = [part.register_forward_hook(self._letting_go(places)) for part, places in parts.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _letting_go(self, places: Sequence[Place]) -> Callable[..., None]:
        def let_go(*_: object) -> None:
            for place in places:
                _release(self.files[place.path], place)

        return let_go


def _mapped(place: Place) -> mmap.mmap:
    try:
        with place.path.open("rb") as file:
            place.refuse_changed(file.fileno())
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise InputError(f"{place.path}: cannot be read: {error.strerror or error}") from error


def _release(file: mmap.mmap, place: Place) -> None:
    """Pages that nobody has written to are read again when they are needed."""
    if hasattr(mmap, "MADV_DONTNEED"):
        start = place.offset - place.offset % mmap.PAGESIZE
        file.madvise(mmap.MADV_DONTNEED, start, place.offset + place.nbytes - start)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under each of its names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _alike(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _exchange(module: nn.Module, change: Mapping[Tensor, Tensor]) -> None:
    for part in module.modules():
        tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for table in tables:
            table.update({name: change[tensor] for name, tensor in table.items() if tensor is not None and tensor in change})


# a module that transformers made over mapped files


def mapped_tensors(stored: Mapping[str, Place]) -> dict[str, Tensor]:
    """The tensors of some files, over one mapping of each. InputError where a file has changed."""
    files = {path: _mapped(place) for path, place in {place.path: place for place in stored.values()}.items()}
    return {name: tensor_in(files[place.path], place.offset, place.dtype, place.shape) for name, place in stored.items()}


def emptied(module: nn.Module, folder: Path, stored: Mapping[str, Place], tensors: Mapping[str, Tensor]) -> Weights:
    """Puts every parameter and buffer of the module that lies over `tensors` on the meta device; where each of them is."""
    by_address = {_address(tensor): stored[name] for name, tensor in tensors.items() if tensor.numel()}
    places: dict[str, Place] = {}
    change: dict[Tensor, Tensor] = {}
    held: dict[Tensor, int] = {}
    for name, tensor in _tensors(module):
        place = by_address.get(_address(tensor)) if tensor.is_contiguous() else None
        if place is not None:
            places[name] = place
            change[tensor] = _alike(tensor, torch.empty_like(tensor, device="meta"))
        elif isinstance(tensor, nn.Parameter):
            held[tensor] = tensor.nbytes
    _exchange(module, change)
    return Weights(folder, places, sum(held.values()))


def _address(tensor: Tensor) -> tuple[int, torch.dtype, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape)
