"""What a Hugging Face folder may ask of transformers. The library follows what the folder's files say: it loads kernels from a hub, reads
weights wherever an index or a setting points, takes the base of an adapter from elsewhere. None of that happens for a folder that passed
here: no code is loaded for it, and nothing outside it is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matmorph.errors import InputError
from matmorph.runtime.format.plain import ManifestError
from matmorph.runtime.format.reading import StoredError, check_name, entries, inside, read_json

_READ = (".json", ".safetensors", ".bin", ".pt", ".model", ".gguf")
"""Endings of the files that transformers looks for."""
_ADAPTER = "adapter_config.json"
_ELSEWHERE = ("transformers_weights", "gguf_file")
"""Settings that name a file with weights."""


def judge_folder(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises InputError that names the file and the setting: a link or a name that leads out of the folder, a kernel from a hub, an adapter
    of another model."""
    try:
        for path in sorted(folder.iterdir()):
            if path.suffix in _READ:
                inside(folder, path.name)
        _judge_config(folder / "config.json", config)
        for path in sorted(folder.glob("*.index.json")):
            read_json(path, _judge_index)
    except StoredError as error:
        raise InputError(str(error)) from error
    except ManifestError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from error
    if (folder / _ADAPTER).exists():
        raise InputError(
            f"{folder}: holds {_ADAPTER}, for which transformers would read another model elsewhere",
            ["give the folder of the whole model; `matmorph adapter from-peft` reads adapters"],
        )


def refused_code(config: Mapping[str, Any]) -> str:
    """What an unknown architecture may come from: "; auto_map names code of the folder, which is not run", or nothing."""
    return "; its auto_map names code of the folder, which is not run" if config.get("auto_map") else ""


def _judge_config(path: Path, config: Mapping[str, Any]) -> None:
    for key, value in entries(config):
        if key.rstrip("s").endswith("implementation"):
            names = list(value.values()) if isinstance(value, dict) else [value]
            strange = next((name for name in names if isinstance(name, str) and not name.replace("_", "").isalnum()), None)
            if strange is not None:
                raise InputError(f"{path}: {key}: {json.dumps(strange)} is a kernel that would be loaded and run, and is not")
        if key in _ELSEWHERE and value is not None:
            check_name(value, f"{key}: {json.dumps(value)}")


def _judge_index(data: Any) -> None:
    names = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(names, dict):
        raise ManifestError("weight_map: missing")
    for weight, name in names.items():
        check_name(name, f"weight_map: {weight}: {name!r:.80}")
