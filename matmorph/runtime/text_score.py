"""How well the language model of an artefact folder predicts a text, and how near it is to another one: numpy and ONNX Runtime only.

One window at a time goes through the model, so that no more than its logits lie in memory. Perplexity is exp of the mean negative
log-likelihood, in nats, over the counted tokens.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from matmorph.runtime.errors import ArtifactError, ExecutionError, InputMismatch
from matmorph.runtime.feeds import Array
from matmorph.runtime.providers import Provider
from matmorph.runtime.scoring import Nearness, Score, nearness, score
from matmorph.runtime.session import to_stderr
from matmorph.runtime.text_model import TextModel
from matmorph.runtime.windows import Cut

WINDOW = 512
"""Tokens, where nobody says."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Means over `counted` tokens. `nll`: nats per token; `hits`: the share whose likeliest word was the one that came."""

    counted: int
    nll: float
    hits: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll) if self.nll < 700 else math.inf

    @classmethod
    def of(cls, total: Score) -> Prediction:
        return cls(total.counted, total.nll / total.counted, total.hits / total.counted)


@dataclass(frozen=True, slots=True)
class Beside:
    """The other model on the same tokens. `kl`: mean KL(other || model), nats per token; `agreement`: the share of tokens for which both
    have the same likeliest word."""

    prediction: Prediction
    kl: float
    agreement: float


@dataclass(frozen=True, slots=True)
class TextResult:
    """`tokens`: of the text that lie in a window; `left`: at its end, in none. `seconds`: of both models together."""

    cut: Cut
    windows: int
    tokens: int
    left: int
    prediction: Prediction
    beside: Beside | None
    provider: str
    seconds: float


def perplexity(
    folder: str | os.PathLike[str],
    ids: Any,
    *,
    window: int = WINDOW,
    stride: int | None = None,
    prefix: Sequence[int] = (),
    beside: str | os.PathLike[str] | None = None,
    providers: str | Sequence[Provider] | None = None,
    threads: int | None = None,
    log: Callable[[str], None] = to_stderr,
    verify: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> TextResult:
    """Of the model of `folder` on a row of token ids.

    window: tokens that the model sees at once. stride: from one window to the next, None = they do not overlap; all but the first token of
    each window count then, with a smaller stride only the new ones. prefix: ids before the text in every window, which do not count (the
    token that begins a text, where the model wants one). beside: a second folder, of the same vocabulary. providers, threads, log, verify:
    as of `Session`. progress: called with (windows done, of how many).

    Raises InputMismatch: a text shorter than one window, a window or ids that the model does not take, two vocabularies. ArtifactError: a
    folder without a causal language model that gives logits for every token. ExecutionError: logits that are not finite.
    """
    began = time.perf_counter()
    row = np.asarray(ids)
    if row.ndim != 1 or row.dtype.kind not in "iu" or (row.size and row.min() < 0):
        raise InputMismatch(f"ids: expected a row of token ids, got {row.dtype} of shape {row.shape}")
    cut = Cut.of(window, stride, prefix)
    windows = cut.of_row(row.size)
    first = np.array(prefix, np.int64)
    how: dict[str, Any] = {"threads": threads, "log": log, "verify": verify}
    models = [TextModel(each, providers, **how) for each in (folder, *([] if beside is None else [beside]))]
    for model in models:
        model.refuse(window, max(int(row.max()), *prefix, 0))
    if len({model.vocabulary for model in models}) > 1:
        sizes = " and ".join(str(model.vocabulary) for model in models)
        raise ArtifactError(f"{folder} and {beside}: have vocabularies of {sizes} words, so their logits cannot be compared")
    scores, near = [Score() for _ in models], Nearness()
    for number, place in enumerate(windows):
        seen = np.concatenate([first, row[place.start : place.stop].astype(np.int64)])
        counted = slice(first.size + place.first - place.start - 1, seen.size - 1)
        found = [_finite(model.logits(seen)[counted], number) for model in models]
        targets = seen[counted.start + 1 :]
        scores = [total + score(logits, targets) for total, logits in zip(scores, found, strict=True)]
        near += nearness(*found) if beside is not None else Nearness()
        if progress is not None:
            progress(number + 1, len(windows))
    mine, *others = map(Prediction.of, scores)
    other = Beside(others[0], near.kl / mine.counted, near.agreed / mine.counted) if others else None
    used = windows[-1].stop
    return TextResult(cut, len(windows), used, row.size - used, mine, other, models[0].provider, time.perf_counter() - began)


def _finite(logits: Array, number: int) -> Array:
    if not (logits < np.inf).all():  # -inf excludes a word; NaN is not less than anything
        raise ExecutionError(f"window {number}: the model's logits are not finite")
    return logits
