"""`matmorph evaluate`: perplexity on a text, loss on data with labels. Oracles: a decoder's definition in numpy, and transformers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tiny_artifact import hash_files
from tiny_decoder import POSITIONS, VOCAB, logits_of, write_decoder
from tiny_speaker import folder_with, tokenizer_text, told

from matmorph.errors import InputError
from matmorph.runtime import ArtifactError, ExecutionError, InputMismatch, perplexity
from matmorph.runtime.format.evaluations import evaluations, with_evaluation
from matmorph.runtime.windows import Cut
from matmorph.text.corpus import read_corpus
from matmorph.text.tokens import Tokens

pytest.importorskip("tokenizers", reason="text needs the package tokenizers")

CPU = ("--provider", "cpu", "--threads", "1")
EXACT = 2e-6
"""Of means over float32 logits of two layers of 16 terms each, against float64: observed 2e-7."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_with(tmp_path_factory.mktemp("text") / "out")


def ids(text: str) -> list[int]:
    byte_of = dict(zip("abcdefghijklm", range(3, 16), strict=True)) | {" ": 18, "x": 22}
    return [byte_of[letter] for letter in text]


def words(count: int, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    return "".join("abcdefghijklm x"[k] for k in rng.integers(0, 15, count))


def logs(row: Sequence[int], bias: float = 0.0) -> np.ndarray:
    found = logits_of(row, bias)
    return found - np.log(np.exp(found - found.max(-1, keepdims=True)).sum(-1, keepdims=True)) - found.max(-1, keepdims=True)


def by_definition(row: Sequence[int], window: int, stride: int, prefix: Sequence[int] = ()) -> list[float]:
    """-log p of each counted token, token by token: the first window in which it has a token before it, and which holds it, counts it."""
    room, counted = window - len(prefix), {}
    for start in range(0, len(row) - room + 1, stride):
        seen = [*prefix, *row[start : start + room]]
        said = logs(seen)
        for place in range(max(1, len(prefix)), len(seen)):
            counted.setdefault(start + place - len(prefix), -float(said[place - 1, seen[place]]))
    first = {start for start in range(0, len(row), stride)} if not prefix and stride == room else set()
    assert not first & counted.keys()
    return [counted[k] for k in sorted(counted)]


# ---- a text


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (48, 48), (2, 1)])
def test_perplexity_is_the_definition(folder: Path, tmp_path: Path, run: Any, window: int, stride: int) -> None:
    text = words(100)
    (tmp_path / "t.txt").write_text(text)
    code, out, _ = run("evaluate", folder, "--text", tmp_path / "t.txt", "--window", window, "--stride", stride, "--json", *CPU)
    wanted = by_definition(ids(text), window, stride)
    found = json.loads(out)
    assert code == 0
    assert found["counted"] == len(wanted)
    assert found["nll"] == pytest.approx(np.mean(wanted), rel=EXACT)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(wanted)), rel=10 * EXACT)  # exp stretches an error by the nats, some 10
    assert found["windows"] == (100 - window) // stride + 1
    assert found["tokens"] + found["tokens_left"] == 100


def test_all_but_the_first_token_of_each_window_count(folder: Path, tmp_path: Path, run: Any) -> None:
    (tmp_path / "t.txt").write_text(words(50))
    code, out, _ = run("evaluate", folder, "--text", tmp_path / "t.txt", "--window", 16, *CPU)
    assert code == 0
    assert "over 45 tokens" in out
    assert "3 windows of 16, stride 16: all but the first token of each window count; 2 tokens at the end are less than a window" in out


def test_one_buffer_for_past_and_present_gives_the_same(tmp_path: Path) -> None:
    row = ids(words(64, seed=3))
    nll = [perplexity(write_decoder(tmp_path / str(k), shared=k), row, window=16, providers="cpu", threads=1) for k in (False, True)]
    assert nll[1].prediction.nll == pytest.approx(nll[0].prediction.nll, rel=EXACT)


