"""Models with an encoder and a cache: one trace, the encoder and the decoder as two files on the same weights. Oracle: transformers without
a cache, and its `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cached_models import built
from torch import nn
from typer.testing import CliRunner

import matmorph as mm
from matmorph.cli.main import app
from matmorph.errors import InputError
from matmorph.ir.cache import find_slots
from matmorph.ir.crossing import find_halves
from matmorph.ir.evaluate import evaluate
from matmorph.models.resolve import resolve
from matmorph.runtime import ArtifactError, Generator, InputMismatch, Seq2SeqGenerator, Session, Trainer
from matmorph.runtime.check import check

KEEP = {"version": 1, "rules": [{"match": {"op": "matmul"}, "rewrite": "keep"}]}
CLOSE = 2e-5
"""Two libraries' float32 through two layers of encoder and decoder: 1e-6 of the largest logit here, with room for other machines."""
VOCAB = 67
START, END, PAD = 2, 1, 0
_WIDTHS: Mapping[str, int] = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
_IDS: Mapping[str, Any] = {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": START}


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, **_IDS, feed_forward_proj="gated-gelu"))


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"vocab_size": VOCAB, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
    return BartForConditionalGeneration(BartConfig(**sizes, **_WIDTHS, **_IDS, bos_token_id=3, forced_eos_token_id=None))


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"vocab_size": VOCAB, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8}
    places = {"max_target_positions": 48, "max_source_positions": 20, "suppress_tokens": None, "begin_suppress_tokens": None}
    return WhisperForConditionalGeneration(WhisperConfig(**sizes, **places, **_WIDTHS, **_IDS, bos_token_id=3))


FAMILIES: Mapping[str, Callable[[], nn.Module]] = {"t5": t5, "bart": bart, "whisper": whisper}
NAMES = [pytest.param("t5", marks=pytest.mark.full), "bart", "whisper"]


def texts(rows: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(4, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def read_by(name: str, rows: int = 2, seed: int = 1) -> dict[str, torch.Tensor]:
    """What the encoder reads, the second row shorter where rows are texts."""
    if name == "whisper":
        return {"input_features": torch.randn(rows, 8, 40, generator=torch.Generator().manual_seed(seed))}
    mask = torch.ones(rows, 9, dtype=torch.int64)
    mask[1:, 6:] = 0
    return {"input_ids": texts(rows, 9, seed) * mask, "attention_mask": mask}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[nn.Module, mm.Compiled, Path]]]:
    found: dict[str, tuple[nn.Module, mm.Compiled, Path]] = {}

    def get(name: str) -> tuple[nn.Module, mm.Compiled, Path]:
        if name not in found:
            place = tmp_path_factory.mktemp(name)
            module = built(FAMILIES[name])
            module.save_pretrained(place / "source")
            example = {**read_by(name), "decoder_input_ids": texts(2, 8, 2)}
            compiled = mm.compile(module, KEEP, example, cache=True, hf_folder=place / "source")
            found[name] = module, compiled, compiled.save(place / "out")
        return found[name]

    return get


