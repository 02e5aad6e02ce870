"""One answer as it comes: its pieces, and what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from matmorph.errors import InputError
from matmorph.text.tokens import Tokens

if TYPE_CHECKING:
    from matmorph.cli.text.loading import AnyGenerator

DEFAULT_NEW = 256
"""New tokens where the user says nothing, as far as the model has positions for them."""


@dataclass(frozen=True, slots=True)
class Answer:
    """`prompt`: tokens of the prompt; `ids`: new ones, the end token included; `ended`: whether there is one. `first`, `rest`: seconds
    until the first token, and from there to the last."""

    prompt: int
    ids: tuple[int, ...]
    text: str
    ended: bool
    first: float
    rest: float

    @property
    def prefill_rate(self) -> float:
        """Tokens of the prompt per second."""
        return self.prompt / max(self.first, 1e-9)

    @property
    def decode_rate(self) -> float | None:
        """New tokens per second behind the first one; None where it is the only one."""
        return (len(self.ids) - 1) / max(self.rest, 1e-9) if len(self.ids) > 1 else None

    def line(self) -> str:
        """For a person."""
        decode = "" if self.decode_rate is None else f", {len(self.ids)} new ones at {self.decode_rate:.1f} tokens/s"
        return f"{self.prompt} tokens of prompt at {self.prefill_rate:.1f} tokens/s{decode}"


def room_for(generator: AnyGenerator, prompt: int, asked: int | None) -> int:
    """New tokens to ask for: `asked`, else the default as far as there are positions. Raises InputError for a prompt that leaves none."""
    room = generator.room(prompt)
    if asked is not None or room is None:
        return DEFAULT_NEW if asked is None else asked
    if room < 1:
        raise InputError(
            f"the prompt has {prompt} tokens, and the model has positions for {generator.max_length}: none is left for an answer"
        )
    return min(DEFAULT_NEW, room)


def written(generator: AnyGenerator, tokens: Tokens, ids: Sequence[int], how: Mapping[str, Any], show: Callable[[str], None]) -> Answer:
    """Generates behind `ids` and shows each piece; Ctrl-C ends the answer where it is. `how`: arguments of `Generator.stream`.

    Raises SessionError; KeyboardInterrupt where there is no token yet."""
    pieces, text = tokens.pieces(), ""
    new: list[int] = []
    ends = set(generator.special.eos or ())
    began = time.perf_counter()
    first = last = began
    stopped = False
    stream = generator.stream([list(ids)], **how)
    while True:
        try:
            token = next(stream, None)
        except KeyboardInterrupt:
            if not new:
                raise
            stopped = True
            break
        if token is None:
            break
        last = time.perf_counter()
        first = first if new else last
        new.append(int(token[0]))
        if (piece := pieces.piece(new[-1])) != "":
            text += piece
            show(piece)
    if (rest := pieces.rest()) != "":
        text += rest
        show(rest)
    ended = not stopped and bool(new) and new[-1] in ends
    return Answer(len(ids), tuple(new), text, ended, first - began, last - first)
