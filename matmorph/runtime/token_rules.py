"""Which tokens may come at all, as a generation configuration says: the logits of others become minus infinity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from matmorph.runtime.feeds import Array


@dataclass(frozen=True, slots=True)
class TokenRules:
    """`first`: the only token that may come first, None = any; `never`: tokens that never come; `not_first`: tokens that do not come first
    (`forced_bos_token_id`, `suppress_tokens`, `begin_suppress_tokens`). What is forced comes, whatever else is said of it."""

    first: int | None = None
    never: tuple[int, ...] = ()
    not_first: tuple[int, ...] = ()

    def applied(self, logits: Array, number: int) -> Array:
        """The logits [rows, tokens] of the `number`th new token. Tokens that the model does not have are no matter."""
        if number == 1 and self.first is not None and self.first < logits.shape[1]:
            forced: Array = np.full_like(logits, -np.inf)
            forced[:, self.first] = 0
            return forced
        barred = (*self.never, *(self.not_first if number == 1 else ()))
        return _without(logits, barred) if barred else logits


def _without(logits: Array, barred: Sequence[int]) -> Array:
    found: Array = logits.copy()
    found[:, [token for token in barred if token < logits.shape[1]]] = -np.inf
    return found