def test_what_the_tokenizer_puts_first_is_seen_and_not_counted(tmp_path: Path, run: Any) -> None:
    spec = json.loads(tokenizer_text())
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    folder = folder_with(tmp_path / "out", tokenizer__json=json.dumps(spec))
    text = words(40)
    (tmp_path / "t.txt").write_text(text)
    code, out, _ = run("evaluate", folder, "--text", tmp_path / "t.txt", "--window", 9, "--json", *CPU)
    wanted = by_definition(ids(text), 9, 8, prefix=[1])
    found = json.loads(out)
    assert (code, found["prefix"], found["counted"]) == (0, [1], 40)
    assert found["nll"] == pytest.approx(np.mean(wanted), rel=EXACT)
    assert "each behind <s>" in run("evaluate", folder, "--text", tmp_path / "t.txt", "--window", 9, *CPU)[1]


def test_two_folders_beside_each_other(folder: Path, tmp_path: Path, run: Any) -> None:
    other = write_decoder(tmp_path / "other", adapter=True)
    model = onnx.load(other / "model.onnx")  # its keys moved a little
    keys = next(one for one in model.graph.initializer if one.name == "k")
    keys.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(keys) + np.float32(0.05), "k"))
    onnx.save_model(model, other / "model.onnx")
    told(other, {})
    text = words(32, seed=5)
    (tmp_path / "t.txt").write_text(text)
    code, out, _ = run("evaluate", folder, "--text", tmp_path / "t.txt", "--window", 16, "--beside", other, "--json", *CPU)
    found = json.loads(out)
    kl, agreed = [], []
    for start in (0, 16):
        mine, theirs = (logs(ids(text)[start : start + 16], bias)[:-1] for bias in (0.0, 0.05))
        kl += (np.exp(theirs) * (theirs - mine)).sum(-1).tolist()
        agreed += (mine.argmax(-1) == theirs.argmax(-1)).tolist()
    assert code == 0
    assert found["beside"]["kl"] == pytest.approx(np.mean(kl), rel=1e-4)  # a difference of logarithms that are nearly equal
    assert found["beside"]["agreement"] == pytest.approx(np.mean(agreed))
    assert found["beside"]["ratio"] == pytest.approx(found["perplexity"] / found["beside"]["perplexity"], rel=1e-9)  # one quotient
    same = json.loads(run("evaluate", folder, "--text", tmp_path / "t.txt", "--window", 16, "--beside", folder, "--json", *CPU)[1])
    assert (same["beside"]["kl"], same["beside"]["agreement"], same["beside"]["ratio"]) == (0.0, 1.0, 1.0)


def test_no_torch_in_the_process(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(words(64))
    code = (
        "import sys\nfrom matmorph.cli.main import main\ntry: main(sys.argv[1:])\n"
        "finally: print({'torch', 'onnx', 'transformers', 'yaml'} & sys.modules.keys(), file=sys.stderr)"
    )
    command = ["evaluate", str(folder), "--text", str(tmp_path / "t.txt"), "--window", "16", "--beside", str(folder), *CPU]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "set()"
    assert done.stdout.startswith("perplexity ")


def test_what_is_recorded_is_shown_once(folder: Path, tmp_path: Path, run: Any) -> None:
    place = folder_with(tmp_path / "out")
    (place / "run.json").write_text('{"seconds": {"all": 1.5}}')
    (tmp_path / "t.txt").write_text(words(64))
    for _ in range(2):
        assert run("evaluate", place, "--text", tmp_path / "t.txt", "--window", 16, "--record", *CPU)[0] == 0
    assert run("evaluate", place, "--text", tmp_path / "t.txt", "--window", 8, "--record", *CPU)[0] == 0
    kept = json.loads((place / "run.json").read_text())
    assert kept["seconds"] == {"all": 1.5}
    assert [one["window"] for one in evaluations(kept)] == [16, 8]
    assert evaluations({"evaluations": 3}) == []
    assert len(evaluations(with_evaluation(kept, {"data": "x.npz"}))) == 3


# ---- wrong texts and folders


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"ab\0cd", "is binary, not text"),
        (b"ab\xff\xfecd", "is not UTF-8 text: byte 2 is 0xff"),
        (b"abc", "the text has 3 tokens, fewer than one window (16)"),
    ],
)
def test_a_file_without_enough_text_is_named(folder: Path, tmp_path: Path, run: Any, content: bytes, said: str) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    code, out, err = run("evaluate", folder, "--text", tmp_path / "t.txt", "--window", 16, *CPU)
    assert (code, out) == (2, "")
    assert said in err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--window", POSITIONS + 1), f"a window of {POSITIONS + 1} tokens, and the model has positions for {POSITIONS}"),
        (("--window", 1), "window is 1: it needs two tokens"),
        (("--window", 8, "--stride", 9), "stride is 9: it must be 1 to 8"),
        (("--window", 8, "--stride", 0), "stride is 0: it must be 1 to 8"),
        (("--tokens", 1), "--tokens 1"),
        (("--window", 8, "--tokens", 7), "the text has 7 tokens, fewer than one window (8)"),
        (("--loss", "mse"), "--loss belongs to --data, which is not given"),
        (("--data", "x.npz"), "give --text FILE for a perplexity, or --data FILE for a loss, one of them"),
        (("--window", 8, "--beside", "nowhere"), "nowhere: no such folder"),
    ],
)
def test_options_that_do_not_work(folder: Path, tmp_path: Path, run: Any, more: tuple[Any, ...], said: str) -> None:
    (tmp_path / "t.txt").write_text(words(99))
    code, out, err = run("evaluate", folder, "--text", tmp_path / "t.txt", *more, *CPU)
    assert (code, out) == (2, "")
    assert said in err


