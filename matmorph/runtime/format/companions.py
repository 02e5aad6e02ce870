"""The files of a Hugging Face folder that travel with its model: its configurations, its tokenizer and its chat template, under the names
that transformers, onnxruntime-genai, optimum and transformers.js look for. The list is closed, so that no name of a source folder can be
one of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matmorph.runtime.format.plain import typed
from matmorph.runtime.format.reading import parse_json, reading

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
VOCABULARIES = (
    TOKENIZER,
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "spm.model",
    "vocab.json",
    "vocab.txt",
)
"""A folder with one of these has a tokenizer."""
COMPANIONS = (
    CONFIG,
    GENERATION,
    *VOCABULARIES,
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    TOKENIZER_CONFIG,
    CHAT_TEMPLATE,
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
    "n_ctx",
    "max_target_positions",
)
"""Keys of config.json that say how many positions there are; the first that does is right."""
GENAI = "genai_config.json"
"""What onnxruntime-genai reads first; written by us."""


def companion_table(data: bytes, path: Path) -> dict[str, Any]:
    """The JSON table that a configuration is. `path`: what errors call it. Raises StoredError for something else."""
    with reading(path):
        text = data.decode("utf-8")
    found: dict[str, Any] = parse_json(text, path, lambda value: typed(value, dict, "the file"))
    return found
