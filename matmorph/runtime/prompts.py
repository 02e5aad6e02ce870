"""Prompts of different length as one batch, padded on the side that the model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from matmorph.runtime.errors import InputMismatch
from matmorph.runtime.feeds import Array
from matmorph.runtime.format.cache import Padding
from matmorph.runtime.whole_call import positions_of

Ids: TypeAlias = Sequence[Sequence[int]] | Array
"""Token ids by row: a list of lists of any length, or an integer array [rows, tokens]."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """`ids`, `mask`: int64 [rows, width]; the mask is 1 at tokens. `lengths`: int64 [rows]."""

    ids: Array
    mask: Array
    lengths: Array

    @property
    def positions(self) -> Array:
        """Of each token among those of its row; 0 at pads before them."""
        return positions_of(self.mask)


def padded(ids: Ids, mask: Any, padding: Padding, pad: int | None, vocabulary: int | None) -> Prompts:
    """The batch. Padding "any" puts pads before the tokens, so that new ones follow them in every row; "right" behind them.

    Raises InputMismatch: no row, an empty one, ids that are none of the vocabulary; a mask of another shape, with holes, or whose rows are
    padded on the side that the model does not take; rows that need pads without a token for them.
    """
    rows = _rows(ids) if mask is None else _masked(ids, mask, padding)
    if not rows:
        raise InputMismatch("ids: there is no prompt")
    for number, row in enumerate(rows):
        _check_row(row, number, vocabulary)
    lengths = np.array([row.size for row in rows], np.int64)
    width = int(lengths.max())
    if pad is None and (lengths < width).any():
        raise InputMismatch("prompts of different length need a pad token, and the folder names none: give pad=")
    out = np.full((len(rows), width), 0 if pad is None else pad, np.int64)
    shown = np.zeros_like(out)
    for number, row in enumerate(rows):
        place = slice(0, row.size) if padding == "right" else slice(width - row.size, width)
        out[number, place], shown[number, place] = row, 1
    return Prompts(out, shown, lengths)


def refuse_left_padding(mask: Array) -> None:
    """Raises InputMismatch for a mask [rows, tokens] with a row that begins with padding: the model counts a row's tokens from its first
    place, and would answer with wrong numbers."""
    wrong = np.flatnonzero(mask[:, 0] == 0) if mask.shape[1] else mask[:0, 0]
    if wrong.size:
        raise InputMismatch(f"row {wrong[0]} of the mask begins with padding; this model takes padding behind the tokens of a row only")


def _rows(ids: Ids) -> list[Array]:
    if isinstance(ids, np.ndarray):
        return list(_integers(ids, "ids", 2))
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise InputMismatch(f"ids: expected lists of token ids, got {type(ids).__name__}")
    if any(not isinstance(row, Sequence | np.ndarray) or isinstance(row, str) for row in ids):
        raise InputMismatch("ids: expected a list of token ids for each prompt; one prompt is a list with one list: [[1, 2, 3]]")
    return [_integers(np.asarray(row if len(row) else np.zeros(0, np.int64)), f"ids[{number}]", 1) for number, row in enumerate(ids)]


def _masked(ids: Ids, mask: Any, padding: Padding) -> list[Array]:
    table, shown = _integers(_array(ids, "ids"), "ids", 2), _integers(_array(mask, "mask"), "mask", 2)
    if table.shape != shown.shape:
        raise InputMismatch(f"mask: expected the shape of ids {table.shape}, got {shown.shape}")
    if not np.isin(shown, (0, 1)).all():
        raise InputMismatch("mask: expected 1 at tokens and 0 at padding")
    if padding == "right":
        refuse_left_padding(shown)
    edges = np.diff(shown, axis=1, prepend=0) == 1
    holes = np.flatnonzero(edges.sum(1) > 1)
    if holes.size:
        raise InputMismatch(f"mask: row {holes[0]} has padding between its tokens")
    return [row[keep == 1] for row, keep in zip(table, shown, strict=True)]


def _array(data: Any, name: str) -> Array:
    try:
        return np.asarray(data)
    except ValueError as error:  # rows of different length
        raise InputMismatch(f"{name}: with a mask, ids and mask are arrays [rows, tokens]") from error


def _integers(array: Array, name: str, axes: int) -> Array:
    if array.dtype.kind not in "iub" or array.ndim != axes:
        raise InputMismatch(f"{name}: expected whole numbers of {axes} dimension(s), got {array.dtype} of shape {array.shape}")
    return array.astype(np.int64)


def _check_row(row: Array, number: int, vocabulary: int | None) -> None:
    if not row.size:
        raise InputMismatch(f"prompt {number} is empty: there is nothing that a token could follow")
    wrong = row[(row < 0) | (row >= (vocabulary or np.inf))]
    if wrong.size:
        limit = "0 or more" if vocabulary is None else f"0 to {vocabulary - 1}"
        raise InputMismatch(f"prompt {number} has the token id {wrong[0]}; the model takes {limit}")