def test_a_folder_without_a_tokenizer(tmp_path: Path, run: Any) -> None:
    bare = write_decoder(tmp_path / "bare")
    (tmp_path / "t.txt").write_text(words(64))
    code, _, err = run("evaluate", bare, "--text", tmp_path / "t.txt", *CPU)
    assert code == 2
    assert "has no tokenizer.json, so text cannot become tokens" in err
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / "tokenizer.json").write_text(tokenizer_text())
    assert run("evaluate", bare, "--text", tmp_path / "t.txt", "--window", 8, "--tokenizer", tmp_path / "tok", *CPU)[0] == 0


def test_models_that_a_text_says_nothing_of(tmp_path: Path) -> None:
    row = ids(words(32))
    with pytest.raises(ArtifactError, match=r"gives logits of the last token alone \(export: \{logits: last\}\)"):
        perplexity(write_decoder(tmp_path / "last", last_only=True), row, window=8)
    with pytest.raises(ArtifactError, match="is no language model"):
        perplexity(classifier(tmp_path / "classes"), row, window=8)
    masked = write_decoder(tmp_path / "masked")
    told(masked, {"config.json": {"architectures": ["BertForMaskedLM"]}})
    with pytest.raises(ArtifactError, match="is a BertForMaskedLM, which sees the tokens that it predicts"):
        perplexity(masked, row, window=8)
    short = write_decoder(tmp_path / "short")
    told(short, {"config.json": {"text_config": {"max_position_embeddings": 6}}})
    with pytest.raises(InputMismatch, match="a window of 8 tokens, and the model has positions for 6"):
        perplexity(short, row, window=8)


