"""What lies beside a model in its folder: copied as it was, carried on by what writes a folder again, laid out for other runtimes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import matmorph as mm
from matmorph.cli.main import main
from matmorph.errors import InputError
from matmorph.exporters.layouts.genai import genai_config
from matmorph.folders.open import reopen
from matmorph.models import companions
from matmorph.models.companions import read_companions
from matmorph.runtime.check import check
from matmorph.runtime.format import artifact, training
from matmorph.runtime.format.cache import CacheInfo, CacheSlot
from matmorph.runtime.format.companions import COMPANIONS, GENAI

CONFIG = {
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_size": 576,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "vocab_size": 49152,
}
LAYERS = 3


def cache(form: str = "{}.{}.{}", layers: int = LAYERS, share: bool = False, length: int | None = 8192) -> CacheInfo:
    names = [(n, part) for n in range(layers) for part in ("key", "value")]
    slots = tuple(CacheSlot(form.format("past_key_values", n, p), form.format("present", n, p), 2) for n, p in names)
    return CacheInfo(slots, "right" if share else "any", share, length, 1536)


def ports(info: CacheInfo, *more: str, heads: int = 3) -> tuple[dict[str, Any], dict[str, Any]]:
    inputs = {name: ("batch_size", "sequence_length") for name in ("input_ids", "attention_mask", "position_ids", *more)}
    pasts = {slot.past: ("batch_size", heads, "past_sequence_length", 64) for slot in info.slots}
    return {**inputs, **pasts}, {"logits": ("batch_size", "sequence_length", 49152)}


def run(*words: Any) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    return int(caught.value.code or 0)


# ---- genai_config.json


def test_genai_config_of_a_llama() -> None:
    """The file of the project's own trials with onnxruntime-genai 0.18, key by key."""
    info = cache()
    found = genai_config(CONFIG, {"do_sample": True, "temperature": 0.2, "top_p": None}, info, *ports(info))
    assert found.notes == ()
    assert found.data == {
        "model": {
            "type": "llama",
            "bos_token_id": 1,
            "eos_token_id": [2],
            "pad_token_id": 0,
            "vocab_size": 49152,
            "context_length": 8192,
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"provider_options": []},
                "head_size": 64,
                "hidden_size": 576,
                "num_attention_heads": 9,
                "num_hidden_layers": LAYERS,
                "num_key_value_heads": 3,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {"logits": "logits", "present_key_names": "present.%d.key", "present_value_names": "present.%d.value"},
            },
        },
        "search": {"do_sample": True, "temperature": 0.2, "max_length": 8192, "past_present_share_buffer": False},
    }


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("qwen3", "qwen3"), ("gpt_oss", "gptoss"), ("gpt2", "decoder"), ("lfm2", "decoder"), ("mine", "decoder"), (7, "decoder")],
)
def test_type_is_one_of_genais(kind: Any, expected: str) -> None:
    info = cache()
    found = genai_config({**CONFIG, "model_type": kind}, {}, info, *ports(info))
    assert found.data is not None
    assert found.data["model"]["type"] == expected
    assert bool(found.notes) == (expected == "decoder")
    assert all(repr(kind) in note for note in found.notes)


def test_tokens_of_the_generation_config_come_first() -> None:
    info = cache()
    found = genai_config(CONFIG, {"eos_token_id": [5, 6], "pad_token_id": 9}, info, *ports(info))
    assert found.data is not None
    assert (found.data["model"]["eos_token_id"], found.data["model"]["pad_token_id"]) == ([5, 6], 9)


def test_end_and_pad_that_are_missing_are_said() -> None:
    info = cache()
    bare = {name: value for name, value in CONFIG.items() if not name.endswith("token_id")}
    found = genai_config(bare, {}, info, *ports(info))
    assert found.data is not None
    assert "eos_token_id" not in found.data["model"]
    assert found.data["model"]["pad_token_id"] == 49151
    assert found.notes == (
        "genai_config.json: the source names no pad_token_id; 49151 stands for it",
        "genai_config.json: the source names no eos_token_id; onnxruntime-genai ends at the pad token, 49151, and at max_length",
    )
    ended = genai_config({**bare, "eos_token_id": [4, 5]}, {"pad_token_id": None}, info, *ports(info))
    assert ended.data is not None
    assert ended.data["model"]["pad_token_id"] == 4
    assert ended.notes == ("genai_config.json: the source names no pad_token_id; 4 stands for it",)


