"""A compiled model as another runtime wants its folder: model, weights, configurations and tokenizer, and nothing of ours.

What `compile` writes can be opened by onnxruntime-genai and optimum as it is; their trees here are the same files without reports, check
vectors and training graphs. transformers.js looks for `onnx/model.onnx` and, in a browser, for its weights under no other name than
`model.onnx_data`, so that its model file is written anew with that name in it; and for the chat template nowhere but in
tokenizer_config.json.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import onnx

from matmorph.errors import InputError
from matmorph.exporters.artifact import json_bytes
from matmorph.exporters.staging import FolderKind, staged_folder
from matmorph.runtime.format.artifact import DATA, ENCODER, MODEL
from matmorph.runtime.format.cache import CacheInfo
from matmorph.runtime.format.companions import CHAT_TEMPLATE, COMPANIONS, CONFIG, GENAI, TOKENIZER_CONFIG, companion_table
from matmorph.runtime.format.folder import StoredFolder
from matmorph.runtime.format.reading import StoredError, read_text, reading


@dataclass(frozen=True, slots=True)
class Layout:
    """`opens`: the file that its runtime looks for first. `model`, `data`: where these go. `settings`: keys put into config.json.
    `joined`: the chat template goes into tokenizer_config.json too, where that has none."""

    name: str
    opens: str
    model: str = MODEL
    data: str = DATA
    settings: Mapping[str, Any] = field(default_factory=dict)
    joined: bool = False


_JS = "transformers.js_config"
_JS_SETTINGS = {"use_external_data_format": True, "dtype": "fp32"}
"""transformers.js takes `dtype` for the ending of the file's name, and fp32 for none."""
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("genai", GENAI),
        Layout("hf", CONFIG),
        Layout("transformers.js", CONFIG, f"onnx/{MODEL}", f"onnx/{MODEL}_data", {_JS: _JS_SETTINGS}, joined=True),
    )
}
"""By name."""


def _is_tree(folder: Path) -> bool:
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    files = {place for layout in LAYOUTS.values() for place in (layout.model, layout.data)}
    return bool(names & files) and names <= {*files, *COMPANIONS, GENAI}


TREE = FolderKind("a model laid out for another runtime", _is_tree)


def write_tree(stored: StoredFolder, layout: Layout, folder: Path, force: bool = False, cache: CacheInfo | None = None) -> tuple[str, ...]:
    """Writes the tree of an artefact folder, whole or not at all; the names of its files. Each file is held against the manifest first.
    `cache`: what the manifest says of one.

    Raises InputError for an artefact that lacks what the runtime opens, for a cache that none of them feeds, and as `staged_folder`;
    StoredError for a damaged file.
    """
    coded = next((slot for slot in cache.slots if slot.scales is not None), None) if cache is not None else None
    if coded is not None:
        raise InputError(
            f"{stored.path}: its cache is int8 codes and their scales ({coded.past}, {coded.scales}), and layout {layout.name} is for a "
            "runtime that feeds keys and values alone",
            ["matmorph's own runtime runs it; for others compile with export.cache float"],
        )
    if ENCODER in stored.files:
        raise InputError(
            f"{stored.path}: the model has an encoder, and layout {layout.name} is of decoders alone",
            ["matmorph.runtime.Seq2SeqGenerator and matmorph generate run it"],
        )
    if layout.opens not in stored.files:
        why = "the model has no key/value cache that it can run, or was compiled from no Hugging Face folder"
        raise InputError(
            f"{stored.path}: has no {layout.opens}, which layout {layout.name} needs", [why, "the notes in its manifest say more"]
        )
    sources = {layout.model: MODEL, layout.data: DATA, **{name: name for name in (layout.opens, *COMPANIONS)}}
    sources = {place: name for place, name in sources.items() if name in stored.files}
    with staged_folder(folder, force, TREE) as staging:
        for place, name in sources.items():
            target = staging / place
            target.parent.mkdir(exist_ok=True)
            _placed(stored, target, name, layout)
    return tuple(sources)


def _placed(stored: StoredFolder, target: Path, name: str, layout: Layout) -> None:
    source = stored.checked(name)
    if name == MODEL and PurePosixPath(layout.data).name != DATA:
        target.write_bytes(_relocated(source, PurePosixPath(layout.data).name))
    elif name == CONFIG and layout.settings:
        target.write_bytes(_with_settings(source, layout.settings))
    elif name == TOKENIZER_CONFIG and layout.joined and CHAT_TEMPLATE in stored.files:
        target.write_bytes(_with_template(source, stored.checked(CHAT_TEMPLATE)))
    else:
        shutil.copyfile(source, target)


def _relocated(model: Path, data: str) -> bytes:
    """The model file with its weights in a file of another name."""
    with reading(model):
        found = onnx.load(model, load_external_data=False)
    for tensor in found.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value != DATA:
                raise StoredError(f"{model}: {tensor.name!r:.80} lies in {entry.value!r:.80}; weights lie in {DATA}")
            if entry.key == "location":
                entry.value = data
    return bytes(found.SerializeToString(deterministic=True))


def _with_settings(config: Path, settings: Mapping[str, Any]) -> bytes:
    found = companion_table(config.read_bytes(), config)
    given = {key: {**value, **found[key]} if isinstance(found.get(key), dict) else value for key, value in settings.items()}
    return json_bytes({**found, **given})


def _with_template(tokenizer_config: Path, template: Path) -> bytes:
    found = companion_table(tokenizer_config.read_bytes(), tokenizer_config)
    return json_bytes({"chat_template": read_text(template), **found})
