"""`genai_config.json`: what onnxruntime-genai must know of a decoder with a key/value cache.

Its reader knows a closed list of keys and of model types, and takes anything else for an error (read in its `src/config.cpp` and
`src/models/model_type.h`, and tried key by key, version 0.18). Shapes it reads from the graph; the figures here are for people and for
other readers of the file, so they are the graph's too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from matmorph.runtime.format.artifact import MODEL
from matmorph.runtime.format.cache import CacheInfo, CacheSlot
from matmorph.runtime.format.companions import CONFIG, LENGTHS

Shape: TypeAlias = Sequence[Any]
"""Sizes; what is no int is dynamic."""

GENERIC = "decoder"
"""The type of any model with a pair of tensors per layer."""
TYPES = {
    **{name: name for name in ("chatglm", "ernie4_5", "gemma", "gemma2", "gemma3_text", "granite", "internlm2", "llama", "mistral")},
    **{name: name for name in ("nemotron", "olmo", "phi", "phi3", "phi3small", "phimoe", "qwen2", "qwen3", "smollm3")},
    "gpt_oss": "gptoss",
}
"""genai's type by `model_type`. Its `gpt2` means one tensor per layer for keys and values together, `lfm2` a state of convolutions: neither
is what a file of ours takes, so they are `decoder` as everything else is."""
SEARCH = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size")
"""Keys of generation_config.json that mean the same in genai's `search`."""
_COUNTS = ("num_attention_heads", "n_head", "num_heads")
INPUTS = ("input_ids", "attention_mask", "position_ids")
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class GenaiConfig:
    """`data`: of the file, None where genai cannot run the model, which a note then says. `notes`: what had to be filled in."""

    data: Mapping[str, Any] | None
    notes: tuple[str, ...]


def genai_config(
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    cache: CacheInfo,
    inputs: Mapping[str, Shape],
    outputs: Mapping[str, Shape],
    providers: Sequence[str] = (),
) -> GenaiConfig:
    """The file for a decoder. `config`, `generation`: the source's configurations. `inputs`, `outputs`: shapes of the ONNX file by name.
    `providers`: genai's names of execution providers to ask for, () = the CPU."""
    nested = config.get("text_config")
    text: Mapping[str, Any] = nested if isinstance(nested, dict) else config
    facts = _facts(text, cache, inputs, outputs)
    if isinstance(facts, str):
        return GenaiConfig(None, (f"no genai_config.json: {facts}",))
    kind, said = _type(text)
    tokens, unsaid = _tokens(text, generation, facts.vocabulary)
    model = {"type": kind, **tokens, "vocab_size": facts.vocabulary, "context_length": facts.length}
    decoder = {
        "filename": MODEL,
        "session_options": {"provider_options": [{name: {}} for name in providers]},
        **_figures(text, cache, inputs),
        "inputs": {
            **{name: name for name in INPUTS if name in inputs},
            "past_key_names": facts.names[0],
            "past_value_names": facts.names[1],
        },
        "outputs": {"logits": "logits", "present_key_names": facts.names[2], "present_value_names": facts.names[3]},
    }
    search = {name: generation[name] for name in SEARCH if _plain_number(generation.get(name))}
    search |= {"max_length": facts.length, "past_present_share_buffer": cache.share_buffer}
    return GenaiConfig({"model": {**model, "decoder": decoder}, "search": search}, (*said, *unsaid))


@dataclass(frozen=True, slots=True)
class _Facts:
    """`names`: of past keys, past values, present keys and present values, with %d for the layer."""

    names: tuple[str, str, str, str]
    vocabulary: int
    length: int


def _facts(text: Mapping[str, Any], cache: CacheInfo, inputs: Mapping[str, Shape], outputs: Mapping[str, Shape]) -> _Facts | str:
    """What the file must say, or why genai cannot run the model."""
    if "input_ids" not in inputs or "logits" not in outputs:
        return "it runs models from input_ids to logits"
    slots = {slot.past for slot in cache.slots}
    other = next((name for name in inputs if name not in slots and name not in INPUTS), None)
    if other is not None:
        return f"it would not feed the input {other}"
    coded = next((slot for slot in cache.slots if slot.scales is not None), None)
    if coded is not None:
        return f"it would not feed the scales of a cache in codes ({coded.scales})"
    names = _slot_names(cache.slots)
    if names is None:
        return "it takes one pair of keys and values per layer, named by the layer's number"
    vocabulary = outputs["logits"][-1]
    if not isinstance(vocabulary, int):
        return "the size of the vocabulary is not fixed"
    length = cache.max_length or _first_int(text, LENGTHS)
    return f"{CONFIG} does not say how many positions the model has" if length is None else _Facts(names, vocabulary, length)


