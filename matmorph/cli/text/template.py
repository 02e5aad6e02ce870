"""A conversation as the text that a model was trained on, by the chat template of its folder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matmorph.cli.text.files import TextFiles
from matmorph.errors import InputError

Message = Mapping[str, str]
"""`role` (system, user, assistant) and `content`."""
SECONDS, MEMORY, LONGEST = 10, 1 << 30, 1 << 24
"""Processor time, bytes, and characters of a result that a template may take."""
_WAIT = 2 * SECONDS
"""Seconds of a clock; a busy machine gives less of its processors."""
_RENDER = Path(__file__).with_name("render.py")


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """`name`: of its file, for messages. `tokens`: special tokens by the name that templates use."""

    name: str
    text: str
    tokens: Mapping[str, str]

    @classmethod
    def of(cls, files: TextFiles) -> ChatTemplate | None:
        """None for a folder without one. Raises StoredError."""
        found = files.chat_template()
        return None if found is None else cls(*found, files.named_tokens())

    def prompt(self, messages: Sequence[Message]) -> str:
        """The conversation and the beginning of the answer. Raises InputError: the template is wrong, refuses the messages, or takes too
        long or too much memory."""
        variables = {**self.tokens, "messages": [dict(message) for message in messages], "add_generation_prompt": True, "tools": None}
        limits = {"seconds": SECONDS, "memory": MEMORY, "longest": LONGEST}
        asked = json.dumps({"template": self.text, "variables": variables, **limits}).encode("ascii")
        try:
            done = subprocess.run([sys.executable, "-I", str(_RENDER)], input=asked, capture_output=True, timeout=_WAIT)
        except subprocess.TimeoutExpired as error:
            raise InputError(f"{self.name}: the chat template takes more than {SECONDS} seconds") from error
        if done.returncode != 0:  # killed: by the limit of time where it was not one of memory
            out_of_memory = b"MemoryError" in done.stderr
            limit = "too much memory" if out_of_memory else f"more than {SECONDS} seconds"
            raise InputError(f"{self.name}: the chat template takes {limit}")
        answer: dict[str, str] = json.loads(done.stdout)
        if "error" in answer:
            raise InputError(f"{self.name}: the chat template: {answer['error']}")
        return answer["text"]
