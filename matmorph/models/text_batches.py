"""Calibration batches of a language model from a text file, by the model's own tokenizer.

The text is one row of tokens that is cut. There is no padding, so every place counts, and all but the first ones of a sample have context,
as they have when the model is used. The first samples of the file are taken: the same file gives the same batches.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from matmorph.errors import InputError
from matmorph.models.cached_call import max_length
from matmorph.models.decoder_call import IDS
from matmorph.models.resolve import Inputs, Model, named_examples
from matmorph.runtime.format.companions import TOKENIZER
from matmorph.text.corpus import read_corpus
from matmorph.text.tokens import Tokens

LENGTH, SAMPLES = 512, 128
"""Tokens of a sample, and samples at most, where nobody says."""
_BATCH_TOKENS = 2048
"""Of one batch, where nobody says: the logits of so many lie in memory at once."""


def text_batches(
    folder: str | os.PathLike[str],
    file: str | os.PathLike[str],
    *,
    length: int = LENGTH,
    samples: int | None = None,
    batch: int | None = None,
) -> list[dict[str, Any]]:
    """`input_ids` and `attention_mask` of ones, int64 [batch, length], from the beginning of a UTF-8 text.

    folder: has a tokenizer.json (a Hugging Face folder, or one that `compile` wrote). file: taken as it is, its documents joined as they
    follow one another, read no further than is needed; what is left at the end, less than a sample, is in none. length: tokens of a sample,
    those that the tokenizer puts before a text included. samples: as many as there are up to 128, or exactly so many. batch: samples of a
    batch, None = 2048 tokens. Raises InputError: no tokenizer, a file without text or with too little, sizes that do not work.
    """
    path, home = Path(file), Path(folder)
    if not (home / TOKENIZER).is_file():
        raise InputError(f"{home}: has no {TOKENIZER}, so {path} cannot become tokens", ["give batches of token ids instead"])
    for name, value in (("length", length), ("samples", samples), ("batch", batch)):
        if value is not None and value < (2 if name == "length" else 1):
            raise InputError(f"{name} is {value}: it must be {2 if name == 'length' else 1} or more")
    tokens = Tokens(home / TOKENIZER)
    room = length - len(tokens.prefix())
    if room < 1:
        raise InputError(f"length is {length}: the tokenizer puts {length - room} tokens before a text, so none of it is left")
    corpus = read_corpus(path, tokens, room * (samples or SAMPLES))
    rows = len(corpus.ids) // room
    if rows < (samples or 1):
        wanted = f"{samples} samples were asked for" if samples and rows else "that is less than one sample"
        raise InputError(
            f"{path}: has {len(corpus.ids)} tokens, {rows} samples of {length}; {wanted}", ["give more text, or a smaller length"]
        )
    before = np.broadcast_to(np.array(corpus.prefix, np.int64), (rows, len(corpus.prefix)))
    table = np.concatenate([before, corpus.ids[: rows * room].reshape(rows, room)], axis=1)
    size = batch or max(1, _BATCH_TOKENS // length)
    return [_batch(table[start : start + size]) for start in range(0, rows, size)]


def _batch(rows: np.ndarray[Any, Any]) -> dict[str, Any]:
    import torch

    ids = torch.from_numpy(np.ascontiguousarray(rows))
    return {IDS: ids, "attention_mask": torch.ones_like(ids)}


def text_calibration(model: Model, file: Path, length: int | None = None, samples: int | None = None) -> list[Inputs]:
    """The same in the structure of `model.example_inputs`, for the tokenizer of its folder.

    Raises InputError as well for a model without a folder, with inputs that a text has no value for, with fewer positions than `length`, or
    with fewer words than the tokenizer.
    """
    if model.hf_folder is None:
        raise InputError(
            f"{file}: the model came without a tokenizer", ["matmorph.Model(..., hf_folder=FOLDER) names the folder that has it"]
        )
    names = list(named_examples(model))
    known = (IDS, "attention_mask")
    unknown = [name for name in names if name not in known]
    if unknown or IDS not in names:
        what = f"takes {', '.join(unknown)} too, which a text has no value for" if unknown else f"takes no {IDS}"
        raise InputError(f"{file}: the model {what}", ["give its calibration as arrays: --calibration FILE.npz"])
    wanted, limit = LENGTH if length is None else length, max_length(model.module)
    if limit is not None and wanted > limit:
        raise InputError(f"{file}: samples of {wanted} tokens, and the model has positions for {limit}", [f"--length {limit} is the most"])
    batches = text_batches(model.hf_folder, file, length=wanted, samples=samples)
    _refuse_unknown_words(model, file, batches)
    parts = [{name: each[name] for name in names} for each in batches]
    return (
        list(parts) if model.kwargs is not None or isinstance(model.example_inputs, Mapping) else [tuple(part.values()) for part in parts]
    )


def _refuse_unknown_words(model: Model, file: Path, batches: list[dict[str, Any]]) -> None:
    table = getattr(model.module.get_input_embeddings(), "weight", None) if hasattr(model.module, "get_input_embeddings") else None
    highest = max(int(each[IDS].max()) for each in batches)
    if table is not None and highest >= len(table):
        raise InputError(f"{file}: has the token {highest}, and the model has {len(table)} words: the tokenizer is not this model's")
