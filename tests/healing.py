"""What the tests of healing share: a tiny Llama that has learnt a text, as a folder with a tokenizer, and rank-cut artefacts of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import matmorph as mm
from matmorph.models.hf_folder import quiet_loading
from matmorph.models.resolve import resolve

LETTERS = "abcdefghijklmnop"
WINDOW = 24
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
TRAIN: dict[str, Any] = {
    "loss": "distill",
    "distill": {"top": 5},
    "trainable": ["factors"],
    "optimizer": {"adamw": {"lr": 0.05, "weight_decay": 0.0}},
}


def text_of(letters: int, seed: int) -> str:
    """A letter follows another by a rule nine times of ten."""
    rng = np.random.default_rng(seed)
    found = [0]
    for _ in range(letters - 1):
        found.append((3 * found[-1] + 1) % 16 if rng.random() < 0.9 else int(rng.integers(16)))
    return "".join(LETTERS[k] for k in found)


def source(place: Path) -> Path:
    """A Hugging Face folder of a Llama that knows the rule; a word each letter, and two that never come."""
    transformers = pytest.importorskip("transformers", reason="the model is one of transformers")
    tokenizers = pytest.importorskip("tokenizers", reason="text needs the package tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE({letter: number for number, letter in enumerate([*LETTERS, "y", "z"])}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    with quiet_loading(transformers), torch.random.fork_rng():
        torch.manual_seed(3)
        config = transformers.LlamaConfig(vocab_size=18, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, **SIZES)
        model = transformers.LlamaForCausalLM(config)
        letters = torch.tensor([LETTERS.index(letter) for letter in text_of(100 * 32 * WINDOW, 0)])
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for ids in letters.reshape(100, 32, WINDOW):  # each row is seen once: nothing is learnt by heart
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        model.save_pretrained(place)
    made.save(str(place / "tokenizer.json"))
    return place


def artefact(model: Path, place: Path, rewrite: Any, train: Any = None, match: Any = None) -> Path:
    """The folder by one rule, of all matmuls where no match is given; `train` None: without training graphs."""
    found = resolve(str(model), cache=False)
    rule = {"match": match or {"op": "matmul"}, "rewrite": rewrite, "force": True}
    spec = {"version": 1, "name": "s", "rules": [rule], **({} if train is None else {"train": train})}
    given = {"kwargs": found.kwargs, "hf_folder": found.hf_folder}
    return mm.compile(found.module, spec, found.example_inputs, found.dynamic_shapes, **given).save(place)
