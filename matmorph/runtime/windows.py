"""A row of tokens cut into windows, and which token counts in which of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matmorph.runtime.errors import InputMismatch


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens `start` to `stop` of the row, of which those from `first` on count here: each has a token before it in the window."""

    start: int
    stop: int
    first: int

    @property
    def counted(self) -> int:
        return self.stop - self.first


@dataclass(frozen=True, slots=True)
class Cut:
    """How a row is cut. `window`: tokens that the model sees at once, `prefix` of them before those of the row; `stride`: from one window's
    start to the next one's."""

    window: int
    stride: int
    prefix: int

    @classmethod
    def of(cls, window: int, stride: int | None, prefix: Sequence[int] = ()) -> Cut:
        """stride None: windows do not overlap. Raises InputMismatch for a window without a token to count, and a stride that skips some."""
        room = window - len(prefix)
        if window < 2 or room < 1:
            behind = f" behind the {len(prefix)} that the tokenizer puts first" if prefix else ""
            raise InputMismatch(f"window is {window}: it needs two tokens, and one of the text{behind}, so that there is one to predict")
        if stride is not None and not 1 <= stride <= room:
            of = f"{room} tokens of the text behind those that the tokenizer puts first" if prefix else f"{room} tokens"
            raise InputMismatch(f"stride is {stride}: it must be 1 to {room}, for a window holds {of}")
        return cls(window, room if stride is None else stride, len(prefix))

    @property
    def room(self) -> int:
        """Tokens of the row in a window."""
        return self.window - self.prefix

    def of_row(self, tokens: int) -> tuple[Window, ...]:
        """Whole windows only: what is left at the end of the row is in none. Raises InputMismatch for a row shorter than one."""
        if tokens < self.room:
            raise InputMismatch(f"the text has {tokens} tokens, fewer than one window ({self.room}): give more text, or a smaller window")
        starts = range(0, tokens - self.room + 1, self.stride)
        return tuple(self._window(start, start - self.stride + self.room if start else 0) for start in starts)

    def _window(self, start: int, seen: int) -> Window:
        return Window(start, start + self.room, max(seen, start if self.prefix else start + 1))

    def says(self) -> str:
        """What counts, for a person."""
        if self.stride < self.room:
            rest = "" if self.prefix else "; the very first does not count"
            return f"each token counts once, with what its window holds before it{rest}"
        return "every token of the text counts" if self.prefix else "all but the first token of each window count"
