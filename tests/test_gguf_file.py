"""Models of GGUF files. Oracle: the model that a file was written from, by llama.cpp's own writer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from matmorph.cli.main import main
from matmorph.errors import InputError
from matmorph.models.gguf_file import load_gguf
from matmorph.models.resolve import resolve

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")

HEADS, KEYS, WORDS = 4, 2, 40


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": KEYS}
    config = transformers.LlamaConfig(vocab_size=WORDS, max_position_embeddings=64, tie_word_embeddings=True, rms_norm_eps=1e-5, **sizes)
    return transformers.LlamaForCausalLM(config).eval()


NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def turned(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head as llama.cpp rotates them: pairs beside each other, not halves."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, model: Any, architecture: str = "llama", without: str = "", tokenizer: bool = True) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_vocab_size(WORDS)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["<s>", "</s>", *(chr(97 + k) for k in range(26)), *(chr(65 + k) for k in range(WORDS - 29)), "ab"])
        writer.add_token_types([3, 3, *[1] * (WORDS - 2)])
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", state["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        for theirs, ours in NAMES.items():
            weight = state[f"model.layers.{layer}.{theirs}.weight"]
            weight = turned(weight, HEADS if ours == "attn_q" else KEYS) if ours in ("attn_q", "attn_k") else weight
            if f"blk.{layer}.{ours}" != without:
                writer.add_tensor(f"blk.{layer}.{ours}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_model_of_a_file_is_the_one_it_was_written_from(tmp_path: Path) -> None:
    source = llama()
    found = resolve(str(write(tmp_path / "tiny.gguf", source)))
    ids = torch.arange(20)[None] % WORDS
    with torch.no_grad():
        assert torch.equal(found.module(ids).logits, source(ids).logits)
    assert found.cache
    assert found.module.lm_head.weight is found.module.model.embed_tokens.weight
    assert not any(tensor.is_meta for tensor in [*found.module.parameters(), *found.module.buffers()])
    assert set(found.example_inputs) == {"input_ids", "attention_mask"}
    names = {path.name for path in Path(str(found.hf_folder)).iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= names
    plain = resolve(str(tmp_path / "tiny.gguf"), cache=False)
    assert plain.dynamic_shapes == {name: {0: "batch", 1: "seq"} for name in ("input_ids", "attention_mask")}
    folder = Path(str(plain.hf_folder))
    del plain
    assert not folder.exists()


def test_a_file_without_a_tokenizer_is_a_model_all_the_same(tmp_path: Path) -> None:
    found = load_gguf(write(tmp_path / "tiny.gguf", llama(), tokenizer=False))
    assert found.tokenizer is None
    assert found.fault
    assert not (found.folder / "tokenizer.json").exists()


def enlarged(data: bytes, key: bytes) -> bytes:
    """The array under a key says that it has 2^56 entries: a reader that believes it never ends."""
    at = data.index(key) + len(key) + 8  # behind the types of the value and of its entries
    assert int.from_bytes(data[at : at + 8], "little") == WORDS
    return data[: at + 7] + b"\1" + data[at + 8 :]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[:3000], "is no whole GGUF file"),
        (lambda data: data[: len(data) - 100], "is no whole GGUF file"),
        (lambda data: data[:20], "is no whole GGUF file"),
        (lambda data: b"PK\3\4" + data[4:], "is no whole GGUF file: it does not begin with GGUF"),
        (lambda data: b"", "is no whole GGUF file"),
        (lambda data: data[:4] + (3 << 24).to_bytes(4, "little") + data[8:], "its version is 50331648"),
        (lambda data: enlarged(data, b"tokenizer.ggml.tokens"), "its header goes on behind its last byte"),
        (lambda data: enlarged(data, b"tokenizer.ggml.token_type"), "its header goes on behind its last byte"),
    ],
)
def test_a_file_that_is_not_whole_is_named(tmp_path: Path, change: Callable[[bytes], bytes], said: str) -> None:
    path = write(tmp_path / "tiny.gguf", llama())
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=said) as raised:
        resolve(str(path))
    assert str(raised.value).startswith(f"{path}: ")


def test_what_transformers_does_not_read_is_named_before_weights_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds a llamma, which transformers .* does not read; did you mean llama\?\n  it reads .*qwen2"):
        resolve(str(write(tmp_path / "odd.gguf", llama(), architecture="llamma")))
    with pytest.raises(InputError, match=r"lacks 1 weight of LlamaForCausalLM\n  model.layers.1.mlp.up_proj.weight"):
        resolve(str(write(tmp_path / "less.gguf", llama(), without="blk.1.ffn_up")))
    with pytest.raises(InputError, match="no such file"):
        resolve(str(tmp_path / "absent.gguf"))


def test_a_missing_package_says_what_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(InputError, match="the package gguf, which reads it, is not installed") as raised:
        resolve(str(path))
    assert raised.value.details[-1] == "install it with: pip install 'matmorph[llm]'"


@pytest.mark.full
def test_the_command_inspects_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(write(tmp_path / "tiny.gguf", llama())), "--all"])
    assert not ended.value.code
    assert "model.layers.1.mlp.down_proj" in capsys.readouterr().out
