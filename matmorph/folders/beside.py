"""What lies beside a model in its folder: the source's configurations and tokenizer as they were, and what onnxruntime-genai reads.

The folder is at once one that onnxruntime-genai opens (`genai_config.json`, `model.onnx`, tokenizer) and one that optimum opens
(`config.json`, `model.onnx`). The source's files are not rewritten: where a rewrite made one of their figures untrue, a note says which.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matmorph.errors import InputError
from matmorph.exporters.artifact import json_bytes
from matmorph.exporters.layouts.genai import genai_config
from matmorph.folders.job import Job
from matmorph.ir.core import Graph
from matmorph.passes.methods import all_methods
from matmorph.report.model import SiteRow
from matmorph.runtime.format.cache import CacheInfo
from matmorph.runtime.format.companions import COMPANIONS, CONFIG, GENAI, GENERATION, VOCABULARIES, companion_table
from matmorph.runtime.format.folder import StoredFolder
from matmorph.runtime.format.reading import StoredError
from matmorph.runtime.targets import chosen_targets

WIDTHS = {
    "mlp": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "inner_dim"),
    "attention": ("num_attention_heads", "num_key_value_heads", "head_dim", "n_head"),
}
"""Keys of a configuration that say how wide a block is, by the first word of its role."""


@dataclass(frozen=True, slots=True)
class Beside:
    """`files`: by name. `notes`: plain lines for the report and the manifest."""

    files: Mapping[str, bytes]
    notes: tuple[str, ...] = ()


def beside_model(job: Job, graph: Graph, cache: CacheInfo | None) -> Beside:
    """What goes into the folder beside the model `graph`. Nothing for a model that came without a Hugging Face folder.

    Raises InputError for a configuration that is no JSON table.
    """
    if CONFIG not in job.source_files:
        return Beside({})
    config, generation = _table(job.source_files, CONFIG), _table(job.source_files, GENERATION)
    notes = tuple(_untrue(config, job.report.sites))
    if cache is None:
        return Beside(job.source_files, notes)
    if config.get("is_encoder_decoder"):
        return Beside(job.source_files, (*notes, *_lacking(job.source_files), "no genai_config.json: the model has an encoder"))
    inputs = {entry.name: entry.value.tensor.shape for entry in graph.signature.inputs if entry.value is not None}
    values = zip(graph.signature.outputs, graph.outputs, strict=True)
    outputs = {name: value.tensor.shape for name, value in values if hasattr(value, "tensor")}
    genai = genai_config(config, generation, cache, inputs, outputs, _providers(job))
    notes = (*notes, *_lacking(job.source_files), *genai.notes)
    return Beside(job.source_files if genai.data is None else {**job.source_files, GENAI: json_bytes(genai.data)}, notes)


def stored_companions(stored: StoredFolder) -> dict[str, bytes]:
    """Those of a folder that is opened again. StoredError as `StoredFolder.checked`."""
    return {name: stored.checked(name).read_bytes() for name in COMPANIONS if name in stored.files}


def _table(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        return companion_table(files[name], Path(name))
    except StoredError as error:
        raise InputError(f"{error} (it lies beside the model)") from error


def _providers(job: Job) -> tuple[str, ...]:
    """genai's names of the devices the file is for, where the CPU is none of them: it does not fall back by itself."""
    names = [target.name for target in chosen_targets(job.spec.export.target)]
    return () if "cpu" in names else tuple(names)


def _lacking(files: Mapping[str, bytes]) -> Iterator[str]:
    if not any(name in files for name in VOCABULARIES):
        yield "the source folder has no tokenizer, so the artefact takes and gives token ids alone"


def _untrue(config: Mapping[str, Any], rows: Iterable[SiteRow]) -> Iterator[str]:
    """A note for each kind of block that is narrower than config.json says."""
    blocks = {name for name, method in all_methods().items() if method.kind == "block"}
    narrowed = [(row, part.method) for row in rows for part in row.parts if row.status == "rewritten" and part.method in blocks]
    for kind, keys in WIDTHS.items():
        found = [(row, method) for row, method in narrowed if kind in row.role.partition(".")[0]]
        said = [f"{key} ({config[key]})" for key in keys if isinstance(config.get(key), int)]
        if found and said:
            layers = len({row.layer for row, _ in found})
            where = f"{layers} layer{'s' if layers > 1 else ''} that {found[0][1]} narrowed"
            yield f"{CONFIG} is the source's: {', '.join(said)} no longer hold{'s' if len(said) == 1 else ''} in {where}"
