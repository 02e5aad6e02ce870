"""The demo from end to end, with a toy encoder in place of the embedded one (same vocabulary, same sentences)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from matmorph.cli import demo, demo_language
from matmorph.cli.main import main
from matmorph.errors import InputError
from matmorph.models.resolve import EXAMPLE_SENTENCES, Model, calibration_sentences, tokenize

SPEC = """
version: 1
name: toy
rules:
  - name: blocks
    match: {role: ["attention.*", "mlp.*"]}
    expect: 6
    rewrite: {low_rank: {rank: 6, whiten: true}}
calibration: {samples: 32}
"""


def toy_encoder() -> Model:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    module = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)).eval()
    axes = {0: "batch", 1: "seq"}

    def tensors(sentences: list[str]) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array) for name, array in tokenize(sentences).items()}

    batch = tensors(calibration_sentences()[:32])
    return Model(module, tensors(list(EXAMPLE_SENTENCES)), {"input_ids": axes, "attention_mask": axes}, [batch])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], tuple[int, str, str]]:
    (tmp_path / "toy.yaml").write_text(SPEC)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "minilm", toy_encoder)

    def call(out: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["demo", "--spec", "toy.yaml", "--out", out])
        said = capsys.readouterr()
        return int(caught.value.code or 0), said.out, said.err

    return call


def test_demo_tells_the_whole_story_and_replaces_only_its_own(run: Callable[[str], tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, err = run("out")
    assert (code, err) == (0, "")
    for line in (
        "rewrote 6 of ",
        "ONNX Runtime agrees with torch to ",
        "similarity of sentence pairs",
        "The cat sleeps on the sofa. | Parliament passed the new budget.",
        "time of a batch of 16 sentences on ",
        "matmorph verify out",
    ):
        assert line in out
    record = json.loads((tmp_path / "out" / "run.json").read_text())["demo"]
    assert record["batch"] == 16
    assert record["dense_s"] > 0
    with pytest.raises(SystemExit) as verified:
        main(["verify", "out"])
    assert verified.value.code == 0

    first = {name: (tmp_path / "out" / name).read_bytes() for name in ("model.onnx", "model.onnx.data", "check.npz", "spec.yaml")}
    assert run("out")[0] == 0
    assert {name: (tmp_path / "out" / name).read_bytes() for name in first} == first, "a second run gives the same bytes"


def test_a_folder_that_is_not_the_demos_stays(run: Callable[[str], tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    code, out, err = run("out")
    assert (code, out) == (2, "")
    assert err.splitlines() == ["out: exists and is not the result of an earlier demo", "  name another folder: matmorph demo --out DIR"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("record", ["{", "[]", "3", '{"machine": "x86_64"}'])
def test_another_run_json_is_no_sign_of_a_demo(tmp_path: Path, record: str) -> None:
    (tmp_path / "run.json").write_text(record)
    with pytest.raises(InputError, match="not the result of an earlier demo"):
        demo.run_demo(tmp_path, "low-rank-60", None)


def test_sentence_vectors_are_masked_means_of_length_one() -> None:
    hidden = np.array([[[3.0, 0.0], [0.0, 1.0], [9.0, 9.0]]], dtype=np.float32)
    vectors = demo.sentence_vectors(hidden, np.array([[1, 1, 0]]))
    np.testing.assert_allclose(vectors, np.array([[3.0, 1.0]]) / np.sqrt(10.0), rtol=1e-15)  # a few roundings in float64


def test_medians_run_everything_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SAMPLE_SECONDS", 0.0)
    calls: list[str] = []
    found = demo.medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a"] * 2 + ["b"] * 2 + ["a", "b"] * 3
    assert set(found) == {"a", "b"}
    assert all(seconds >= 0 for seconds in found.values())


LANGUAGE_SPEC = """
version: 1
name: toy
rules:
  - match: {role: ["attention.*", "mlp.*"]}
    expect: 7
    rewrite: {quantize: {quantizer: uniform, bits: 4, block_size: 16, zero_point: true, scale: weighted, rounding: gptq}}
"""


def toy_language_model(place: Path) -> Model:
    """A Llama of one layer that knows nothing, with a tokenizer of bytes and no chat template."""
    import tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(calibration_sentences(), trainer)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=256, **sizes)).eval()
    module.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    module.save_pretrained(place)
    made.save(str(place / "tokenizer.json"))
    ids = torch.arange(2 * 16).reshape(2, 16) % 300
    return Model(module, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, cache=True, hf_folder=place)


@pytest.mark.full
def test_the_language_models_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "toy.yaml").write_text(LANGUAGE_SPEC)
    monkeypatch.chdir(tmp_path)
    model = toy_language_model(tmp_path / "hf")
    capsys.readouterr()  # transformers has written its files, and shown how
    monkeypatch.setattr(demo_language, "smollm2", lambda: model)
    with pytest.raises(SystemExit) as caught:
        main(["demo", "--model", "smollm2", "--spec", "toy.yaml", "--out", "out"])
    said = capsys.readouterr()
    assert (caught.value.code or 0, said.err) == (0, "")
    for line in ("rewrote 7 of ", "ONNX Runtime agrees with torch to ", demo_language.QUESTION, "  original (", "matmorph chat out"):
        assert line in said.out
    record = json.loads((tmp_path / "out" / "run.json").read_text())["demo"]
    printed = re.search(r"did not see: ([\d.]+) original, ([\d.]+) rewritten", said.out)
    assert printed is not None
    assert [float(number) for number in printed.groups()] == [round(record["perplexity"][name], 2) for name in ("original", "rewritten")]
    assert 250 < record["perplexity"]["original"] < 350, "it knows nothing, so each of 300 words is as likely"
    assert not list(tmp_path.glob("**/seen.txt")), "what is only needed on the way is gone"