def test_a_shared_buffer_and_a_gpu_are_said() -> None:
    info = cache(share=True)
    found = genai_config(CONFIG, {}, info, *ports(info), providers=["cuda"])
    assert found.data is not None
    assert found.data["search"]["past_present_share_buffer"] is True
    assert found.data["model"]["decoder"]["session_options"] == {"provider_options": [{"cuda": {}}]}


def test_figures_are_the_graphs() -> None:
    """Of a model whose heads were pruned: the source's number of query heads says nothing then."""
    info = cache(length=None)
    found = genai_config({**CONFIG, "max_position_embeddings": 99}, {}, info, *ports(info, heads=2))
    assert found.data is not None
    assert found.data["model"]["decoder"]["num_key_value_heads"] == 2
    assert "num_attention_heads" not in found.data["model"]["decoder"]
    assert found.data["model"]["context_length"] == 99


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda i: ({**CONFIG}, i, *ports(i, "pixel_values")), "it would not feed the input pixel_values"),
        (lambda i: ({**CONFIG}, i, {"ids": ()}, {"logits": (1, 2)}), "it runs models from input_ids to logits"),
        (lambda i: ({**CONFIG}, cache("{0}_{2}_x{1}"), *ports(cache("{0}_{2}_x{1}"))), "one pair of keys and values per layer"),
        (lambda i: ({}, cache(length=None), *ports(i)), "config.json does not say how many positions"),
        (lambda i: ({**CONFIG}, i, ports(i)[0], {"logits": ("b", "s", "v")}), "the size of the vocabulary is not fixed"),
    ],
)
def test_what_genai_cannot_run_is_said(change: Callable[[CacheInfo], tuple[Any, ...]], words: str) -> None:
    config, info, inputs, outputs = change(cache())
    found = genai_config(config, {}, info, inputs, outputs)
    assert found.data is None
    assert found.notes[0].startswith("no genai_config.json: ")
    assert words in found.notes[0]


def test_a_layer_that_lacks_its_values_is_said() -> None:
    info = cache()
    holed = CacheInfo((*info.slots[:3], *info.slots[4:]), "any", False, 8, 1)
    assert genai_config(CONFIG, {}, holed, *ports(holed)).data is None


# ---- files


def source(folder: Path) -> Path:
    """A folder as the hub has them, weights aside."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=7))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    (folder / "tokenizer.json").write_bytes(b'{"version":"1.0" }\r\n')
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656, "eos_token": "\\u00e9"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}\u00e9", encoding="utf-8")
    (folder / "README.md").write_text("of the source")
    (folder / "modeling_mine.py").write_text("raise SystemExit")
    return folder


TAKEN = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
X = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`, and `out`: a model with training graphs that was compiled with it."""
    home = tmp_path_factory.mktemp("companions")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    rule = {"match": {"op": "linear"}, "rewrite": {"lora": {"rank": 2}}}
    spec = {"version": 1, "rules": [rule], "export": {"target": ["cpu"]}, "train": {"loss": "mse", "trainable": ["adapters"]}}
    compiled = mm.compile(model, spec, (X,), ({0: "batch"},), hf_folder=source(home / "hf"))
    compiled.save(home / "out")
    return home


def test_no_name_is_one_of_ours() -> None:
    ours = {value for room in (artifact, training) for value in vars(room).values() if isinstance(value, str)}
    assert {"manifest.json", "spec.yaml", "train.json"} <= ours
    assert not ours & {name.lower() for name in (*COMPANIONS, GENAI)}
    assert len(set(COMPANIONS)) == len(COMPANIONS)


def test_files_are_copied_as_they_are(home: Path) -> None:
    for name in TAKEN:
        assert (home / "out" / name).read_bytes() == (home / "hf" / name).read_bytes()
    listed = set(json.loads((home / "out" / "manifest.json").read_text())["files"])
    assert set(TAKEN) <= listed
    assert not {"README.md", "modeling_mine.py", GENAI} & listed  # nothing of the source that is no data; no cache, no genai
    assert check(home / "out").ok


