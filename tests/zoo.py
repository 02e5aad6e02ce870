"""Tiny random models of every architecture the tests speak of, with example inputs and what a reader of the module tree expects to find.

    model, inputs, dynamic_shapes = ZOO["bert"].build()

Nothing is built at import. All sizes that could be confused differ (batch, sequence, hidden, intermediate, vocabulary, heads). The
expectation (`expected`, `tables`) comes from the module tree and from an eager run alone: it knows nothing of traces or graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from module_tree import GatherLog, call, first_names, spread, tree_matmuls
from small_modules import Cnn, CrossAttention, SelfAttention, encoder, mlp
from torch import nn

Inputs = dict[str, torch.Tensor] | tuple[torch.Tensor, ...]

VOCAB, HIDDEN, INTER, HEADS, LAYERS, POSITIONS = 61, 32, 44, 4, 2, 40
BATCH, SEQ = 3, 7
OTHER_SIZES = ((1, 5), (2, 12), (5, 9))
"""(batch, seq) of `more_inputs`: batch 1, and sizes on both sides of the example's."""


@dataclass(frozen=True)
class Entry:
    """One model. `roles`: role by glob over a site's path (`*` crosses dots), the first that fits holds; every path must fit one.

    `inputs(batch, seq, generator)` makes inputs; `slices` are rows of a parameter that the model reads apart.
    """

    name: str
    factory: Callable[[], nn.Module]
    inputs: Callable[[int, int, torch.Generator], Inputs]
    dynamic_shapes: Any
    roles: Mapping[str, str]
    slices: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)

    def build(self) -> tuple[nn.Module, Inputs, Any]:
        """(module in eval mode, example inputs, dynamic_shapes); the same weights every time, the global random state untouched."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = self.factory().eval()
        spread(module)
        return module, self.inputs(BATCH, SEQ, torch.Generator().manual_seed(1)), self.dynamic_shapes

    def more_inputs(self) -> list[Inputs]:
        """Inputs at three other shapes, one of them with batch 1."""
        return [self.inputs(b, s, torch.Generator().manual_seed(2 + i)) for i, (b, s) in enumerate(OTHER_SIZES)]

    def matrices(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """[..., out, in] of every weight that the module tree multiplies with, by path; tied weights once, under their first name."""
        found: dict[str, torch.Tensor] = {}
        first = first_names(module)
        for parameter, matrix in tree_matmuls(module):
            path = first[id(parameter)].removesuffix(".weight")
            parts = self.slices.get(path)
            found.update({f"{path}[{a}:{b}]": matrix[a:b] for a, b in parts} if parts else {path: matrix})
        return found

    def expected(self, module: nn.Module) -> dict[str, tuple[int, int]]:
        """(out, in) of every weight that the module tree multiplies with, by path."""
        return {path: (matrix.shape[-2], matrix.shape[-1]) for path, matrix in self.matrices(module).items()}

    def tables(self, module: nn.Module, inputs: Inputs) -> dict[str, tuple[int, int]]:
        """(rows, width) by path of every table that an eager run gathers from, tied ones included."""
        first = first_names(module)
        with torch.no_grad(), GatherLog() as log:
            call(module, inputs)
        by_pointer = {parameter.data_ptr(): parameter for parameter in module.parameters()}
        used = [by_pointer[pointer] for pointer in log.tables if pointer in by_pointer]
        return {first[id(table)].removesuffix(".weight"): (table.shape[0], table.shape[1]) for table in used}

    def role_of(self, path: str) -> str:
        """The role that the site of this path should have."""
        return next(role for glob, role in self.roles.items() if fnmatchcase(path, glob.replace("[", "[[]")))


# ---------------------------------------------------------------------------------------------------------------- inputs

TOKEN_AXES = {0: "batch", 1: "seq"}


def _tokens(batch: int, seq: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(3, VOCAB - 2, (batch, seq), generator=generator)  # clear of the special ids, which sit at both ends


def _mask(batch: int, seq: int) -> torch.Tensor:
    """1 but for the last two positions of every odd row: padding on the right."""
    mask = torch.ones(batch, seq, dtype=torch.int64)
    mask[1::2, -2:] = 0
    return mask


def text(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    return {"input_ids": _tokens(batch, seq, generator), "attention_mask": _mask(batch, seq)}


def pair(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    target = torch.randint(3, VOCAB - 2, (batch, seq + 3), generator=generator)
    return {**dict(text(batch, seq, generator)), "decoder_input_ids": target}


def image(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, 30, 30, generator=generator)}


def text_and_image(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    tokens = text(batch, seq, generator)
    assert isinstance(tokens, dict)
    tokens["input_ids"][:, -1] = VOCAB - 1  # CLIP pools at the end-of-text token
    return {**tokens, **dict(image(batch + 1, seq, generator))}


def audio(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    return {"input_features": torch.randn(batch, 10, 48, generator=generator), "decoder_input_ids": _tokens(batch, seq, generator)}


def rows(width: int) -> Callable[[int, int, torch.Generator], Inputs]:
    return lambda batch, seq, generator: (torch.randn(batch, seq, width, generator=generator),)


def memory(batch: int, seq: int, generator: torch.Generator) -> Inputs:
    return (torch.randn(batch, seq, HIDDEN, generator=generator), torch.randn(batch, seq + 4, HIDDEN, generator=generator))


TEXT_AXES = {"input_ids": TOKEN_AXES, "attention_mask": TOKEN_AXES}
PAIR_AXES = {**TEXT_AXES, "decoder_input_ids": {0: "batch", 1: "target"}}
IMAGE_AXES = {"pixel_values": {0: "batch"}}
BOTH_AXES = {**TEXT_AXES, "pixel_values": {0: "images"}}
AUDIO_AXES = {"input_features": {0: "batch"}, "decoder_input_ids": TOKEN_AXES}
ROWS_AXES = (TOKEN_AXES,)
MEMORY_AXES = (TOKEN_AXES, {0: "batch", 1: "memory"})


# ---------------------------------------------------------------------------------------------------------------- transformers


def hugging_face(model: str, config: str, attention: str = "sdpa", **sizes: Any) -> Callable[[], nn.Module]:
    """A factory of `transformers.<model>` from `<config>(**sizes)`, without a cache."""

    def build() -> nn.Module:
        import transformers

        made = getattr(transformers, config)(**sizes)
        if hasattr(made, "use_cache"):
            made.use_cache = False
        return getattr(transformers, model)._from_config(made, attn_implementation=attention)

    return build


COMMON = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": INTER}
TEXTUAL = {**COMMON, "vocab_size": VOCAB, "max_position_embeddings": POSITIONS, "pad_token_id": 0}
DECODER = {**TEXTUAL, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
BERT = {**TEXTUAL, "type_vocab_size": 2}
GPT2 = {"vocab_size": VOCAB, "n_positions": POSITIONS, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_inner": INTER}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
T5 = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "d_kv": 6,
    "d_ff": INTER,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "decoder_start_token_id": 0,
}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16}
SIDES = {
    f"{side}_{key}": value
    for side in ("encoder", "decoder")
    for key, value in (("layers", LAYERS), ("attention_heads", HEADS), ("ffn_dim", INTER))
}
BART = {**SIDES, "vocab_size": VOCAB, "d_model": HIDDEN, "max_position_embeddings": POSITIONS, "pad_token_id": 0, "bos_token_id": 1}
BART |= {"eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None}
WHISPER = {
    **SIDES,
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "num_mel_bins": 10,
    "max_source_positions": 24,
    "max_target_positions": POSITIONS,
}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
VIT = {**COMMON, "image_size": 30, "patch_size": 6, "num_labels": 9}
DEBERTA = {**BERT, "relative_attention": True, "max_relative_positions": 16, "position_buckets": 8, "norm_rel_ebd": "layer_norm"}
DEBERTA |= {"pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0}

PROJECTIONS = {"*q_proj": "attention.q", "*k_proj": "attention.k", "*v_proj": "attention.v", "*o_proj": "attention.o"}
GATED = {"*gate_proj": "mlp.gate", "*up_proj": "mlp.up", "*down_proj": "mlp.down"}
HEAD_AND_TABLE = {"lm_head": "head", "model.embed_tokens": "embedding"}
LLAMA_ROLES = {**PROJECTIONS, **GATED, **HEAD_AND_TABLE}
TIED_LLAMA_ROLES = {**PROJECTIONS, **GATED, "model.embed_tokens": "head"}
BERT_BLOCK = {
    "*attention.self.query*": "attention.q",
    "*attention.self.key*": "attention.k",
    "*attention.self.value*": "attention.v",
    "*attention.self.pos_query_proj": "attention.q",
    "*attention.self.pos_key_proj": "attention.k",
    "*attention.output.dense": "attention.o",
    "*intermediate.dense": "mlp.fc1",
    "*output.dense": "mlp.fc2",
}
BERT_ROLES = {**BERT_BLOCK, "*pooler.dense": "head", "classifier": "head", "*embeddings*": "embedding"}
MASKED_ROLES = {**BERT_BLOCK, "*word_embeddings": "head", "*embeddings*": "embedding", "lm_head.dense": "head"}
GPT2_ROLES = {"*c_attn": "attention.qkv", "*attn.c_proj": "attention.o", "*c_fc": "mlp.fc1", "*mlp.c_proj": "mlp.fc2"}
GPT2_ROLES |= {"transformer.wte": "head", "transformer.wpe": "embedding"}
T5_ATTENTION = {f"*SelfAttention.{x}": f"attention.{x}" for x in "qkvo"} | {f"*EncDecAttention.{x}": f"cross_attention.{x}" for x in "qkvo"}
T5_ROLES = {**T5_ATTENTION, "*DenseReluDense.wi": "mlp.fc1", "*DenseReluDense.wo": "mlp.fc2", "shared": "head", "*bias": "embedding"}
GATED_T5 = {"*DenseReluDense.wi_0": "mlp.gate", "*DenseReluDense.wi_1": "mlp.up", "*DenseReluDense.wo": "mlp.down"}
GATED_T5_ROLES = {**T5_ATTENTION, **GATED_T5, "shared": "head", "*bias": "embedding"}
SPEECH_BLOCK = {
    **{f"*encoder_attn.{x}_proj": f"cross_attention.{x}" for x in "qkv"},
    "*encoder_attn.out_proj": "cross_attention.o",
    **PROJECTIONS,
    "*out_proj": "attention.o",
    "*fc1": "mlp.fc1",
    "*fc2": "mlp.fc2",
}
BART_ROLES = {**SPEECH_BLOCK, "model.shared": "head", "*embed_positions": "embedding"}
WHISPER_ROLES = {**SPEECH_BLOCK, "model.decoder.embed_tokens": "head", "*embed_positions": "embedding"}
OPT_ROLES = {**SPEECH_BLOCK, "model.decoder.embed_tokens": "head", "*embed_positions": "embedding"}
VIT_ROLES = {**PROJECTIONS, "*attention.attention.query": "attention.q", "*attention.attention.key": "attention.k"}
VIT_ROLES |= {"*attention.attention.value": "attention.v", **BERT_BLOCK, "*fc1": "mlp.fc1", "*fc2": "mlp.fc2", "classifier": "head"}
CLIP_ROLES = {**SPEECH_BLOCK, "*_projection": "head", "*embedding": "embedding"}
MHA_ROLES = {"*in_proj_weight": "attention.qkv", "*out_proj": "attention.o"}
DISTILBERT_ROLES = {"*q_lin": "attention.q", "*k_lin": "attention.k", "*v_lin": "attention.v", "*out_lin": "attention.o"}
DISTILBERT_ROLES |= {"*lin1": "mlp.fc1", "*lin2": "mlp.fc2", "*classifier": "head", "*embeddings": "embedding"}
ALBERT_ROLES = {
    "*query": "attention.q",
    "*key": "attention.k",
    "*value": "attention.v",
    "*attention.dense": "attention.o",
    "*ffn": "mlp.fc1",
}
ALBERT_ROLES |= {"*ffn_output": "mlp.fc2", "pooler": "head", "*mapping_in": "other", "*embeddings": "embedding"}
PHI3_ROLES = {
    "*qkv_proj": "attention.qkv",
    "*o_proj": "attention.o",
    "*gate_up_proj": "mlp.gate_up",
    "*down_proj": "mlp.down",
    **HEAD_AND_TABLE,
}
MOE_ROLES = {"*experts.gate_up_proj": "moe.gate_up", "*experts.down_proj": "moe.down", "*mlp.gate": "moe.router", **LLAMA_ROLES}
CNN_ROLES = {"expand": "mlp.fc1", "shrink": "mlp.fc2", "classifier": "head", "*": "other"}
ENCODER_ROLES = {"*in_proj_weight": "attention.qkv", "*out_proj": "attention.o", "*linear1": "mlp.fc1", "*linear2": "mlp.fc2"}


def cross_roles(**parts: str) -> dict[str, str]:
    """Roles of `in_proj_weight[a:b]`, given as `_0_32="q"`."""
    slices = {f"*in_proj_weight[{key[1:].replace('_', ':')}]": f"cross_attention.{role}" for key, role in parts.items()}
    return {**slices, "*out_proj": "cross_attention.o"}


IN_PROJ = "attention.in_proj_weight"
LLAMA = hugging_face("LlamaForCausalLM", "LlamaConfig", **DECODER, tie_word_embeddings=False)
GEMMA = {
    **DECODER,
    "head_dim": 12,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 12,
}
MIXTRAL = {**DECODER, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None}
ALBERT = {**BERT, "embedding_size": 20, "num_hidden_layers": 3}
DISTILBERT = {"vocab_size": VOCAB, "dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": INTER, "num_labels": 9}
DISTILBERT |= {"max_position_embeddings": POSITIONS, "pad_token_id": 0}
OPT = {**TEXTUAL, "ffn_dim": INTER, "word_embed_proj_dim": HIDDEN, "bos_token_id": 1, "eos_token_id": 2}
CLIP_TEXT = {**TEXTUAL, "bos_token_id": VOCAB - 2, "eos_token_id": VOCAB - 1}
CLIP_VISION = {**COMMON, "hidden_size": 36, "image_size": 30, "patch_size": 6}
CLIP = {"text_config": CLIP_TEXT, "vision_config": CLIP_VISION, "projection_dim": 24}

_ENTRIES = (
    Entry("mlp", mlp, rows(12), ROWS_AXES, {"0": "mlp.fc1", "2": "mlp.fc1", "4": "head"}),
    Entry("cnn", Cnn, lambda b, s, g: (torch.randn(b, 3, 16, 16, generator=g),), ({0: "batch"},), CNN_ROLES),
    Entry("mha", lambda: SelfAttention(HIDDEN, HEADS), rows(HIDDEN), ROWS_AXES, MHA_ROLES),
    Entry("mha-weights", lambda: SelfAttention(HIDDEN, HEADS, weights=True), rows(HIDDEN), ROWS_AXES, MHA_ROLES),
    Entry(
        "mha-cross",
        lambda: CrossAttention(HIDDEN, HEADS, joint=True),
        memory,
        MEMORY_AXES,
        cross_roles(_0_32="q", _32_96="kv"),
        {IN_PROJ: ((0, 32), (32, 96))},
    ),
    Entry(
        "mha-cross-apart",
        lambda: CrossAttention(HIDDEN, HEADS, joint=False),
        memory,
        MEMORY_AXES,
        cross_roles(_0_32="q", _32_64="k", _64_96="v"),
        {IN_PROJ: ((0, 32), (32, 64), (64, 96))},
    ),
    Entry("transformer-encoder", lambda: encoder(HIDDEN, HEADS, INTER, LAYERS), rows(HIDDEN), ROWS_AXES, ENCODER_ROLES),
    Entry("gpt2", hugging_face("GPT2LMHeadModel", "GPT2Config", **GPT2), text, TEXT_AXES, GPT2_ROLES),
    Entry("gpt2-eager", hugging_face("GPT2LMHeadModel", "GPT2Config", "eager", **GPT2), text, TEXT_AXES, GPT2_ROLES),
    Entry("llama", LLAMA, text, TEXT_AXES, LLAMA_ROLES),
    Entry("llama-eager", hugging_face("LlamaForCausalLM", "LlamaConfig", "eager", **DECODER), text, TEXT_AXES, LLAMA_ROLES),
    Entry("mistral", hugging_face("MistralForCausalLM", "MistralConfig", **DECODER, sliding_window=4), text, TEXT_AXES, LLAMA_ROLES),
    Entry("qwen2", hugging_face("Qwen2ForCausalLM", "Qwen2Config", **DECODER), text, TEXT_AXES, LLAMA_ROLES),
    Entry(
        "qwen3",
        hugging_face("Qwen3ForCausalLM", "Qwen3Config", **DECODER, head_dim=12, tie_word_embeddings=True),
        text,
        TEXT_AXES,
        TIED_LLAMA_ROLES,
    ),
    Entry("gemma3", hugging_face("Gemma3ForCausalLM", "Gemma3TextConfig", **GEMMA), text, TEXT_AXES, TIED_LLAMA_ROLES),
    Entry("phi3", hugging_face("Phi3ForCausalLM", "Phi3Config", **DECODER), text, TEXT_AXES, PHI3_ROLES),
    Entry("mixtral", hugging_face("MixtralForCausalLM", "MixtralConfig", **MIXTRAL), text, TEXT_AXES, MOE_ROLES),
    Entry("opt", hugging_face("OPTForCausalLM", "OPTConfig", **OPT), text, TEXT_AXES, OPT_ROLES),
    Entry("bert", hugging_face("BertModel", "BertConfig", **BERT), text, TEXT_AXES, BERT_ROLES),
    Entry("bert-eager", hugging_face("BertModel", "BertConfig", "eager", **BERT), text, TEXT_AXES, BERT_ROLES),
    Entry(
        "bert-classifier",
        hugging_face("BertForSequenceClassification", "BertConfig", **BERT, num_labels=9),
        text,
        TEXT_AXES,
        BERT_ROLES,
    ),
    Entry("roberta", hugging_face("RobertaModel", "RobertaConfig", **BERT), text, TEXT_AXES, BERT_ROLES),
    Entry("roberta-masked", hugging_face("RobertaForMaskedLM", "RobertaConfig", **BERT), text, TEXT_AXES, MASKED_ROLES),
    Entry(
        "distilbert",
        hugging_face("DistilBertForSequenceClassification", "DistilBertConfig", **DISTILBERT),
        text,
        TEXT_AXES,
        DISTILBERT_ROLES,
    ),
    Entry(
        "deberta", hugging_face("DebertaV2Model", "DebertaV2Config", "eager", **DEBERTA, share_att_key=True), text, TEXT_AXES, BERT_ROLES
    ),
    Entry("deberta-apart", hugging_face("DebertaV2Model", "DebertaV2Config", "eager", **DEBERTA), text, TEXT_AXES, BERT_ROLES),
    Entry("albert", hugging_face("AlbertModel", "AlbertConfig", **ALBERT), text, TEXT_AXES, ALBERT_ROLES),
    Entry("t5", hugging_face("T5ForConditionalGeneration", "T5Config", **T5), pair, PAIR_AXES, T5_ROLES),
    Entry("t5-eager", hugging_face("T5ForConditionalGeneration", "T5Config", "eager", **T5), pair, PAIR_AXES, T5_ROLES),
    Entry(
        "t5-gated",
        hugging_face("T5ForConditionalGeneration", "T5Config", **T5, feed_forward_proj="gated-gelu"),
        pair,
        PAIR_AXES,
        GATED_T5_ROLES,
    ),
    Entry("bart", hugging_face("BartForConditionalGeneration", "BartConfig", **BART), pair, PAIR_AXES, BART_ROLES),
    Entry("vit", hugging_face("ViTForImageClassification", "ViTConfig", **VIT), image, IMAGE_AXES, VIT_ROLES),
    Entry("vit-eager", hugging_face("ViTForImageClassification", "ViTConfig", "eager", **VIT), image, IMAGE_AXES, VIT_ROLES),
    Entry("clip", hugging_face("CLIPModel", "CLIPConfig", **CLIP), text_and_image, BOTH_AXES, CLIP_ROLES),
    Entry("whisper", hugging_face("WhisperForConditionalGeneration", "WhisperConfig", **WHISPER), audio, AUDIO_AXES, WHISPER_ROLES),
)

ZOO: Mapping[str, Entry] = {entry.name: entry for entry in _ENTRIES}