def _slot_names(slots: Sequence[CacheSlot]) -> tuple[str, str, str, str] | None:
    """Names of past keys, past values, present keys and present values with %d for the layer; None where they have no such form."""
    past = {slot.past: slot.present for slot in slots}
    layers = len(slots) // 2
    first = [slot for slot in slots if _NUMBER.findall(slot.past) == ["0"] and _NUMBER.findall(slot.present) == ["0"]]
    keys = [slot for slot in first if slot.past.endswith("key")]
    values = [slot for slot in first if slot.past.endswith("value")]
    if len(keys) != 1 or len(values) != 1:
        return None
    forms = tuple(_NUMBER.sub("%d", name) for name in (keys[0].past, values[0].past, keys[0].present, values[0].present))
    numbered = {forms[0] % n: forms[2] % n for n in range(layers)} | {forms[1] % n: forms[3] % n for n in range(layers)}
    return (forms[0], forms[1], forms[2], forms[3]) if numbered == past else None


def _type(text: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    name = text.get("model_type")
    found = TYPES.get(name) if isinstance(name, str) else None
    note = f"genai_config.json: type is {GENERIC}, for {name!r:.80} is none that onnxruntime-genai has with a pair of tensors per layer"
    return (found, ()) if found is not None else (GENERIC, (note,))


def _tokens(text: Mapping[str, Any], generation: Mapping[str, Any], vocabulary: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Ids of the special tokens; generation_config.json comes first, as in transformers. Without an end token genai ends at the pad token,
    for which the last of the vocabulary then stands: id 0, genai's own, is written by many models."""
    bos, eos, pad = (_token(name, generation, text) for name in ("bos_token_id", "eos_token_id", "pad_token_id"))
    notes = []
    ends = [eos] if isinstance(eos, int) else eos or []
    if not isinstance(pad, int):
        pad = ends[0] if ends else vocabulary - 1
        notes.append(f"genai_config.json: the source names no pad_token_id; {pad} stands for it")
    if not ends:
        notes.append(
            f"genai_config.json: the source names no eos_token_id; onnxruntime-genai ends at the pad token, {pad}, and at max_length"
        )
    named = {"bos_token_id": bos if isinstance(bos, int) else None, "eos_token_id": ends or None, "pad_token_id": pad}
    return {name: value for name, value in named.items() if value is not None}, tuple(notes)


def _token(name: str, *places: Mapping[str, Any]) -> int | list[int] | None:
    for place in places:
        value = place.get(name)
        if _is_id(value) or (isinstance(value, list) and value and all(map(_is_id, value))):
            return value
    return None


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _plain_number(value: Any) -> bool:
    return isinstance(value, bool | int | float)


def _figures(text: Mapping[str, Any], cache: CacheInfo, inputs: Mapping[str, Shape]) -> dict[str, int]:
    """What genai does not need; a figure that differs between layers is left out."""
    shapes = [inputs[slot.past] for slot in cache.slots]
    groups = _same([shape[1] for shape in shapes])
    whole = groups == _first_int(text, ("num_key_value_heads", *_COUNTS))  # else heads were pruned, and the source's number says nothing
    found = {
        "head_size": _same([shape[3] for shape in shapes]),
        "hidden_size": _first_int(text, ("hidden_size", "n_embd", "d_model")),
        "num_attention_heads": _first_int(text, _COUNTS) if whole else None,
        "num_hidden_layers": len(cache.slots) // 2,
        "num_key_value_heads": groups,
    }
    return {name: value for name, value in found.items() if value is not None}


def _same(sizes: Sequence[Any]) -> int | None:
    return sizes[0] if len(set(sizes)) == 1 and isinstance(sizes[0], int) else None


def _first_int(text: Mapping[str, Any], names: Sequence[str]) -> int | None:
    return next((text[name] for name in names if _is_id(text.get(name)) and text[name] > 0), None)
