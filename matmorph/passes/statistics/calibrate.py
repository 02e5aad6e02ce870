"""Calibration: the second moment of what each matmul reads, over the user's batches, block by block.

One accumulator per distinct input (query, key and value read the same rows), summed over all applications of a site. Rows that the model's
`attention_mask` input marks as padding are left out. Products run in float32 per batch (float64 for float64 inputs) and are summed up in
float64: the rounding of one batch does not grow with their number. All batches go through one block of the graph before the next
(`stream`), and what no statistic needs, as the head of a language model, is not computed.

What is fitted to rows has too small an error on them. Where a method fits, every fifth batch goes into a second moment of its own, which
errors are measured in; of fewer than five batches every fifth sample does (every fifth row where a batch has fewer than five samples).

A token whose norm is many times that of others (a massive activation) decides a second moment alone. Such tokens are counted (`massive`);
with `token_weights: norm` each row counts by the inverse of its squared norm.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from matmorph.errors import InputError
from matmorph.ir.core import Graph, Node, Value
from matmorph.ir.evaluate import bind
from matmorph.ir.site import Site, Statistic
from matmorph.passes.linalg.massive import Norms
from matmorph.passes.methods.protocol import SiteStats
from matmorph.passes.statistics.empty_cache import with_empty_cache
from matmorph.passes.statistics.kept import LIMIT
from matmorph.passes.statistics.rows import HELD_OUT_EVERY, PARTS, Held, Source, groups, held_of, sources
from matmorph.passes.statistics.stream import Read, Stream, cuts
from matmorph.progress import StepProgress, tell

SPILL_ABOVE = 1 << 28
"""Bytes of accumulators that are held in memory; above it, each lives in a temporary file that is mapped into memory."""

TokenWeights: TypeAlias = Literal["none", "norm"]
"""What a row counts in what is fitted and judged: as much as any other, or by the inverse of its squared norm."""


@dataclass(slots=True, eq=False)
class Sums:
    """Running sums: `moment` [in, in] or [E, in, in] float64, `rows` [] or [E], `weights` [] or [E] those of the rows' weights. `held`: of
    what is held out, None where nothing is."""

    moment: Tensor
    rows: Tensor
    weights: Tensor
    held: Sums | None = None
    norms: Norms = field(default_factory=Norms)

    def add(self, matrix: int | None, moment: Tensor, rows: int, weights: float) -> None:
        """Of one matrix of a stack, or of all that there are."""
        at: Any = ... if matrix is None else matrix
        self.moment[at] += moment.to(self.moment)
        self.rows[at] += rows
        self.weights[at] += weights
        release(self.moment)


def calibrate(
    graph: Graph,
    needs: Sequence[tuple[Site, frozenset[Statistic]]],
    batches: Iterable[Any],
    samples: int,
    progress: StepProgress | None = None,
    *,
    spill_above: int = SPILL_ABOVE,
    hold_above: int = LIMIT,
    token_weights: TokenWeights = "none",
) -> Mapping[Site, SiteStats]:
    """The statistics of every site that needs one, from at most `samples` samples (first axis of the model's first input).

    A batch is a mapping by input names, a tuple of positional inputs, one tensor, or, for a model that takes both kinds of inputs, a pair
    of args and kwargs; tensors or numpy arrays like the example inputs.
    Rows are held out for the inputs of sites that need `HELD_OUT_MOMENT`, at the price of a second accumulator for each.
    No batch is read where nothing is needed, and none after the last sample. Accumulators of more than `spill_above` bytes in all lie on
    disk, as do activations between two blocks beyond `hold_above` bytes; the files are gone as soon as the statistics are. `progress`: of
    the samples; what a block of the graph has behind it counts by its share of the blocks.

    Raises InputError where the batches yield nothing, where one does not fit the model's inputs, or where an input of a matmul is NaN or
    infinite on them.
    """
    keys = {site: sources(graph, site) for site, wanted in needs if Statistic.INPUT_SECOND_MOMENT in wanted}
    if not keys:
        return {}
    held = {keys[site] for site, wanted in needs if site in keys and Statistic.HELD_OUT_MOMENT in wanted}
    readers = {key: site for site, key in keys.items()}
    size = sum(8 * (site.batch or 1) * site.in_features**2 * (2 if key in held else 1) for key, site in readers.items())
    sums = {key: new_sums(site, size > spill_above, key in held) for key, site in readers.items()}
    _through(graph, keys, sums, batches, samples, progress, hold_above, token_weights == "norm")
    return one_at_a_time({site: stats_of(site, sums[key], token_weights == "norm") for site, key in keys.items()})


def new_sums(site: Site, spill: bool, holds: bool) -> Sums:
    """Of what a site reads; `holds`: whether rows are held out."""
    shape = (*(() if site.batch is None else (site.batch,)), site.in_features, site.in_features)
    return _sums(shape, spill, _sums(shape, spill) if holds else None)


def _sums(shape: tuple[int, ...], spill: bool, held: Sums | None = None) -> Sums:
    rows, weights = (torch.zeros(shape[:-2], dtype=dtype) for dtype in (torch.int64, torch.float64))
    return Sums(accumulator(shape, spill), rows, weights, held)


def accumulator(shape: tuple[int, ...], spill: bool) -> Tensor:
    """Zeros, float64; in a temporary file that is mapped into memory where they are to `spill`. InputError where there is no room."""
    if not spill:
        return torch.zeros(shape, dtype=torch.float64)
    size = 8 * prod(shape)
    with tempfile.TemporaryFile(prefix="matmorph-") as file:  # without a name: it lives for as long as the mapping
        try:
            if hasattr(os, "posix_fallocate"):  # a full disk must show now, not as a crash while the mapping is written
                os.posix_fallocate(file.fileno(), 0, size)
            mapped = np.memmap(file, dtype=np.float64, mode="w+", shape=shape)
            found = torch.from_numpy(mapped)
            found.mapping = mapped.base  # type: ignore[attr-defined]  # for `release`
            return found
        except OSError as error:
            raise InputError(f"calibration needs {size:,} bytes of temporary files in {tempfile.gettempdir()}: {error.strerror}") from error


def release(moment: Tensor) -> None:
    """Takes an accumulator that lies in a file out of memory, until it is read again; of any other tensor nothing."""
    mapping = getattr(moment, "mapping", None)
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)  # what was written stays in the file


def one_at_a_time(stats: Mapping[Site, SiteStats]) -> Mapping[Site, SiteStats]:
    """The same; of what lies in files only the site that was asked for last is held in memory."""
    moments = [moment for one in stats.values() for moment in (one.second_moment, one.held_out)]
    return _OneAtATime(stats) if any(hasattr(moment, "mapping") for moment in moments) else stats


class _OneAtATime(Mapping[Site, SiteStats]):
    def __init__(self, stats: Mapping[Site, SiteStats]) -> None:
        self._stats = stats
        self._last: SiteStats | None = None

    def __getitem__(self, site: Site) -> SiteStats:
        found = self._stats[site]
        before, self._last = self._last, found
        for moment in () if before is None or before is found else (before.second_moment, before.held_out):
            if moment is not None:
                release(moment)
        return found

    def __iter__(self) -> Iterator[Site]:
        return iter(self._stats)

    def __len__(self) -> int:
        return len(self._stats)


def stats_of(site: Site, found: Sums, weighted: bool, note: str | None = None) -> SiteStats:
    """For each site its own object: sites that read the same rows share the moments. InputError where they are not finite."""
    held = found.held if found.held is not None and bool(found.held.rows.any()) else None
    for one in (found, held):
        if one is not None and not bool(torch.isfinite(one.moment.diagonal(dim1=-2, dim2=-1)).all()):
            raise InputError(f"the calibration data makes NaN or infinity at the input of {site.path}")
        if one is not None and weighted:
            _level(one)
        if one is not None:
            release(one.moment)
    stats = SiteStats(found.moment, _count(found), massive=found.norms.massive(), weighted=weighted, notes=(note,) if note else ())
    return stats if held is None else replace(stats, held_out=held.moment, held_rows=_count(held))


def _level(found: Sums) -> None:
    """Weights of the rows with a mean of 1."""
    scale = torch.where(found.weights > 0, found.rows / found.weights.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
    found.moment *= scale[..., None, None]
    found.weights.copy_(found.rows)  # once: sites that read the same rows share the sum


def _count(found: Sums) -> int | Tensor:
    return int(found.rows) if found.rows.dim() == 0 else found.rows


# Streaming


@dataclass(slots=True, eq=False)
class Batches:
    """The calibration batches in a stream, all at the beginning of the graph; `counts`: samples of each."""

    stream: Stream
    counts: list[int]

    def held(self, number: int) -> Held:
        """What of a batch is held out, where anything is."""
        return held_of(number, len(self.counts) >= HELD_OUT_EVERY)


def entered(graph: Graph, watched: Mapping[Node, Collection[Value]], batches: Iterable[Any], samples: int, limit: int) -> Batches:
    """All batches read. `watched`, `limit`: see `Stream`. InputError where there is no sample, or a batch that does not fit."""
    found = Batches(Stream(graph, watched, limit), [])
    for inputs, count in _cut(graph, batches, samples):
        found.stream.enter(inputs)
        found.counts.append(count)
    if not found.counts:
        raise InputError("the calibration data yields nothing: it has no batch with a sample in it")
    return found


def _through(
    graph: Graph,
    keys: Mapping[Site, tuple[Source, ...]],
    sums: Mapping[tuple[Source, ...], Sums],
    batches: Iterable[Any],
    samples: int,
    progress: StepProgress | None,
    limit: int,
    weighted: bool,
) -> None:
    """All batches through one block after the other; a source is added where the first of its matmuls would run."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    first: dict[Source, Node] = {}
    for site, key in keys.items():
        for one, application in zip(key, site.applications, strict=True):
            at = first.get(one, application.node)
            first[one] = min(at, application.node, key=lambda node: order[node])
    watched: dict[Node, list[tuple[Source, list[Sums]]]] = {}
    for one, node in first.items():
        watched.setdefault(node, []).append((one, [own for key, own in sums.items() if one in key]))

    values = {node: {value for one, _ in pairs for value in one.values} for node, pairs in watched.items()}
    found = entered(graph, values, batches, samples, limit)

    def seen(node: Node, number: int, read: Read) -> None:
        for one, targets in watched[node]:
            add_rows(targets, one, read, found.held(number), weighted)

    watch = {node: partial(seen, node) for node in watched}
    ends, total = cuts(graph, keys), sum(found.counts)
    for block, end in enumerate(ends):
        passed = 0
        for number in found.stream.advancing(end, watch):
            passed += found.counts[number]
            tell(progress, f"block {block + 1} of {len(ends)}", (block * total + passed) // len(ends), total)


def _cut(graph: Graph, batches: Iterable[Any], samples: int) -> Iterator[tuple[list[Tensor], int]]:
    """The batches that have samples, and how many, until there are `samples`."""
    done = 0
    for number, batch in enumerate(batches):
        inputs, count = cut_batch(graph, bound_batch(graph, batch, number), samples - done)
        done += count
        if count:
            yield inputs, count
        if done >= samples:
            return


def bound_batch(graph: Graph, batch: Any, number: int) -> list[Tensor]:
    """The tensors of a batch in `graph.inputs` order, on the graph's device. Positional inputs may also come by their names.
    For a model with a cache a batch is whole texts."""
    found, named = _as_traced(graph, with_empty_cache(graph, batch))
    args = tuple(_tensor(leaf, graph.device) for leaf in found)
    kwargs = {str(key): _tensor(leaf, graph.device) for key, leaf in named.items()}
    try:
        return bind(graph, args, kwargs)
    except InputError as error:
        wanted = ", ".join(entry.name for entry in graph.signature.inputs)
        given = ", ".join([*([f"{len(args)} without names"] if args or not kwargs else []), *kwargs])
        details = [*error.details, f"the model's inputs: {wanted}", f"the batch has: {given}"]
        raise InputError(f"calibration batch {number + 1}: {error.message}", details) from error


def _as_traced(graph: Graph, batch: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """(args, kwargs) of a batch. A mapping that names all positional inputs stands for them; a model that takes both kinds of inputs also
    takes a pair of args and kwargs."""
    args, kwargs = graph.signature.in_spec.children()
    if not isinstance(batch, Mapping):
        leaves = batch if isinstance(batch, tuple | list) else (batch,)
        both = args.num_leaves and kwargs.num_leaves and _is_pair(leaves)
        return (leaves[0], leaves[1]) if both else (leaves, {})
    names = [entry.name for entry in graph.signature.inputs][: args.num_leaves]
    if not all(name in batch for name in names):
        return (), batch
    return [batch[name] for name in names], {name: leaf for name, leaf in batch.items() if name not in names}


def _is_pair(batch: Sequence[Any]) -> bool:
    return len(batch) == 2 and isinstance(batch[0], tuple | list) and isinstance(batch[1], Mapping)


def _tensor(leaf: Any, device: str) -> Any:
    tensor = torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf
    return tensor.to(device) if isinstance(tensor, Tensor) else tensor


def cut_batch(graph: Graph, inputs: list[Tensor], left: int) -> tuple[list[Tensor], int]:
    """At most `left` samples, and how many they are. An axis that is fixed or must be longer is not cut."""
    if not inputs or not inputs[0].dim():
        return inputs, 1
    axis = graph.inputs[0].tensor.shape[0]
    count = len(inputs[0])
    least = graph.ranges[str(axis)].low if str(axis) in graph.ranges else 1
    if isinstance(axis, int) or count <= left or left < least:
        return inputs, count
    along = [bool(value.tensor.shape) and value.tensor.shape[0] == axis for value in graph.inputs]
    return [tensor[:left] if cut else tensor for tensor, cut in zip(inputs, along, strict=True)], left


def add_rows(targets: Sequence[Sums], one: Source, read: Read, held: Held, weighted: bool) -> None:
    """The rows of one batch to all sums that they are part of."""
    part = held if any(target.held is not None for target in targets) else "none"
    for out, pick in PARTS[part]:
        for matrix, rows in groups(one, read, pick):
            squares = rows.square().sum(1)
            for target in targets:
                target.norms.add(squares)
            weights = inverse(squares) if weighted else None
            rows = rows if weights is None else rows * weights.sqrt().unsqueeze(1)
            moment, total = rows.T @ rows, len(rows) if weights is None else float(weights.sum(dtype=torch.float64))
            for target in targets:
                (target.held if out and target.held is not None else target).add(matrix, moment, len(rows), total)


def inverse(squares: Tensor) -> Tensor:
    """1 / |x|^2 of each row; 0 for a row of zeros, which counts nothing."""
    return torch.where(squares > 0, 1 / squares.clamp_min(torch.finfo(squares.dtype).tiny), 0.0)
