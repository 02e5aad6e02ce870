"""What each library spec makes of MiniLM, as `benchmarks/gallery.py` measured it: the figures beside the names in `matmorph specs list`.

The figures lie in `library/measured.json`, written by that script and never by hand. A row belongs to the text that was measured: where a
spec has changed since, its figures are not shown.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

FILE = "measured.json"


@dataclass(frozen=True, slots=True)
class Figures:
    """MiniLM under one spec: initializer bytes, Spearman x 100 on STS-B dev, ONNX Runtime time over dense; or why there are none."""

    bytes: int | None
    spearman: float | None
    time: float | None
    reason: str | None = None


def text_hash(text: str) -> str:
    """sha256 of a spec's lines without comments, blank lines and white space at the ends."""
    lines = [line.split(" #", 1)[0].rstrip() for line in text.splitlines() if not line.lstrip().startswith("#")]
    return hashlib.sha256("\n".join(line for line in lines if line).encode()).hexdigest()


def gallery() -> Mapping[str, Any]:
    """The measured file: "dense", "rows", "environment"."""
    data: dict[str, Any] = json.loads((resources.files("matmorph.specs") / "library" / FILE).read_text(encoding="utf-8"))
    return data


def figures(texts: Mapping[str, str]) -> dict[str, Figures]:
    """The figures of each spec (name -> its text) that was measured as it is now."""
    found: dict[str, Figures] = {}
    for row in gallery()["rows"]:
        text = texts.get(row["spec"])
        if text is not None and text_hash(text) == row["sha256"]:
            found[row["spec"]] = Figures(row["bytes"], row["spearman"], row["time_over_dense"], row["reason"])
    return found


def foreign(row: Figures | None) -> bool:
    """Whether the spec was tried on MiniLM and is for models of another form."""
    return row is not None and row.reason is not None


def figures_line(row: Figures | None) -> str:
    """One line for a person."""
    if row is None:
        return "MiniLM: not measured in this form"
    if row.reason is not None or row.bytes is None or row.spearman is None or row.time is None:
        return f"MiniLM: does not fit ({row.reason})"
    return f"MiniLM: {row.bytes / 1e6:.1f} MB, Spearman {row.spearman:.2f}, time {row.time:.2f} x dense"


def dense_line() -> str:
    """What the figures stand beside."""
    data = gallery()
    dense, around = data["dense"], data["environment"]
    threads = f"{around['threads']} CPU thread{'s' if around['threads'] != 1 else ''}"
    return (
        f"MiniLM as it is: {dense['bytes'] / 1e6:.1f} MB, Spearman {dense['spearman']:.2f} (STS-B dev, {data['pairs']:,} pairs, x 100); "
        f"time: ONNX Runtime on {threads}, 16 sentences, over the dense model"
    )
