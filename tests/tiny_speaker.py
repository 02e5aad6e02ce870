"""The tiny decoder with a tokenizer and a chat template beside it: a folder that `matmorph generate` and `chat` read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny_artifact import hash_files
from tiny_decoder import EOS, VOCAB, write_decoder

LETTERS = ["<pad>", "<s>", "</s>", *"abcdefghijklm", "\u00c3", "\u00a9", "\u0120", "\u00e6", "\u00bc", "\u00a2", "x"]
"""Each a byte in the byte-level alphabet: C3 A9 is é, E6 BC A2 is 漢, U+0120 a space. So random tokens hold halves of characters."""
TEMPLATE = """{%- for message in messages %}
{{ message.role[0] }} {{ message.content }}
{%- endfor %}
{%- if add_generation_prompt %}{% generation %} x{% endgeneration %}{% endif %}"""
SETTINGS = {"eos_token": "</s>", "pad_token": {"content": "<pad>"}}


def tokenizer_text() -> str:
    tokenizers = pytest.importorskip("tokenizers", reason="text needs the package tokenizers")
    assert len(LETTERS) == VOCAB
    made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: number for number, letter in enumerate(LETTERS)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(LETTERS[:3])
    made.enable_truncation(2)  # which must not cut prompts
    made.enable_padding(length=8)
    return str(made.to_str())


def folder_with(place: Path, **more: Any) -> Path:
    """Files of None are left out; `__` in a name stands for its dot."""
    folder = write_decoder(place)
    own = {
        "tokenizer.json": tokenizer_text(),
        "tokenizer_config.json": SETTINGS,
        "chat_template.jinja": TEMPLATE,
        "generation_config.json": {"eos_token_id": EOS, "pad_token_id": 0},
    }
    files = {**own, **{name.replace("__", "."): data for name, data in more.items()}}
    told(folder, {name: data for name, data in files.items() if data is not None})
    return folder


def told(folder: Path, files: Mapping[str, Any]) -> None:
    """The files, and a manifest that lists them."""
    for name, data in files.items():
        (folder / name).write_text(data if isinstance(data, str) else json.dumps(data))
    manifest = json.loads((folder / "manifest.json").read_text())
    hash_files(folder, **{key: value for key, value in manifest.items() if key != "files"})
