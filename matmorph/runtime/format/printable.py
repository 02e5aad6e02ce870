"""Text as it may be shown to a person: names come from models and files, and a terminal obeys what is in them."""

from __future__ import annotations

import re

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and newline, what turns the direction of a line around, and halves of characters."""


def printable(text: str) -> str:
    """The text with its control characters as Python writes them: `\\x1b`. Lines stay lines."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
