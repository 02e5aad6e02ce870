"""`Generator` on compiled models of transformers: tokens equal to `generate`, one by one; adapters equal to merged models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cached_models import FAMILIES, LAYERS, built, llama, tokens
from torch import nn

import matmorph as mm
from matmorph.exporters.adapters import adapter_arrays
from matmorph.passes.methods import all_methods
from matmorph.runtime import Generator, PromptCache, Session
from matmorph.runtime.adapters import read_slots, save_adapter

KEEP: dict[str, Any] = {"version": 1, "rules": [{"match": {"op": "matmul"}, "rewrite": "keep"}]}
ROWS = [tokens(1, length, seed=length)[0].tolist() for length in (13, 20, 4)]
NEW, PAD = 16, 0
CLEAR = 1e-4
"""Least gap between the two best logits: relative to the largest: 20 times what float32 moves a logit of these models by (`CLOSE` of
test_cached_call)."""


def generated(module: nn.Module, row: Sequence[int]) -> list[int]:
    """Greedy tokens of transformers, with no end token; no choice may be a near tie."""
    model: Any = module
    ids = torch.tensor([list(row)])
    how = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    with torch.no_grad():
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), output_scores=True, return_dict_in_generate=True, use_cache=True, **how
        )
    best = torch.stack(found.scores, 1)[0].topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > CLEAR * best.abs().max(), "a near tie: choose another prompt"
    tokens: list[int] = found.sequences[0, len(row) :].tolist()
    return tokens


@pytest.mark.parametrize("name", [name if name == "llama" else pytest.param(name, marks=pytest.mark.full) for name in FAMILIES])
@pytest.mark.parametrize(
    "attention", ["plain", pytest.param("standard", marks=pytest.mark.full), pytest.param("gqa", marks=pytest.mark.full)]
)
def test_tokens_are_those_of_transformers(name: str, attention: str, tmp_path: Path) -> None:
    module = built(FAMILIES[name])
    spec = KEEP if attention == "plain" else {**KEEP, "export": {"attention": attention, "target": ["cpu"]}}
    folder = mm.compile(module, spec, {"input_ids": tokens(2, 16)}, cache=True).save(tmp_path / "out")
    generator = Generator(folder, ["cpu"], threads=1)
    expected = [generated(module, row) for row in ROWS]
    how: dict[str, Any] = {"eos": [], "pad": PAD}
    assert generator.generate(ROWS, max_new_tokens=NEW, **how).tolist() == expected  # padded, whole
    for row, wanted in zip(ROWS, expected, strict=True):
        assert generator.generate([row], max_new_tokens=NEW, **how).tolist() == [wanted]
        cache = PromptCache()
        generator.generate([row[:3]], max_new_tokens=1, cache=cache, **how)
        assert generator.generate([row], max_new_tokens=NEW, cache=cache, **how).tolist() == [wanted]  # split
        cache = PromptCache()
        for length in range(1, len(row)):
            generator.generate([row[:length]], max_new_tokens=1, cache=cache, **how)  # token by token
        assert generator.generate([row], max_new_tokens=NEW, cache=cache, **how).tolist() == [wanted]


# ---- adapters on a serving model

ADAPTED: dict[str, Any] = {
    "lora": {"lora": {"rank": 4, "alpha": 8}},
    "loftq": {"loftq": {"quantizer": "uniform", "bits": 4, "block_size": 16, "rank": 4}},
    "tt_lora": {"tt_lora": {"rank": 3, "alpha": 8, "cores": 4}},
}


def numbers(found: mm.Compiled, seed: int) -> dict[str, torch.Tensor]:
    """For every factor."""
    g = torch.Generator().manual_seed(seed)
    shapes = {name: parameter.shape for name, parameter in found.module.named_parameters()}
    return {name: 0.4 * torch.randn(shapes[name], generator=g) for adapter in found.adapters for name in adapter.consts.values()}


@pytest.mark.full
@pytest.mark.parametrize("method", ADAPTED)
def test_adapters_of_one_session_answer_as_merged_models(method: str, tmp_path: Path) -> None:
    """Merged: the numbers in the graph, no adapter input left. Another order of the products, so choices are checked for near ties."""
    rule = {"match": {"role": "attention.{q,v}"}, "expect": 2 * LAYERS, "rewrite": ADAPTED[method]}
    spec = {"version": 1, "rules": [rule], "export": {"adapters": "inputs", "target": ["cpu"]}}
    inline = {**spec, "export": {"target": ["cpu"]}}
    compile_: Callable[[Any], mm.Compiled] = lambda spec: mm.compile(built(llama), spec, {"input_ids": tokens(2, 16)}, cache=True)  # noqa: E731
    served, plain = compile_(spec), compile_(inline)
    folder = served.save(tmp_path / "served")
    generator = Generator(folder, ["cpu"], threads=1)
    slots = read_slots(generator.manifest.adapters, str(folder))
    how: dict[str, Any] = {"max_new_tokens": NEW, "eos": [], "pad": PAD}
    loaded, expected = [], []
    for seed in (1, 2):
        values = numbers(served, seed)
        save_adapter(tmp_path / f"{seed}", adapter_arrays(served.adapters, values, all_methods()), slots)
        loaded.append(generator.load_adapter(tmp_path / f"{seed}"))
        merged = plain.load_trained(values).save(tmp_path / f"merged{seed}")
        expected.append(Generator(merged, ["cpu"], threads=1).generate(ROWS, **how).tolist())
        clear(merged, [[*row, *new] for row, new in zip(ROWS, expected[-1], strict=True)])
    base = generator.generate(ROWS, **how).tolist()
    assert expected[0] != expected[1]
    assert base not in expected
    for number in (0, 1, 0):
        assert generator.generate(ROWS, adapter=loaded[number], **how).tolist() == expected[number]
        assert generator.generate(ROWS, **how).tolist() == base


def clear(folder: Path, rows: Sequence[Sequence[int]]) -> None:
    """No choice behind a prompt is a near tie."""
    session = Session(folder, ["cpu"])
    for row in rows:
        past = {
            info.name: np.zeros([dim if isinstance(dim, int) else int(axis == 0) for axis, dim in enumerate(info.shape)], np.float32)
            for info in session.inputs[3:]
        }
        ids = np.array([row])
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(len(row))[None]}
        logits = np.sort(session.run({**feeds, **past})["logits"][0, -NEW - 1 : -1], -1)
        assert (logits[:, -1] - logits[:, -2]).min() > CLEAR * np.abs(logits).max(), "a near tie: choose another seed"
