"""Weights that stay in their files: the same bits as other readers find there, the same folder as from a model in memory, and every fault
of a file told before anything is computed."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import matmorph as mm
from matmorph.errors import InputError
from matmorph.ir.core import Graph
from matmorph.ir.mapped import Place, identity_of
from matmorph.models.meta_model import with_weights
from matmorph.models.resolve import Model, resolve
from matmorph.models.shards import INDEX, SINGLE, stored_tensors

transformers = pytest.importorskip("transformers", reason="makes the folders")

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
SPEC: dict[str, Any] = {
    "version": 1,
    "name": "mixed",
    "rules": [
        {"match": {"role": "mlp.*"}, "rewrite": {"low_rank": {"rank": 8}}},
        {"match": {"role": "attention.*"}, "rewrite": {"quantize": {"quantizer": "uniform", "bits": 4, "block_size": 16}}},
    ],
}


def llama(**more: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **more}))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama in three files or more."""
    folder = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


@pytest.fixture
def own(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "own"))


def opened(folder: Path, cache: bool = False) -> Model:
    found = mm.open_folder(folder, cache)
    assert found.weights is not None
    return found


def graph_of(model: Model) -> Graph:
    assert model.weights is not None
    with model.weights.filled(model.module):
        return model.weights.referred(mm.trace(model.module, model.example_inputs, model.dynamic_shapes))


@pytest.fixture(scope="module")
def graph(shards: Path) -> Graph:
    """A trace takes longer than all that is asked of it."""
    return graph_of(opened(shards))


def all_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


# ---- what is read


def test_every_weight_is_what_another_reader_finds(shards: Path, graph: Graph) -> None:
    stored = all_of(shards)
    consts = {const.path: const for const in graph.state if const.kind == "parameter"}
    assert set(consts) == set(stored)
    assert all(torch.equal(consts[name].load(), tensor) for name, tensor in stored.items())


def test_parameters_are_on_the_meta_device_and_what_no_file_has_is_real(shards: Path) -> None:
    module = opened(shards).module
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    frequencies = transformers.LlamaForCausalLM.from_pretrained(shards).model.rotary_emb.inv_freq
    assert torch.equal(module.model.rotary_emb.inv_freq, frequencies)


def test_a_tied_weight_is_one_with_two_names(shards: Path, graph: Graph) -> None:
    module = opened(shards).module
    assert module.lm_head.weight is module.model.embed_tokens.weight
    (const,) = [const for const in graph.state if "lm_head.weight" in const.names]
    assert set(const.names) == {"lm_head.weight", "model.embed_tokens.weight"}


def test_each_load_is_a_mapping_of_its_own(shards: Path, graph: Graph) -> None:
    const = next(const for const in graph.state if const.path == "model.layers.0.mlp.up_proj.weight")
    first = const.load()
    kept = first.clone()
    first.zero_()  # stays in memory
    assert torch.equal(const.load(), kept)
    assert torch.equal(all_of(shards)[const.path], kept)


def test_half_precision_stays_as_it_is_stored(tmp_path: Path) -> None:
    llama().to(torch.bfloat16).save_pretrained(tmp_path)
    model, stored = opened(tmp_path), load_file(tmp_path / SINGLE)
    assert model.weights is not None
    assert set(stored) <= set(model.weights.places)
    assert all(torch.equal(model.weights.places[name].load().view(torch.int16), stored[name].view(torch.int16)) for name in stored)


def test_what_is_converted_is_held_and_told(tmp_path: Path) -> None:
    llama().to(torch.bfloat16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    model = opened(tmp_path)
    assert model.weights is not None
    assert not model.weights.places
    assert model.weights.held == 4 * sum(tensor.numel() for tensor in load_file(tmp_path / SINGLE).values())
    noted = model.weights.referred(mm.trace(nn.Linear(2, 2).eval(), (torch.ones(1, 2),))).notes
    assert noted == ("0.1 MiB of the model's weights are held in memory: its files have them in another form",)
    assert torch.equal(model.module.lm_head.weight, load_file(tmp_path / SINGLE)["model.embed_tokens.weight"].float())


def test_other_files_are_loaded_whole(tmp_path: Path) -> None:
    module = llama()
    module.save_pretrained(tmp_path)
    (tmp_path / SINGLE).unlink()
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    found = mm.open_folder(tmp_path, cache=False)
    assert found.weights is None
    assert torch.equal(found.module.lm_head.weight, module.lm_head.weight)


@pytest.mark.full
def test_the_written_folder_is_the_same_to_the_byte(shards: Path, tmp_path: Path) -> None:
    """With the cache, whose past the model itself makes; errors in the report and outputs in the check vectors included."""
    written = {}
    for by_reference in (False, True):
        model = resolve(str(shards), by_reference=by_reference)
        folder = tmp_path / str(by_reference)
        more = {"cache": model.cache, "hf_folder": model.hf_folder, "weights": model.weights}
        mm.compile(model.module, SPEC, model.example_inputs, model.dynamic_shapes, **more).save(folder)
        written[by_reference] = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}
    assert written[True] == written[False]


