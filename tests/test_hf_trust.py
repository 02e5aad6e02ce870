"""A Hugging Face folder is read, not obeyed: no code is loaded for it, and nothing outside it is read."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import Mark
from safetensors.torch import load_file, save_file

from matmorph.errors import InputError
from matmorph.models.resolve import resolve

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("hub") / "bert"
    BertModel(BertConfig(**TINY)).save_pretrained(folder)
    return folder


@pytest.fixture
def own(bert: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bert, tmp_path / "own"))


def configured(folder: Path, **more: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        resolve(str(folder))
    assert "\n" not in caught.value.message
    return caught.value.message


def elsewhere(folder: Path, name: str) -> None:
    """The weights lie beside the folder, and an index names them there."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {key: name for key in weights}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def linked(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors").symlink_to("../outside.safetensors")


CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "kernel": (lambda f: configured(f, _attn_implementation="org/kernel"), '_attn_implementation: "org/kernel" is a kernel'),
    "kernel at a version": (lambda f: configured(f, attn_implementation="org/kernel@main:f"), "attn_implementation: "),
    "kernel of a part": (lambda f: configured(f, text_config={"_attn_implementation": {"": "a/b"}}), '_attn_implementation: "a/b"'),
    "index": (lambda f: elsewhere(f, "../outside.safetensors"), "'../outside.safetensors': a file must lie inside the folder"),
    "index, absolute": (lambda f: elsewhere(f, str(f.parent / "outside.safetensors")), "a file must lie inside the folder"),
    "index, drive": (lambda f: elsewhere(f, "C:/outside.safetensors"), "'C:/outside.safetensors': a file must lie inside the folder"),
    "index, backslash": (lambda f: elsewhere(f, "..\\outside.safetensors"), "a file must lie inside the folder"),
    "setting": (lambda f: configured(f, transformers_weights="../x.safetensors"), 'transformers_weights: "../x.safetensors": a file must'),
    "link": (linked, "model.safetensors: is a link that leads out of the folder, to "),
    "adapter": (
        lambda f: (f / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere", "peft_type": "LORA"})),
        "holds adapter_config.json",
    ),
    "nested": (lambda f: (f / "config.json").write_text('{"a":' * 200_000), "config.json: cannot be read"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_leads_out_or_runs_is_refused_by_name(own: Path, case: str) -> None:
    change, said = CASES[case]
    change(own)
    message = refused(own)
    assert str(own) in message
    assert said in message


def test_code_of_the_folder_is_not_run(own: Path, tmp_path: Path) -> None:
    """auto_map beside a class that transformers has is not looked at; beside another one it is what is refused."""
    mark = tmp_path / "mark"
    (own / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Evil: pass\n")
    (own / "custom_generate").mkdir()
    (own / "custom_generate" / "generate.py").write_text((own / "evil.py").read_text())
    configured(own, auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"})
    assert type(resolve(str(own)).module).__name__ == "BertModel"
    configured(own, architectures=["EvilModel"])
    assert "has no EvilModel; its auto_map names code of the folder, which is not run" in refused(own)
    assert not mark.exists()


def test_pickled_weights_are_read_as_weights_only(own: Path, tmp_path: Path) -> None:
    weights = load_file(own / "model.safetensors")
    (own / "model.safetensors").unlink()
    torch.save(weights, own / "pytorch_model.bin")
    assert torch.equal(resolve(str(own)).module.state_dict()["pooler.dense.weight"], weights["pooler.dense.weight"])
    mark = tmp_path / "mark"
    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        save({**weights, "x": Mark(mark)}, own / "pytorch_model.bin")
        assert str(own) in refused(own)
        assert not mark.exists()


def test_the_links_of_a_hubs_cache_are_fine(bert: Path, tmp_path: Path) -> None:
    store = tmp_path / "models--org--name"
    snapshot = store / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (store / "blobs").mkdir()
    for number, path in enumerate(sorted(bert.iterdir())):
        shutil.copy(path, store / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert type(resolve(str(snapshot)).module).__name__ == "BertModel"
    (tmp_path / "outside.safetensors").write_bytes((bert / "model.safetensors").read_bytes())
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    assert "is a link that leads out of the folder" in refused(snapshot)


def test_weights_in_pieces_inside_the_folder_are_fine(own: Path) -> None:
    weights = load_file(own / "model.safetensors")
    (own / "model.safetensors").unlink()
    names = sorted(weights)
    for part, some in enumerate((names[:5], names[5:])):
        save_file({name: weights[name] for name in some}, own / f"model-0000{part + 1}-of-00002.safetensors", {"format": "pt"})
    where = {name: f"model-0000{1 + (number >= 5)}-of-00002.safetensors" for number, name in enumerate(names)}
    (own / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    assert torch.equal(resolve(str(own)).module.state_dict()["pooler.dense.weight"], weights["pooler.dense.weight"])
