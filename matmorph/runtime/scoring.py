"""Logits against the tokens that came: log-likelihoods, and how near two models are. Pure numpy, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from matmorph.runtime.feeds import Array

_ROWS = 64
"""Of logits that are widened to float64 at once."""


@dataclass(frozen=True, slots=True)
class Score:
    """Sums over tokens. `nll`: -log of the probability of the token that came, in nats; `hits`: where it was the likeliest."""

    counted: int = 0
    nll: float = 0.0
    hits: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.counted + other.counted, self.nll + other.nll, self.hits + other.hits)


@dataclass(frozen=True, slots=True)
class Nearness:
    """Sums over tokens. `kl`: of the model from the other, the sum of p_other (log p_other - log p) in nats; `agreed`: where both have
    the same likeliest token."""

    kl: float = 0.0
    agreed: int = 0

    def __add__(self, other: Nearness) -> Nearness:
        return Nearness(self.kl + other.kl, self.agreed + other.agreed)


def score(logits: Array, targets: Array) -> Score:
    """Of logits [tokens, words] of any float type against ids [tokens]."""
    nll, hits = 0.0, 0
    for rows in _parts(len(targets)):
        logs, wanted = log_probabilities(logits[rows]), targets[rows]
        nll -= float(logs[np.arange(len(wanted)), wanted].sum())
        hits += int((logs.argmax(-1) == wanted).sum())
    return Score(len(targets), nll, hits)


def nearness(logits: Array, other: Array) -> Nearness:
    """Of logits [tokens, words] to those of another model."""
    found = Nearness()
    for rows in _parts(len(logits)):
        logs, theirs = log_probabilities(logits[rows]), log_probabilities(other[rows])
        shares = np.exp(theirs)
        each = np.where(shares > 0, shares * (theirs - logs), 0.0)  # a word that the other excludes adds nothing
        found += Nearness(float(each.sum()), int((logs.argmax(-1) == theirs.argmax(-1)).sum()))
    return found


def log_probabilities(logits: Array) -> Array:
    """log softmax over the last axis, float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(-1, keepdims=True))
    return wide


def _parts(rows: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS) for start in range(0, rows, _ROWS))
