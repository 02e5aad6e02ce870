"""Tiny random decoders for attention over a cache: heads of 16 numbers, which kernels turn, windows, caps, sinks, heads turned in part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cached_models import VOCAB, WINDOW
from torch import nn

HEADS, PAIRS, SIZE, PLACES, CAP = 4, 2, 16, 64, 5.0
_SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HEADS * SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": PAIRS,
    "max_position_embeddings": PLACES,
}


def llama(**more: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_SIZES, **more))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=HEADS * SIZE, n_layer=2, n_head=HEADS, n_positions=PLACES, bos_token_id=None, eos_token_id=None)
    )


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_SIZES, head_dim=SIZE))


def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**_SIZES, sliding_window=WINDOW))


def gemma3() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**_SIZES, head_dim=SIZE, sliding_window=WINDOW, layer_types=kinds))


def gemma2() -> nn.Module:
    """Written out: torch's own attention has no cap."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    more = {"query_pre_attn_scalar": SIZE, "attn_logit_softcapping": CAP, "attn_implementation": "eager"}
    return Gemma2ForCausalLM(Gemma2Config(**_SIZES, head_dim=SIZE, sliding_window=WINDOW, **more))


def phi3() -> nn.Module:
    from transformers import Phi3Config, Phi3ForCausalLM

    wide = {**_SIZES, "hidden_size": HEADS * 2 * SIZE}
    return Phi3ForCausalLM(Phi3Config(**wide, pad_token_id=0, bos_token_id=None, eos_token_id=None, partial_rotary_factor=0.5))


def gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    more = {"num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    return GptOssForCausalLM(GptOssConfig(**_SIZES, head_dim=SIZE, sliding_window=WINDOW, attn_implementation="eager", **more))


DECODERS: Mapping[str, Callable[..., nn.Module]] = {
    "llama": llama,
    "gemma2": gemma2,
    "gpt2": gpt2,
    "qwen3": qwen3,
    "mistral": mistral,
    "gemma3": gemma3,
    "phi3": phi3,
    "gpt_oss": gpt_oss,
}