def test_pages_are_let_go_while_the_model_runs(tmp_path: Path) -> None:
    if not Path("/proc/self/smaps").is_file():
        pytest.skip("asks Linux how much of a file is resident")
    size = 1024
    save_file({"0.weight": torch.randn(size, size), "1.weight": torch.randn(size, size)}, tmp_path / SINGLE)
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False))
    _, weights = with_weights(module, tmp_path)
    x = torch.ones(1, size)
    with weights.filled(module) as filled, torch.no_grad():
        with filled.frugal():
            first = module(x)
        assert resident(tmp_path / SINGLE) < 16 << 10  # KiB; an edge page or a neighbour's, of 8 MiB
        assert torch.equal(module(x), first)
        assert resident(tmp_path / SINGLE) >= 2 * 4 * size * size >> 10  # so the figure tells the two apart
    assert module[0].weight.is_meta


def resident(path: Path) -> int:
    """KiB of a file's mappings that are in memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


def test_a_place_beyond_four_gib(tmp_path: Path) -> None:
    path, offset = tmp_path / "large", (1 << 32) + 4100
    with path.open("wb") as file:  # sparse: nothing but its end takes room
        file.seek(offset)
        file.write(struct.pack("<4f", 1.0, 2.0, 3.0, 4.0))
    place = Place(path, offset, torch.float32, (2, 2), identity_of(path))
    assert place.load().tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_numbers_at_an_odd_place(tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.write_bytes(b"abc" + struct.pack("<3f", 1.0, -2.0, 3.5))
    assert Place(path, 3, torch.float32, (3,), identity_of(path)).load().tolist() == [1.0, -2.0, 3.5]


# ---- folders that are not whole


def shard_of(folder: Path, name: str) -> Path:
    found: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return folder / found[name]


NORM = "model.norm.weight"


def edited(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    path = shard_of(folder, NORM)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    return path


def cut(folder: Path) -> None:
    path = shard_of(folder, NORM)
    path.write_bytes(path.read_bytes()[:-8])


def of_unknown_type(folder: Path) -> None:
    path = shard_of(folder, NORM)
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F33"', 1))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: shard_of(f, NORM).unlink(), "missing, and model.safetensors.index.json says that"),
    "cut off": (cut, "is cut off: "),
    "empty": (lambda f: shard_of(f, NORM).write_bytes(b""), "is no whole safetensors file: a header of 0 bytes in a file of 0"),
    "rubbish": (lambda f: shard_of(f, NORM).write_bytes(struct.pack("<Q", 4) + b"nope"), "is no safetensors file: its header is no JSON"),
    "a tensor lacks": (lambda f: edited(f, lambda t: t.pop(NORM)), "lacks 1 tensor that model.safetensors.index.json says are in it"),
    "a type that is none": (of_unknown_type, " is F33, a type that torch has not"),
    "integers": (lambda f: edited(f, lambda t: t.update({NORM: t[NORM].int()})), f"{NORM} is int32, and LlamaForCausalLM computes with it"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_shard_that_is_not_whole_is_named(own: Path, fault: str) -> None:
    damage, expected = FAULTS[fault]
    path = shard_of(own, NORM)
    damage(own)
    with pytest.raises(InputError) as caught:
        mm.open_folder(own)
    assert caught.value.message.startswith(f"{path}: ")
    assert expected in caught.value.message


def test_another_shape_is_told_with_both(own: Path) -> None:
    edited(own, lambda tensors: tensors.update({NORM: torch.ones(31)}))
    with pytest.raises(InputError, match="1 weight of LlamaForCausalLM have another shape") as caught:
        mm.open_folder(own)
    assert caught.value.details == (f"{NORM}: [31] in the files, [32] in the model",)


def test_a_weight_that_no_file_has(own: Path) -> None:
    path = edited(own, lambda tensors: tensors.pop(NORM))
    index = json.loads((own / INDEX).read_text())
    del index["weight_map"][NORM]
    (own / INDEX).write_text(json.dumps(index))
    assert path.is_file()
    with pytest.raises(InputError, match="the files lack 1 weight of LlamaForCausalLM") as caught:
        mm.open_folder(own)
    assert caught.value.details == (NORM,)


def test_an_index_that_leads_out_of_the_folder(own: Path) -> None:
    index = json.loads((own / INDEX).read_text())
    index["weight_map"][NORM] = "../x.safetensors"
    (own / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match="a file must lie inside the folder"):
        stored_tensors(own)


@pytest.mark.parametrize("damage", [Path.unlink, cut])
def test_a_file_that_changes_behind_the_back(own: Path, damage: Callable[[Path], object]) -> None:
    """A mapping of a file that became shorter ends the process when it is read."""
    model = opened(own)
    path = shard_of(own, NORM)
    damage(path if damage is Path.unlink else own)
    assert model.weights is not None
    with pytest.raises(InputError) as caught:
        model.weights.places[NORM].load()
    assert caught.value.message.startswith(f"{path}: ")
    with pytest.raises(InputError) as caught, model.weights.filled(model.module):
        pass
    assert caught.value.message.startswith(f"{path}: ")
    assert model.module.model.norm.weight.is_meta


def test_no_folder() -> None:
    with pytest.raises(InputError, match="nowhere: no such folder"):
        mm.open_folder("nowhere")


# ---- a model of one's own on the meta device


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


X = torch.linspace(-1, 1, 16).reshape(2, 8)
KEEP: dict[str, Any] = {"version": 1, "name": "keep", "rules": [{"match": {"op": "matmul"}, "rewrite": "keep"}]}


def own_files(folder: Path, change: Callable[[dict[str, torch.Tensor]], object] = lambda state: None) -> Own:
    torch.manual_seed(0)
    model = Own()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(state)
    save_file(state, folder / SINGLE)
    return model


def on_meta() -> Own:
    with torch.device("meta"):
        return Own()


def test_a_meta_model_with_a_folder_answers_like_the_model(tmp_path: Path) -> None:
    model = own_files(tmp_path)
    compiled = mm.compile(on_meta(), KEEP, (X,), weights=tmp_path)
    assert torch.equal(compiled(X), model(X))


def test_a_meta_model_of_transformers_with_a_folder(shards: Path) -> None:
    """The frequencies of its rotation lie in no file."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    ids = torch.arange(16).reshape(2, 8)
    compiled = mm.compile(model, KEEP, {"input_ids": ids}, weights=shards)
    with torch.no_grad():
        expected = llama().eval()(input_ids=ids, use_cache=False).logits
    assert torch.equal(compiled(input_ids=ids)["logits"], expected)