def empty(session: Session, rows: int) -> dict[str, np.ndarray]:
    cache = session.manifest.cache
    assert cache is not None
    pasts = {slot.past for slot in cache.slots}
    shapes = {info.name: info.shape for info in session.inputs if info.name in pasts}
    return {name: np.zeros((rows, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", NAMES)
def test_written_in_any_pieces_as_without_a_cache(name: str, made: Any) -> None:
    module, _, folder = made(name)
    read, ids = read_by(name, seed=5), texts(2, 11, 6)
    with torch.no_grad():
        expected = module(**read, decoder_input_ids=ids, use_cache=False).logits.numpy()
    encoder, decoder = (Session(folder, ["cpu"], part=part) for part in ("encoder", "decoder"))
    states = encoder.run({name: tensor.numpy() for name, tensor in read.items()})
    handed = {one.taken: states[one.made] for one in encoder_parts(folder).handed}
    beside = {name: tensor.numpy() for name, tensor in read.items() if name in {info.name for info in decoder.inputs}}
    for cut in ([11], [4, 7], [1] * 11):
        past, found, done = empty(decoder, 2), [], 0
        for length in cut:
            answer = decoder.run({**beside, **handed, **past, "decoder_input_ids": ids[:, done : done + length].numpy()})
            past = {name: answer[name.replace("past_key_values", "present")] for name in past}
            found.append(answer["logits"])
            done += length
        assert np.abs(np.concatenate(found, 1) - expected).max() <= CLOSE * np.abs(expected).max()


def encoder_parts(folder: Path) -> Any:
    return Session(folder, ["cpu"]).manifest.parts


@pytest.mark.parametrize("name", NAMES)
def test_cut_in_two_the_graph_answers_to_the_bit(name: str, made: Any) -> None:
    _, compiled, _ = made(name)
    graph = compiled.graph
    halves = find_halves(graph)
    assert halves is not None
    assert not isinstance(halves, str)
    examples = dict(zip((entry.name for entry in graph.signature.inputs), compiled._job.examples, strict=True))
    with torch.no_grad():
        whole = dict(zip(graph.signature.outputs, evaluate(graph, list(examples.values())), strict=True))
        found: dict[str, Any] = {}
        for half in (halves.encoder, halves.decoder):
            taken = {**examples, **{one.taken: found[one.made] for one in halves.crossings if one.made in found}}
            answer = evaluate(half, [taken[entry.name] for entry in half.signature.inputs])
            found |= dict(zip(half.signature.outputs, answer, strict=True))
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    # Each half has what it needs and no more: the new tokens are the decoder's, what is read is the encoder's, the mask of it both's.
    new, read = ({"decoder_input_ids"}, set(read_by(name)) - {"attention_mask"})
    taken_by = [{entry.name for entry in half.signature.inputs} for half in (halves.encoder, halves.decoder)]
    assert not taken_by[0] & new
    assert not taken_by[1] & read
    assert taken_by[0] >= read
    assert taken_by[1] >= {*new, *(slot.input for slot in find_slots(graph)), *(one.taken for one in halves.crossings)}
    weights = [{const.path for const in half.used_state()} for half in (halves.encoder, halves.decoder)]
    assert not any(".k_proj" in path and "encoder_attn" in path for path in weights[1])
    assert {const.path for const in graph.used_state()} == weights[0] | weights[1]


def test_a_decoder_that_reads_beside_its_cache_is_not_cut(made: Any) -> None:
    _, compiled, _ = made("bart")
    graph = compiled.graph
    named = [(name, out) for name, out in zip(graph.signature.outputs, graph.outputs, strict=True) if not name.endswith("1.encoder.value")]
    kept = replace(
        graph, outputs=tuple(out for _, out in named), signature=replace(graph.signature, outputs=tuple(name for name, _ in named))
    )
    found = find_halves(kept)
    assert isinstance(found, str)
    assert "reads what the encoder read" in found
    assert find_halves(replace(graph, outputs=(), signature=replace(graph.signature, outputs=()))) is None


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_what_transformers_writes(name: str, made: Any) -> None:
    module, _, folder = made(name)
    generator = Seq2SeqGenerator(folder, ["cpu"], threads=1)
    read = read_by(name, rows=3, seed=10 if name == "t5" else 8)
    expected = greedy(module, read, 20)
    inputs = {"whisper": lambda: read["input_features"].numpy()}.get(name, lambda: read["input_ids"].numpy())()
    mask = read["attention_mask"].numpy() if "attention_mask" in read else None
    assert generator.generate(inputs, mask, max_new_tokens=20).tolist() == expected
    if mask is not None:  # rows of any length, without a mask of the caller's own
        rows = [row[:length].tolist() for row, length in zip(inputs, mask.sum(1), strict=True)]
        assert generator.generate(rows, max_new_tokens=20).tolist() == expected


def greedy(module: nn.Module, read: Mapping[str, torch.Tensor], new: int) -> list[list[int]]:
    """Without a cache: the whole text again for each token. No choice is a near tie."""
    ids = torch.full((len(next(iter(read.values()))), 1), START)
    ended = torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(new):
        with torch.no_grad():
            last = module(**read, decoder_input_ids=ids, use_cache=False).logits[:, -1]
        two = last.topk(2).values
        assert (two[:, 0] - two[:, 1])[~ended].min() > 1e-3
        token = torch.where(ended, PAD, last.argmax(-1))
        ids, ended = torch.cat([ids, token[:, None]], 1), ended | (token == END)
        if ended.all():
            break
    return ids[:, 1:].tolist()


@pytest.mark.full
def test_what_transformers_generates_is_what_we_generate(made: Any) -> None:
    module, _, folder = made("t5")
    read = read_by("t5", rows=2, seed=9)
    expected = module.generate(**read, max_new_tokens=12, do_sample=False, num_beams=1)[:, 1:].tolist()
    rows = [row[row != PAD].tolist() for row in read["input_ids"].numpy()]
    assert Seq2SeqGenerator(folder, ["cpu"]).generate(rows, max_new_tokens=12).tolist() == expected


def test_tokens_that_are_forced_and_barred(made: Any) -> None:
    _, _, folder = made("bart")
    generator = Seq2SeqGenerator(folder, ["cpu"], threads=1)
    free = generator.generate([[5, 6, 7]], max_new_tokens=6, eos=[])[0].tolist()
    generator._special = replace(generator.special, first=33, never=(free[1],), not_first=(free[0],))
    forced = generator.generate([[5, 6, 7]], max_new_tokens=6, eos=[])[0].tolist()
    assert forced[0] == 33
    assert free[1] not in forced
    generator._special = replace(generator.special, first=None, never=None)
    assert generator.generate([[5, 6, 7]], max_new_tokens=6, eos=[])[0, 0] != free[0]
    started = generator.generate([[5, 6, 7]], max_new_tokens=5, eos=[], start=[START, free[0]])[0].tolist()
    assert started != free[1:]  # the second token may not come first behind another start either
    generator._special = replace(generator.special, not_first=None)
    assert generator.generate([[5, 6, 7]], max_new_tokens=5, eos=[], start=[START, free[0]])[0].tolist() == free[1:]


def test_the_folder_says_what_is_in_it_and_verify_runs_it(made: Any) -> None:
    module, _, folder = made("bart")
    result = check(folder, ["cpu"])
    assert result.ok, result.problems
    assert any(line.startswith("encoder and decoder: ") for line in result.lines)
    assert {"encoder.onnx", "decoder.onnx", "model.onnx", "model.onnx.data"} <= {path.name for path in folder.iterdir()}
    size = sum(parameter.numel() * 4 for parameter in module.parameters())  # a table with four names once
    assert (folder / "model.onnx.data").stat().st_size < size + 64 * 200  # one copy of the weights, each on a line of its own
    cache = Session(folder, ["cpu"]).manifest.cache
    assert cache is not None
    assert cache.max_length == 64
    assert cache.bytes_per_token == 2 * 2 * 4 * 8 * 4  # layers, keys and values, heads, size, float32
    with pytest.raises(ArtifactError, match=r"reads with an encoder: matmorph\.runtime\.Seq2SeqGenerator"):
        Generator(folder)


def test_a_part_that_answers_otherwise_is_seen(made: Any, tmp_path: Path) -> None:
    import shutil

    import onnx

    from matmorph.exporters.artifact import json_bytes
    from matmorph.runtime.format.artifact import file_record, with_file
    from matmorph.runtime.format.reading import read_json

    folder = tmp_path / "changed"
    shutil.copytree(made("bart")[2], folder)
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Softmax")
    node.op_type = "LogSoftmax"
    data = model.SerializeToString()
    (folder / "decoder.onnx").write_bytes(data)
    changed = with_file(read_json(folder / "manifest.json", lambda found: found), "decoder.onnx", file_record(data))
    assert changed is not None
    (folder / "manifest.json").write_bytes(json_bytes(changed))
    problems = check(folder, ["cpu"]).problems
    assert problems
    assert all(problem.startswith("encoder and decoder, case ") for problem in problems)


@pytest.mark.full
def test_adapters_are_trained_on_the_same_weights_and_merged(made: Any, tmp_path: Path) -> None:
    module, _, plain = made("bart")
    spec = {
        "version": 1,
        "rules": [{"match": {"op": "matmul", "role": "attention.q"}, "rewrite": {"lora": {"rank": 2}}}],
        "train": {"loss": "cross_entropy"},
        "export": {"adapters": "inputs"},
    }
    example = {**read_by("bart"), "decoder_input_ids": texts(2, 8, 2)}
    folder = mm.compile(module, spec, example, cache=True, hf_folder=plain.parent / "source").save(tmp_path / "out")
    assert check(folder, ["cpu"]).ok
    trainer = Trainer(folder)
    batch = {**{name: tensor.numpy() for name, tensor in example.items()}, "labels": texts(2, 8, 3).numpy()}
    losses = [trainer.step(batch) for _ in range(4)]
    assert losses[-1] < losses[0]
    trainer.save_parameters(tmp_path / "values.safetensors")
    commands = {
        "adapter": ["adapter", "save", folder, "--trained", tmp_path / "values.safetensors", "--out", tmp_path / "one.onnx_adapter"],
        "merge": ["merge", folder, "--trained", tmp_path / "values.safetensors", "--out", tmp_path / "merged"],
    }
    for words in commands.values():
        done = CliRunner().invoke(app, list(map(str, words)))
        assert done.exit_code == 0, done.exception
    generator = Seq2SeqGenerator(folder, ["cpu"])
    adapter = generator.load_adapter(tmp_path / "one.onnx_adapter")
    base = Seq2SeqGenerator(plain, ["cpu"]).generate([[5, 6, 7]], max_new_tokens=8, eos=[])
    assert generator.generate([[5, 6, 7]], max_new_tokens=8, eos=[]).tolist() == base.tolist()
    expected = Seq2SeqGenerator(tmp_path / "merged", ["cpu"]).generate([[5, 6, 7]], max_new_tokens=8, eos=[])
    assert generator.generate([[5, 6, 7]], max_new_tokens=8, eos=[], adapter=adapter).tolist() == expected.tolist()


@pytest.mark.full
@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize(
    "rewrite",
    [{"low_rank": {"rank": 8}}, {"quantize": {"quantizer": "uniform", "bits": 4, "block_size": 16}}],
    ids=["low_rank", "quantize"],
)
def test_rewritten_models_are_cut_too(name: str, rewrite: dict[str, Any], tmp_path: Path) -> None:
    spec = {"version": 1, "rules": [{"match": {"op": "matmul", "role": ["attention.*", "mlp.*"]}, "rewrite": rewrite}]}
    example = {**read_by(name), "decoder_input_ids": texts(2, 8, 2)}
    compiled = mm.compile(built(FAMILIES[name]), spec, example, cache=True)
    folder = compiled.save(tmp_path / "out")
    assert check(folder, ["cpu"]).ok
    whole = Seq2SeqGenerator(folder, ["cpu"]).generate([[5, 6, 7, 8]], max_new_tokens=6, start=START, eos=[], pad=PAD)
    assert whole.shape == (1, 6)


@pytest.mark.full
def test_a_folder_is_compiled_with_its_cache_and_the_command_line_writes(made: Any, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="needs the package tokenizers")
    module, _, _ = made("bart")
    source = tmp_path / "source"
    module.save_pretrained(source)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{k}": k for k in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(source / "tokenizer.json"))
    assert resolve(str(source)).cache
    assert not resolve(str(source), cache=False).cache
    out = tmp_path / "out"
    (tmp_path / "keep.yaml").write_text("version: 1\nrules:\n  - match: {op: matmul}\n    rewrite: keep\n")
    run = CliRunner()
    done = run.invoke(app, ["compile", str(source), "--spec", str(tmp_path / "keep.yaml"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "no genai_config.json: the model has an encoder" in done.output
    answer = run.invoke(app, ["generate", str(out), "--prompt", "w5 w6 w7", "--max-new-tokens", "5"])
    assert answer.exit_code == 0, answer.output
    expected = Seq2SeqGenerator(out, ["cpu"]).generate([[5, 6, 7]], max_new_tokens=5)[0].tolist()
    text = [f"w{token}" for token in expected if token not in (PAD, END)]
    assert answer.stdout.split() == text or set(text) <= set(answer.stdout.split())
    refused = run.invoke(app, ["layout", str(out), "--for", "genai", "--out", str(tmp_path / "genai")])
    assert isinstance(refused.exception, InputError)
    assert "the model has an encoder, and layout genai is of decoders alone" in str(refused.exception)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "is called with input_ids; given: attention_mask, decoder_input_ids"),
        ({"decoder_input_ids": None}, "is called with decoder_input_ids; given: input_ids, attention_mask"),
        ({"decoder_input_ids": texts(2, 3, 0)}, "four tokens or more"),
        ({"attention_mask": torch.ones(2, 3)}, r"attention_mask of the example has shape \(2, 3\), and input_ids \(2, 9\)"),
        ({"position_ids": texts(2, 9, 0)}, "not with position_ids"),
    ],
)
def test_other_examples_are_refused(change: dict[str, Any], message: str) -> None:
    example = {**read_by("t5"), "decoder_input_ids": texts(2, 8, 2), **change}
    with pytest.raises(InputError, match=message):
        mm.inspect_model(built(t5), {name: tensor for name, tensor in example.items() if tensor is not None}, cache=True)


def test_other_inputs_are_refused(made: Any) -> None:
    texts_, sounds = (Seq2SeqGenerator(made(name)[2], ["cpu"]) for name in ("bart", "whisper"))
    features = read_by("whisper")["input_features"].numpy()
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: texts_.generate([[5, 6]], max_new_tokens=4, start=[]), "begins with one token"),
        (lambda: texts_.generate([[5, 6]], max_new_tokens=4, start=VOCAB), f"start is {VOCAB}, no token id"),
        (lambda: texts_.generate([[]], max_new_tokens=4), "prompt 0 is empty"),
        (lambda: texts_.generate([[5, 6]], max_new_tokens=0), "max_new_tokens is 0"),
        (lambda: sounds.generate(features[:, :, :-1], max_new_tokens=4), "input_features"),
        (lambda: sounds.generate(features, np.ones((2, 40)), max_new_tokens=4), "reads input_features, all of it"),
        (lambda: sounds.generate(features, max_new_tokens=48), "positions for 48"),
    ]
    for call, message in cases:
        with pytest.raises(InputMismatch, match=message):
            call()
    with pytest.raises(ArtifactError, match="has no encoder of its own"):
        Seq2SeqGenerator(_decoder_only())


def _decoder_only() -> Path:
    from tempfile import mkdtemp

    from tiny_decoder import write_decoder

    return write_decoder(Path(mkdtemp()) / "d")
