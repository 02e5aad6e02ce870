"""Tiny random causal language models of transformers, and how the tests call them without a cache. All weights are spread, so that answers
differ and greedy choices are no ties."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from module_tree import spread
from torch import nn

VOCAB, LAYERS, HEADS, PAIRS, HEAD = 67, 2, 4, 2, 8
_SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HEADS * HEAD,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": PAIRS,
    "max_position_embeddings": 64,
}
WINDOW = 8


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_SIZES))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=HEADS * HEAD, n_layer=LAYERS, n_head=HEADS, n_positions=64))


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_SIZES, head_dim=HEAD))


def gemma3() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(Gemma3TextConfig(**_SIZES, head_dim=HEAD, sliding_window=WINDOW))


def phi3() -> nn.Module:
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(Phi3Config(**_SIZES, pad_token_id=0))


def bloom() -> nn.Module:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=HEADS * HEAD, n_layer=LAYERS, n_head=HEADS))


def gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**_SIZES, head_dim=HEAD, sliding_window=WINDOW))


FAMILIES: Mapping[str, Callable[[], nn.Module]] = {"llama": llama, "gpt2": gpt2, "qwen3": qwen3, "gemma3": gemma3, "phi3": phi3}
FURTHER: Mapping[str, Callable[[], nn.Module]] = {"bloom": bloom, "gemma2": gemma2}


def built(factory: Callable[[], nn.Module]) -> nn.Module:
    """The same weights every time, the global random state untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = factory().eval()
    spread(module)
    return module


def tokens(rows: int = 2, length: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(length: int, hidden: int) -> torch.Tensor:
    """A mask of two rows, the second with `hidden` tokens less on its left."""
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[1, :hidden] = 0
    return mask


def logits(module: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of transformers, without a cache."""
    import inspect

    places = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if "position_ids" in inspect.signature(module.forward).parameters else {}
    with torch.no_grad():
        found: torch.Tensor = module(input_ids=ids, attention_mask=mask, use_cache=False, **places).logits
    return found