def test_what_compile_wrote_is_no_source(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", home / "out") == 2
    assert "was written by compile and is no model to compile" in capsys.readouterr().err


def test_a_changed_companion_is_found(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "out", tmp_path / "own")
    (tmp_path / "own" / "tokenizer.json").write_text("{}")
    assert any("tokenizer.json" in problem for problem in check(tmp_path / "own").problems)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        reopen(tmp_path / "own")


def test_merging_carries_them_on(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("merge", home / "out", "--out", tmp_path / "merged") == 0
    for name in TAKEN:
        assert (tmp_path / "merged" / name).read_bytes() == (home / "hf" / name).read_bytes()
    assert check(tmp_path / "merged").ok


def test_a_damaged_configuration_behind_its_hash(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = Path(shutil.copytree(home / "out", tmp_path / "own"))
    (own / "config.json").write_text("{")
    manifest = json.loads((own / "manifest.json").read_text())
    manifest["files"]["config.json"] = {"sha256": artifact.file_record(b"{").sha256, "bytes": 1}
    (own / "manifest.json").write_text(json.dumps(manifest))
    assert run("merge", own, "--out", tmp_path / "merged") == 2
    assert "config.json" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def linked(folder: Path) -> None:
    (folder.parent / "outside").write_text("{}")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("../outside")


def dangling(folder: Path) -> None:
    (folder / "vocab.txt").symlink_to("nothing")


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "link": (linked, "tokenizer.json: is a link that leads out of the folder"),
    "dangling link": (dangling, "vocab.txt: missing"),
    "folder": (lambda f: (f / "merges.txt").mkdir(), "merges.txt: not a file"),
    "generation": (lambda f: (f / "generation_config.json").write_text("[1]"), "generation_config.json: the file: unexpected value"),
    "generation, bytes": (lambda f: (f / "generation_config.json").write_bytes(b"\xff"), "generation_config.json: cannot be read"),
    "config": (lambda f: (f / "config.json").unlink(), "not a Hugging Face model folder: it has no config.json"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_hostile_source_is_refused(case: str, tmp_path: Path) -> None:
    folder = source(tmp_path / "hf")
    change, words = FAULTS[case]
    change(folder)
    with pytest.raises(InputError) as caught:
        read_companions(folder)
    assert words in caught.value.message


def test_a_file_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companions, "LARGEST", 10)
    with pytest.raises(InputError, match=r"config\.json: has \d+ bytes, at most 10 are read"):
        read_companions(source(tmp_path / "hf"))


# ---- where a rewrite is narrower than the configuration says


def test_widths_that_no_longer_hold_are_named(tmp_path: Path) -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.nn.functional.gelu(self.up(x)))

    (tmp_path / "hf").mkdir()
    config = {"model_type": "mine", "intermediate_size": 32, "num_attention_heads": 4, "n_inner": None}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    block = Block()
    found = {}
    for name, rewrite in {"narrow": {"transact": {"width": "50%"}}, "factored": {"low_rank": {"rank": 4}}}.items():
        match = {"block": "mlp"} if name == "narrow" else {"op": "linear"}
        spec = {"version": 1, "rules": [{"match": match, "rewrite": rewrite}], "export": {"target": ["cpu"]}}
        compiled = mm.compile(block, spec, (x,), ({0: "batch"},), calibration=[(x,)], hf_folder=tmp_path / "hf")
        folder = compiled.save(tmp_path / name)
        assert (folder / "config.json").read_bytes() == (tmp_path / "hf" / "config.json").read_bytes()
        notes = json.loads((folder / "manifest.json").read_text())["notes"]
        found[name] = [note for note in notes if "config.json" in note]
    assert found["narrow"] == ["config.json is the source's: intermediate_size (32) no longer holds in 1 layer that transact narrowed"]
    assert found["factored"] == []


# ---- a decoder


def test_a_decoder_gets_its_genai_config(tmp_path: Path) -> None:
    """With a cache alone; without a tokenizer, which a note says."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 67, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    module.save_pretrained(tmp_path / "hf")
    ids = torch.randint(3, 67, (2, 8), generator=torch.Generator().manual_seed(0))
    spec = {"version": 1, "rules": [{"match": {"op": "matmul"}, "rewrite": "keep"}], "export": {"target": ["cpu"]}}
    folder = mm.compile(module, spec, {"input_ids": ids}, cache=True, hf_folder=tmp_path / "hf").save(tmp_path / "out")
    manifest = json.loads((folder / "manifest.json").read_text())
    data = json.loads((folder / GENAI).read_text())
    assert GENAI in manifest["files"]
    assert data["model"]["type"] == "decoder"
    assert data["model"]["eos_token_id"] == [2]
    assert data["model"]["context_length"] == data["search"]["max_length"] == 32
    decoder = data["model"]["decoder"]
    assert [decoder[key] for key in ("head_size", "num_hidden_layers", "num_key_value_heads")] == [8, 1, 2]
    named = {entry["name"] for entry in manifest["inputs"]}
    assert {decoder["inputs"]["past_key_names"] % 0, decoder["inputs"]["past_value_names"] % 0, "input_ids"} <= named
    assert named <= {*decoder["inputs"].values(), "past_key_values.0.key", "past_key_values.0.value"}
    assert "the source folder has no tokenizer, so the artefact takes and gives token ids alone" in manifest["notes"]
    assert any("type is decoder, for 'gpt2'" in note for note in manifest["notes"])
    assert run("layout", folder, "--for", "genai", "--out", tmp_path / "tree") == 0
    assert names(tmp_path / "tree") == {"model.onnx", "model.onnx.data", "config.json", "generation_config.json", GENAI}


# ---- layouts


def laid_out(home: Path, out: Path, layout: str, *more: str) -> int:
    return run("layout", home / "out", "--for", layout, "--out", out, *more)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def answer(model: Path) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    found: np.ndarray[Any, Any] = session.run(None, {session.get_inputs()[0].name: X.numpy()})[0]
    return found


def test_transformers_js_finds_its_tree(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tmp_path / "tree"
    assert laid_out(home, tree, "transformers.js") == 0
    assert names(tree) == {*TAKEN, "onnx/model.onnx", "onnx/model.onnx_data"}
    assert np.array_equal(answer(tree / "onnx/model.onnx"), answer(home / "out/model.onnx"))  # the same bytes under another name
    config = json.loads((tree / "config.json").read_text())
    assert config.pop("transformers.js_config") == {"use_external_data_format": True, "dtype": "fp32"}
    assert config == CONFIG
    assert (tree / "tokenizer.json").read_bytes() == (home / "hf/tokenizer.json").read_bytes()
    joined = json.loads((tree / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert joined.pop("chat_template") == (home / "hf/chat_template.jinja").read_text(encoding="utf-8")
    assert joined == json.loads((home / "hf/tokenizer_config.json").read_text())


def test_optimum_finds_its_tree(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert laid_out(home, tmp_path / "tree", "hf") == 0
    assert names(tmp_path / "tree") == {*TAKEN, "model.onnx", "model.onnx.data"}
    assert (tmp_path / "tree/config.json").read_bytes() == (home / "hf/config.json").read_bytes()
    assert laid_out(home, tmp_path / "tree", "hf") == 2  # it exists
    assert laid_out(home, tmp_path / "tree", "transformers.js", "--force") == 0
    (tmp_path / "tree/mine.txt").write_text("of the user")
    assert laid_out(home, tmp_path / "tree", "hf", "--force") == 2
    assert (tmp_path / "tree/mine.txt").read_text() == "of the user"
    assert "holds something other than a model laid out for another runtime" in capsys.readouterr().err


def test_a_layout_that_cannot_be(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert laid_out(home, tmp_path / "tree", "genai") == 2  # no cache, so no genai_config.json
    assert "has no genai_config.json, which layout genai needs" in capsys.readouterr().err
    assert laid_out(home, tmp_path / "tree", "transformer.js") == 2
    assert "--for transformer.js: no such layout; did you mean transformers.js?" in capsys.readouterr().err
    assert not (tmp_path / "tree").exists()


def test_a_damaged_folder_is_not_laid_out(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = Path(shutil.copytree(home / "out", tmp_path / "own"))
    data = bytearray((own / "model.onnx.data").read_bytes())
    data[5] ^= 1
    (own / "model.onnx.data").write_bytes(data)
    assert run("layout", own, "--for", "hf", "--out", tmp_path / "tree") == 2
    assert "model.onnx.data: was changed" in capsys.readouterr().err
    assert not (tmp_path / "tree").exists()
