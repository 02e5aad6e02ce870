"""The next token of each row from its logits: the likeliest one, or a draw.

A draw works in float64 and in this order, which is that of transformers' logits warpers: divided by `temperature`; all but the `top_k`
largest left out (what ties with the last of them stays); the least likely left out as long as the rest has a probability of `top_p`; then
one number of the row's own generator decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from matmorph.runtime.errors import ExecutionError, InputMismatch
from matmorph.runtime.feeds import Array


@dataclass(frozen=True, slots=True)
class Sampling:
    """`temperature` 0 = greedy. `top_k`, `top_p`: None = all tokens. `seed`: row k of a batch draws from the stream (seed, k), whatever
    stands beside it."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def check(self) -> None:
        """Raises InputMismatch for what makes no distribution, and for a choice that greedy decoding would not look at."""
        if not 0 <= self.temperature < math.inf:
            raise InputMismatch(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise InputMismatch(f"top_k is {self.top_k}; it must be 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputMismatch(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.seed < 0:
            raise InputMismatch(f"seed is {self.seed}; it must be 0 or more")
        if self.temperature == 0 and (self.top_k, self.top_p) != (None, None):
            raise InputMismatch("top_k and top_p say what may be drawn, and temperature 0 draws nothing: set a temperature")


class Sampler:
    """Tokens of `rows` rows, step by step."""

    def __init__(self, sampling: Sampling, rows: int) -> None:
        self._sampling = sampling
        self._draws = [np.random.default_rng((sampling.seed, row)) for row in range(rows)] if sampling.temperature else []

    def next(self, logits: Array) -> Array:
        """int64 [rows] of logits [rows, tokens]. Raises ExecutionError for logits that are not finite."""
        if not self._draws:
            best = logits.argmax(-1)
            _refuse_odd(logits[np.arange(len(best)), best])  # NaN counts as the largest
            greedy: Array = best.astype(np.int64)
            return greedy
        chosen = [draw(probabilities(row, self._sampling), one) for row, one in zip(logits, self._draws, strict=True)]
        return np.array(chosen, np.int64)


def probabilities(logits: Array, sampling: Sampling) -> Array:
    """float64 [tokens], 0 for what is left out. `logits` [tokens]; `temperature` is not 0. Raises ExecutionError."""
    scores = logits.astype(np.float64) / sampling.temperature
    _refuse_odd(scores.max())
    if sampling.top_k is not None and sampling.top_k < scores.size:
        smallest = np.partition(scores, -sampling.top_k)[-sampling.top_k]
        scores = np.where(scores < smallest, -np.inf, scores)
    raised = np.exp(scores - scores.max())
    shares: Array = raised / raised.sum()
    if sampling.top_p is None or sampling.top_p == 1:
        return shares
    order = np.argsort(shares, kind="stable")
    below = np.cumsum(shares[order]) <= 1 - sampling.top_p
    below[-1] = False  # one always stays
    shares[order[below]] = 0
    shares /= shares.sum()
    return shares


def draw(shares: Array, generator: np.random.Generator) -> int:
    """A token by its probability: where the sum of those before it passes a number of the generator."""
    sums = np.cumsum(shares)
    return int(np.searchsorted(sums, generator.random() * sums[-1], side="right"))


def _refuse_odd(largest: Array) -> None:
    if not np.isfinite(largest).all():
        raise ExecutionError("the model's logits are not finite, so no token can be chosen")
