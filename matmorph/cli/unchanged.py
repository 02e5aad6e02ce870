"""A model as it is, as a folder: what another one is measured beside, or learns from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matmorph import api
from matmorph.models.resolve import Model
from matmorph.progress import Progress

_KEEP: Mapping[str, Any] = {"version": 1, "name": "original", "rules": [{"match": {"op": "matmul"}, "rewrite": "keep"}]}


def unchanged_folder(model: Model, folder: Path, progress: Progress | None = None) -> Path:
    """Writes `folder`, which must not exist. Raises what compiling raises."""
    compiled = api.compile(
        model.module,
        _KEEP,
        model.example_inputs,
        model.dynamic_shapes,
        kwargs=model.kwargs,
        cache=model.cache,
        progress=progress,
        hf_folder=model.hf_folder,
        weights=model.weights,
    )
    return compiled.save(folder)
