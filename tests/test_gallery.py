"""The figures beside the library specs: each belongs to the spec as it is, and the list shows them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from matmorph.specs import gallery as module
from matmorph.specs.gallery import (
    dense_language_line,
    dense_line,
    figures,
    figures_line,
    gallery,
    language_figures,
    language_gallery,
    language_line,
    text_hash,
)
from matmorph.specs.load import library_names, library_text

ROW = {"spec": "one", "bytes": 12_340_000, "spearman": 85.5, "time_over_dense": 0.75, "reason": None}
AROUND = {"model": "minilm", "pairs": 1500, "dense": {"bytes": 9e7, "spearman": 86.7}, "environment": {"threads": 1}}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> str:
    """A gallery of one spec; its text."""
    text = "version: 1   # the language\nname: one\n"
    data: Mapping[str, Any] = {**AROUND, "rows": [{**ROW, "sha256": text_hash(text)}]}
    monkeypatch.setattr(module, "gallery", lambda: data)
    return text


def test_every_library_spec_has_figures_of_its_present_text() -> None:
    texts = {name: library_text(name) for name in library_names()}
    assert sorted(row["spec"] for row in gallery()["rows"]) == sorted(texts)
    stale = sorted(set(texts) - set(figures(texts)))
    assert not stale, f"changed since they were measured: {stale}; python benchmarks/gallery.py --write measures all of them again"


def test_figures_belong_to_the_text_that_was_measured(measured: str) -> None:
    assert figures({"one": measured})["one"].spearman == 85.5
    assert figures({"one": measured.replace("the language", "another comment") + "\n# more\n"})["one"].bytes == 12_340_000
    assert figures({"one": measured + "seed: 1\n"}) == {}
    assert figures({"two": measured}) == {}


def test_lines_say_figures_or_why_there_are_none(measured: str) -> None:
    assert figures_line(figures({"one": measured})["one"]) == "MiniLM: 12.3 MB, Spearman 85.50, time 0.75 x dense"
    assert figures_line(None) == "MiniLM: not measured in this form"
    assert figures_line(module.Figures(None, None, None, "no labels")) == "MiniLM: does not fit (no labels)"
    assert dense_line().startswith("MiniLM as it is: 90.0 MB, Spearman 86.70 (STS-B dev, 1,500 pairs")


def test_figures_are_plausible() -> None:
    data = gallery()
    dense = data["dense"]
    for row in data["rows"]:
        if row["reason"] is None:
            assert 0 < row["bytes"] < 1.5 * dense["bytes"]
            assert 50 < row["spearman"] < dense["spearman"] + 1
            assert 0.1 < row["time_over_dense"] < 10
        else:
            assert (row["bytes"], row["spearman"], row["time_over_dense"]) == (None, None, None)
    assert json.loads(json.dumps(data)) == data


def test_figures_of_a_language_model_belong_to_the_text_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "spec": "one",
        "bytes": 182_200_000,
        "perplexity": 25.631,
        "over_dense": 1.0331,
        "samples": 128,
        "sha256": text_hash("version: 1\n"),
    }
    learnt = {**row, "spec": "two", "sha256": text_hash("version: 2\n"), "healed_on": 9000, "unhealed": 1.2}
    setting = {"windows": 16, "window": 512, "length": 256, "dense": {"bytes": 538_600_000, "perplexity": 24.81}}
    monkeypatch.setattr(module, "language_gallery", lambda: {**setting, "rows": [row, learnt]})
    one, two = (language_line(language_figures({name: f"version: {k}\n"})[name]) for k, name in ((1, "one"), (2, "two")))
    assert one == "SmolLM2-135M: 182.2 MB, perplexity 25.63, 1.033 x dense; 128 samples"
    assert two == "SmolLM2-135M: 182.2 MB, perplexity 25.63, 1.033 x dense, 1.200 x before healing on 9,000 tokens; 128 samples"
    assert language_figures({"one": "version: 1\nseed: 1\n"}) == language_figures({"two": "version: 1\n"}) == {}
    assert dense_language_line().startswith("SmolLM2-135M as it is: 538.6 MB, perplexity 24.81 (16 windows of 512 tokens")


def test_specs_for_language_models_have_figures_of_one() -> None:
    texts = {name: library_text(name) for name in library_names()}
    found = language_figures(texts)
    missing = sorted(name for name in texts if name.startswith("llm-") and name not in found)
    assert not missing, f"not measured in this form: {missing}; python benchmarks/perplexity.py --peers --write --specs {' '.join(missing)}"
    data = language_gallery()
    for name, row in found.items():
        assert 0 < row.bytes < data["dense"]["bytes"], name
        assert row.over_dense == pytest.approx(row.perplexity / data["dense"]["perplexity"], rel=1e-3), name  # both are rounded
