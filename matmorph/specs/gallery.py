"""What each library spec makes of MiniLM, and some of a language model: the figures beside the names in `matmorph specs list --long`.

They lie in `library/measured.json` and `library/language.json`, written by `benchmarks/gallery.py` and `benchmarks/perplexity.py` and never
by hand. A row belongs to the text that was measured: where a spec has changed since, its figures are not shown.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

FILE, LANGUAGE_FILE = "measured.json", "language.json"


@dataclass(frozen=True, slots=True)
class Figures:
    """MiniLM under one spec: initializer bytes, Spearman x 100 on STS-B dev, ONNX Runtime time over dense; or why there are none."""

    bytes: int | None
    spearman: float | None
    time: float | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class LanguageFigures:
    """SmolLM2-135M under one spec: bytes of the files, perplexity, and that over the dense model's; `samples` of text that it was
    calibrated on; `healed_on`: tokens that it has learnt from since it was compiled, when it stood at `unhealed` x dense."""

    bytes: int
    perplexity: float
    over_dense: float
    samples: int
    healed_on: int | None = None
    unhealed: float | None = None


def text_hash(text: str) -> str:
    """sha256 of a spec's lines without comments, blank lines and white space at the ends."""
    lines = [line.split(" #", 1)[0].rstrip() for line in text.splitlines() if not line.lstrip().startswith("#")]
    return hashlib.sha256("\n".join(line for line in lines if line).encode()).hexdigest()


def gallery() -> Mapping[str, Any]:
    """The measured file: "dense", "rows", "environment"."""
    return _read(FILE)


def language_gallery() -> Mapping[str, Any]:
    """The same of the language model."""
    return _read(LANGUAGE_FILE)


def _read(name: str) -> Mapping[str, Any]:
    data: dict[str, Any] = json.loads((resources.files("matmorph.specs") / "library" / name).read_text(encoding="utf-8"))
    return data


def figures(texts: Mapping[str, str]) -> dict[str, Figures]:
    """The figures of each spec (name -> its text) that was measured as it is now."""
    rows = _of_these_texts(gallery(), texts)
    return {row["spec"]: Figures(row["bytes"], row["spearman"], row["time_over_dense"], row["reason"]) for row in rows}


def language_figures(texts: Mapping[str, str]) -> dict[str, LanguageFigures]:
    """The same of the language model, for the few that were measured on it."""
    rows = _of_these_texts(language_gallery(), texts)
    names = [field.name for field in fields(LanguageFigures)]
    return {row["spec"]: LanguageFigures(**{name: row[name] for name in names if name in row}) for row in rows}


def _of_these_texts(data: Mapping[str, Any], texts: Mapping[str, str]) -> list[Mapping[str, Any]]:
    return [row for row in data["rows"] if row["spec"] in texts and text_hash(texts[row["spec"]]) == row["sha256"]]


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


def language_line(row: LanguageFigures) -> str:
    """One line for a person."""
    healed = "" if row.unhealed is None else f", {row.unhealed:.3f} x before healing on {row.healed_on or 0:,} tokens"
    figures = f"{row.bytes / 1e6:.1f} MB, perplexity {row.perplexity:.2f}, {row.over_dense:.3f} x dense{healed}"
    return f"SmolLM2-135M: {figures}; {row.samples} samples"


def dense_language_line() -> str:
    """What those figures stand beside."""
    data = language_gallery()
    dense = data["dense"]
    judged = f"{data['windows']} windows of {data['window']} tokens of WikiText-2's validation text"
    seen = f"calibrated on samples of {data['length']} tokens of its other half"
    return f"SmolLM2-135M as it is: {dense['bytes'] / 1e6:.1f} MB, perplexity {dense['perplexity']:.2f} ({judged}; {seen})"