def test_a_vocabulary_that_does_not_fit(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputMismatch, match=rf"the token {VOCAB}, and the model has logits for {VOCAB} words .*: the tokenizer is"):
        perplexity(folder, [3, 4, VOCAB, 5], window=4)
    other = write_decoder(tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["outputs"][0]["shape"][-1] = VOCAB + 1
    hash_files(other, **{key: value for key, value in manifest.items() if key != "files"})
    with pytest.raises(ArtifactError, match=f"have vocabularies of {VOCAB} and {VOCAB + 1} words"):
        perplexity(folder, [3, 4, 5, 6], window=4, beside=other)
    with pytest.raises(InputMismatch, match="expected a row of token ids"):
        perplexity(folder, [[3, 4]], window=2)


def test_logits_that_are_no_numbers(tmp_path: Path) -> None:
    broken = write_decoder(tmp_path / "broken")
    model = onnx.load(broken / "model.onnx")
    head = next(one for one in model.graph.initializer if one.name == "head")
    head.CopyFrom(onnx.numpy_helper.from_array(np.full((16, VOCAB), np.nan, np.float32), "head"))
    onnx.save_model(model, broken / "model.onnx")
    told(broken, {})
    with pytest.raises(ExecutionError, match="window 0: the model's logits are not finite"):
        perplexity(broken, [3, 4, 5, 6], window=4)


# ---- reading


def test_a_part_of_a_text_has_the_tokens_of_the_whole(tmp_path: Path) -> None:
    """Whatever the cut falls into: the tokens of a byte-level vocabulary with merges over several words' worth of letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rng = np.random.default_rng(0)
    pieces = ["island", "ferry", "morning", "\n\n", " = = ", "é漢", "  ", "17", "the"]
    text = " ".join(pieces[k] for k in rng.integers(0, len(pieces), 9000))
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator([text[:5000]], trainers.BpeTrainer(vocab_size=400, show_progress=False))
    made.save(str(tmp_path / "tokenizer.json"))
    tokens = Tokens(tmp_path / "tokenizer.json")
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    whole = read_corpus(tmp_path / "t.txt", tokens)
    assert whole.whole
    assert whole.ids.tolist() == made.encode(text).ids
    for most in (1, 100, 2000, 3001, 8000, len(whole.ids) - 1, len(whole.ids), len(whole.ids) + 5):
        part = read_corpus(tmp_path / "t.txt", tokens, most)
        assert part.ids.tolist() == whole.ids.tolist()[:most], most
        assert part.whole == (most >= len(whole.ids))


def test_no_more_is_read_than_is_wanted(tmp_path: Path) -> None:
    """What lies behind is no text at all, and is not met."""
    (tmp_path / "tokenizer.json").write_text(tokenizer_text())
    (tmp_path / "t.txt").write_bytes(words(1 << 15).encode() + b"\xff\xff")
    tokens = Tokens(tmp_path / "tokenizer.json")
    assert len(read_corpus(tmp_path / "t.txt", tokens, 1000).ids) == 1000
    with pytest.raises(InputError, match="is not UTF-8 text: byte 32768 is 0xff"):
        read_corpus(tmp_path / "t.txt", tokens)


def test_windows_cover_each_token_once() -> None:
    for tokens, window, stride, prefix in [(40, 8, 3, 0), (40, 8, 8, 0), (41, 8, 7, 1), (8, 8, 1, 0), (50, 9, 2, 2)]:
        cut = Cut.of(window, stride if stride <= window - prefix else None, (1,) * prefix)
        counted = [k for one in cut.of_row(tokens) for k in range(one.first, one.stop)]
        assert counted == sorted(set(counted))
        missing = set(range(cut.of_row(tokens)[-1].stop)) - set(counted)
        assert missing == (set() if prefix else {one.start for one in cut.of_row(tokens) if stride == window or not one.start})


# ---- data with labels


def classifier(folder: Path, classes: int = 3) -> Path:
    """y = x W, [rows, 4] to [rows, classes]."""
    folder.mkdir()
    w = np.random.default_rng(1).standard_normal((4, classes)).astype(np.float32)
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size]) for name, size in (("x", 4), ("y", classes))]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ports[:1], ports[1:], [onnx.numpy_helper.from_array(w, "w")]
    )
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "model.onnx")
    infos = [{"name": name, "dtype": "float32", "shape": ["rows", size]} for name, size in (("x", 4), ("y", classes))]
    hash_files(folder, inputs=infos[:1], outputs=infos[1:], ranges={"rows": [1, None]})
    return folder


def test_loss_of_classes_and_of_numbers(tmp_path: Path, run: Any) -> None:
    place, rng = classifier(tmp_path / "out"), np.random.default_rng(2)
    w = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)
    x, labels = rng.standard_normal((21, 4)).astype(np.float32), rng.integers(0, 3, 21)
    labels[5] = -100
    np.savez(tmp_path / "c.npz", x=x, labels=labels)
    y = x.astype(np.float64) @ w
    log = y - np.log(np.exp(y).sum(-1, keepdims=True))
    keep = labels >= 0
    code, out, _ = run("evaluate", place, "--data", tmp_path / "c.npz", "--batch-size", 4, "--json", *CPU)
    found = json.loads(out)
    assert (code, found["loss"], found["counted"], found["samples"]) == (0, "cross_entropy", 20, 21)
    assert found["value"] == pytest.approx(-log[keep, labels[keep]].mean(), rel=EXACT)
    assert found["accuracy"] == pytest.approx((y.argmax(-1) == labels)[keep].mean())
    np.savez(tmp_path / "m.npz", x=x, labels=rng.standard_normal((21, 3)))
    code, out, _ = run("evaluate", place, "--data", tmp_path / "m.npz", "--batch-size", 4, *CPU)
    wanted = np.square(y - np.load(tmp_path / "m.npz")["labels"]).mean()
    assert code == 0
    assert out.startswith(f"mse {wanted:.5f}")


def test_labels_of_a_language_model_are_those_of_the_next_place(folder: Path, tmp_path: Path, run: Any) -> None:
    rows = np.array([ids(words(12, seed)) for seed in range(3)])
    labels = rows.copy()
    labels[1, :6] = -100
    np.savez(tmp_path / "d.npz", input_ids=rows, attention_mask=np.ones_like(rows), labels=labels)
    found = json.loads(run("evaluate", folder, "--data", tmp_path / "d.npz", "--json", *CPU)[1])
    wanted = [-logs(row)[k - 1, row[k]] for n, row in enumerate(rows) for k in range(1, 12) if labels[n, k] >= 0]
    assert (found["loss"], found["counted"]) == ("causal_lm", len(wanted))
    assert found["value"] == pytest.approx(np.mean(wanted), rel=EXACT)


@pytest.mark.parametrize(
    ("arrays", "more", "said"),
    [
        ({"x": np.zeros((4, 4), np.float32)}, (), "holds x and no labels"),
        ({"x": np.zeros((4, 4), np.float32), "labels": np.array([0, 1, 3, 1])}, (), "the label 3; the model has the classes 0 to 2"),
        ({"x": np.zeros((4, 4), np.float32), "labels": np.full(4, -100)}, (), "no label counts"),
        ({"x": np.zeros((4, 4), np.float32), "labels": np.zeros((4, 2))}, (), "need labels of the same shape"),
        ({"x": np.zeros((4, 4), np.float32), "labels": np.zeros((4, 2), int)}, (), "need labels of shape (4,), got (4, 2)"),
        ({"x": np.zeros((4, 4), np.float32), "labels": np.zeros((4, 3))}, ("--loss", "cross_entropy"), "wants whole numbers"),
        ({"x": np.zeros((4, 4), np.float32), "labels": np.zeros(4, int)}, ("--loss", "msee"), "did you mean mse?"),
        ({"x": np.zeros((4, 4), np.float32), "labels": np.zeros(4, int)}, ("--output", "z"), "output z: the model gives y"),
        ({"x": np.full((4, 4), np.nan, np.float32), "labels": np.zeros(4, int)}, (), "the loss is not finite"),
        ({"x": np.zeros((4, 4), np.float32), "labels": np.zeros(4, int)}, ("--window", 8), "--window belongs to --text"),
    ],
)
def test_data_that_do_not_fit(tmp_path: Path, run: Any, arrays: dict[str, Any], more: tuple[Any, ...], said: str) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    code, out, err = run("evaluate", classifier(tmp_path / "out"), "--data", tmp_path / "d.npz", *more, *CPU)
    assert (code, out) == (2, "")
    assert said in err


# ---- a real model


@pytest.mark.full
def test_a_real_model_has_the_perplexity_of_transformers(tmp_path: Path, run: Any) -> None:
    source = os.environ.get("MATMORPH_LANGUAGE_MODEL", "")
    data = Path(os.environ.get("MATMORPH_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    text = data / "wikitext2" / "valid.txt"
    if not Path(source, "config.json").is_file() or not text.is_file():
        pytest.skip(f"needs a folder of a causal language model in MATMORPH_LANGUAGE_MODEL, and {text} (MATMORPH_DATA names its parent)")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (tmp_path / "dense.yaml").write_text("version: 1\nname: dense\nrules:\n  - match: {op: matmul}\n    rewrite: keep\n")
    assert run("compile", source, "--spec", tmp_path / "dense.yaml", "--out", tmp_path / "out")[0] == 0
    found = json.loads(run("evaluate", tmp_path / "out", "--text", text, "--window", 256, "--tokens", 1024, "--json", *CPU)[1])
    row = AutoTokenizer.from_pretrained(source)(text.read_text(encoding="utf-8")[:20000], return_tensors="pt").input_ids[0, :1024]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        losses = [model(part[None], labels=part[None]).loss.item() for part in row.split(256)]
    assert found["counted"] == 4 * 255
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-3)  # float32 on both sides; what users are promised