OWN_FAULTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str, str]] = {
    "lacks": (
        lambda state: state.update({"first.weights": state.pop("first.weight")}),
        "lacks 1 weight of Own",
        "first.weight; did you mean first.weights?",
    ),
    "shape": (
        lambda state: state.update({"second.weight": torch.ones(8, 15)}),
        "has in another shape or type 1 weight of Own",
        "second.weight: float32 [8, 15] in model.safetensors, float32 [8, 16] in the model",
    ),
    "type": (
        lambda state: state.update({"first.bias": state["first.bias"].half()}),
        "has in another shape or type 1 weight of Own",
        "first.bias: float16 [16] in model.safetensors, float32 [16] in the model",
    ),
}


@pytest.mark.parametrize("fault", OWN_FAULTS)
def test_a_folder_that_does_not_fit(tmp_path: Path, fault: str) -> None:
    change, message, detail = OWN_FAULTS[fault]
    own_files(tmp_path, change)
    with pytest.raises(InputError) as caught:
        mm.compile(on_meta(), KEEP, (X,), weights=tmp_path)
    assert caught.value.message == f"{tmp_path}: {message}"
    assert caught.value.details == (detail,)


def test_a_model_with_weights_of_its_own_is_refused(tmp_path: Path) -> None:
    own_files(tmp_path)
    with pytest.raises(InputError, match="weights= is for a model on the meta device, and Own has weights of its own"):
        mm.compile(Own(), KEEP, (X,), weights=tmp_path)


def test_a_folder_without_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no safetensors files"):
        mm.compile(on_meta(), KEEP, (X,), weights=tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        mm.compile(on_meta(), KEEP, (X,), weights=tmp_path / "no")


def test_an_opened_module_without_its_weights_says_what_it_wants(shards: Path) -> None:
    model = opened(shards)
    with pytest.raises(InputError, match="parameters are on 2 devices") as caught:
        mm.compile(model.module, KEEP, model.example_inputs, model.dynamic_shapes)
    assert "weights=FOLDER says which files have them" in "".join(caught.value.details)
