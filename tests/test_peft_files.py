"""LoRA adapters to PEFT and back: PEFT loads ours and we load PEFT's, with equal outputs; refusals by name."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import compiled, network, trained
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import ZOO

import matmorph as mm
from matmorph.errors import InputError
from matmorph.exporters.peft import read_peft, write_peft
from matmorph.passes.methods import all_methods

peft = pytest.importorskip("peft")

ROUNDING = 2e-5
"""Of tiny float32 transformers whose LoRA is as large as their weights: two orders of the same sums."""
BIG = [pytest.param(name, marks=pytest.mark.full) for name in ("llama", "t5", "roberta")]


def adapted(name: str, lora: Mapping[str, Any], match: Mapping[str, Any] | None = None) -> tuple[mm.Compiled, nn.Module, Any]:
    model, inputs, shapes = ZOO[name].build()
    rules = [{"match": match or {"role": ["attention.*", "mlp.*"]}, "rewrite": {"lora": lora}}]
    return mm.compile(model, {"version": 1, "rules": rules}, inputs, shapes), model, inputs


def first(answer: Any) -> torch.Tensor:
    """The first tensor of a model's answer."""
    return answer if isinstance(answer, torch.Tensor) else answer[0] if isinstance(answer, tuple) else next(iter(answer.values()))


def same(ours: nn.Module, theirs: nn.Module, inputs: Any) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a, b = (first(module(**inputs) if isinstance(inputs, dict) else module(*inputs)) for module in (ours, theirs))
    assert float((a - b).abs().max()) <= ROUNDING * max(1.0, float(b.abs().max()))


def loaded_by_peft(model: nn.Module, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize("name", ["bert", "gpt2", *BIG])
def test_peft_loads_ours_and_answers_the_same(name: str, tmp_path: Path) -> None:
    found, model, inputs = adapted(name, {"rank": 3, "alpha": 6})
    values = trained(found)
    base = first(found.module(**inputs)).detach()
    theirs = loaded_by_peft(model, write_peft(tmp_path / "lora", found.adapters, values, all_methods()))
    ours = found.load_trained(values).module
    same(ours, theirs, inputs)
    assert float((first(ours(**inputs)) - base).abs().max().detach()) > 1e-2  # the adapter does something
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 6, False)
    assert config["fan_in_fan_out"] is (name == "gpt2")
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


@pytest.mark.parametrize(
    "settings", [{"rank": 4, "alpha": 6, "rslora": True}, {"rank": 2, "alpha": 3, "init": "pissa"}, {"rank": 2, "init": "olora"}]
)
def test_scales_and_starts(settings: dict[str, Any], tmp_path: Path) -> None:
    found = compiled({"lora": settings})
    start = {c.path: c.load() for c in found.graph.state}
    values = trained(found)
    folder = write_peft(tmp_path / "lora", found.adapters, values, all_methods(), initial=start)
    same(
        found.load_trained(values).module,
        loaded_by_peft(network(), folder),
        (torch.randn(5, 24, generator=torch.Generator().manual_seed(3)),),
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["use_rslora"] is settings.get("rslora", False)
    assert config["r"] == settings["rank"] * (2 if "init" in settings else 1)
    if "rslora" in settings:
        assert config["lora_alpha"] == 6


def test_ranks_and_scales_of_their_own(tmp_path: Path) -> None:
    """Per-rule ranks become patterns, and a path that is the end of another one is matched alone."""
    net = nn.ModuleDict({"0": nn.Linear(6, 6), "a": nn.ModuleDict({"0": nn.Linear(6, 6)})})

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.inner["0"](x)) + self.inner["a"]["0"](x) * 2

    model = Two()
    rules = [
        {"match": {"path": "inner.0"}, "rewrite": {"lora": {"rank": 2, "alpha": 4}}},
        {"match": {"path": "inner.a.0"}, "rewrite": {"lora": {"rank": 3, "alpha": 9}}},
    ]
    x = (torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),)
    found = mm.compile(model, {"version": 1, "rules": rules}, x)
    values = trained(found)
    folder = write_peft(tmp_path / "two", found.adapters, values, all_methods())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (2, {r"^inner\.a\.0": 3}, {r"^inner\.a\.0": 9})
    same(found.load_trained(values).module, loaded_by_peft(model, folder), x)
    again = read_peft(folder, found.adapters, all_methods())
    assert all(torch.equal(again[name], value) for name, value in values.items())


def test_a_prefix_is_taken_off_and_put_on(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.encoder(x)

    x = (torch.randn(4, 24, generator=torch.Generator().manual_seed(0)),)
    wrapper = Wrapper()
    found = mm.compile(wrapper, {"version": 1, "rules": [{"match": {"op": "matmul"}, "rewrite": {"lora": {"rank": 2}}}]}, x)
    values = trained(found)
    folder = write_peft(tmp_path / "inner", found.adapters, values, all_methods(), prefix="encoder.", base_model="some/base")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
    same(found.load_trained(values).module, loaded_by_peft(wrapper.encoder, folder), x)
    assert set(read_peft(folder, found.adapters, all_methods(), prefix="encoder.")) == set(values)
    with pytest.raises(InputError, match=r"encoder\.0: its path does not begin with model\."):
        write_peft(tmp_path / "other", found.adapters, values, all_methods(), prefix="model.")


def test_a_tensor_train_goes_out_as_lora(tmp_path: Path) -> None:
    found = compiled({"tt_lora": {"rank": 2, "alpha": 4, "cores": 4}})
    values = trained(found)
    folder = write_peft(tmp_path / "tt", found.adapters, values, all_methods())
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    x = (torch.randn(5, 24, generator=torch.Generator().manual_seed(3)),)
    same(found.load_trained(values).module, loaded_by_peft(network(), folder), x)


def test_convolutions(tmp_path: Path) -> None:
    model, inputs, shapes = ZOO["cnn"].build()
    rules = [{"match": {"op": "conv1x1"}, "rewrite": {"lora": {"rank": 2, "alpha": 1}}}]
    found = mm.compile(model, {"version": 1, "rules": rules}, inputs, shapes)
    values = trained(found)
    folder = write_peft(tmp_path / "cnn", found.adapters, values, all_methods())
    same(found.load_trained(values).module, loaded_by_peft(model, folder), inputs)
    assert all(torch.equal(read_peft(folder, found.adapters, all_methods())[name], value) for name, value in values.items())


@pytest.mark.parametrize("name", ["bert", "gpt2", *BIG])
@pytest.mark.parametrize("rslora", [False, pytest.param(True, marks=pytest.mark.full)])
def test_we_load_what_peft_saved(name: str, rslora: bool, tmp_path: Path) -> None:
    found, model, inputs = adapted(name, {"rank": 3, "alpha": 6})
    paths = [adapter.site for adapter in found.adapters]
    fan = name == "gpt2"
    settings: dict[str, Any] = {"r": 3, "lora_alpha": 5, "use_rslora": rslora, "fan_in_fan_out": fan, "target_modules": paths}
    config = peft.LoraConfig(**settings, alpha_pattern={paths[1].replace(".", r"\."): 9})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(model, config).eval()
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=g))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "peft")
    values = read_peft(tmp_path / "peft", found.adapters, all_methods())
    assert len(values) == 2 * len(paths)
    same(found.load_trained(values).module, theirs, inputs)


# refusals


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, mm.Compiled]:
    found = compiled({"lora": {"rank": 2}})
    return write_peft(tmp_path / "lora", found.adapters, trained(found), all_methods()), found


@pytest.mark.parametrize(("key", "value", "message"), [
    ("peft_type", "LOHA", "peft_type is LOHA, only LORA can be taken in"),
    ("use_dora", True, "use_dora: true is more than LoRA factors beside a weight"),
    ("modules_to_save", ["classifier"], r'modules_to_save: \["classifier"\] is more than LoRA factors'),
    ("bias", "all", 'bias: "all" is more than'),
    ("init_lora_weights", "pissa", 'init_lora_weights: "pissa" is more than'),
    ("target_parameters", ["experts.w1"], "target_parameters"),
])  # fmt: skip
def test_settings_that_mean_more(key: str, value: Any, message: str, folder: tuple[Path, mm.Compiled]) -> None:
    path, found = folder
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(InputError, match=message):
        read_peft(path, found.adapters, all_methods())


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: {}, "holds no factors"),
    (lambda t: {k: v for k, v in t.items() if "0.lora_B" not in k}, "0 has one factor of two"),
    (lambda t: {**t, "base_model.model.0.weight": torch.ones(2)}, r"base_model\.model\.0\.weight is no factor of a LoRA"),
    (lambda t: {k.replace("model.2.", "model.7."): v for k, v in t.items()}, "adapts 7, and this model has no LoRA there"),
    (lambda t: {**t, "base_model.model.0.lora_A.weight": torch.ones(2, 24, 3, 3)}, "convolutions with larger kernels"),
])  # fmt: skip
def test_weights_that_are_none(change: Any, message: str, folder: tuple[Path, mm.Compiled]) -> None:
    path, found = folder
    save_file(change(load_file(path / "adapter_model.safetensors")), path / "adapter_model.safetensors")
    with pytest.raises(InputError, match=message):
        read_peft(path, found.adapters, all_methods())


def test_another_rank_is_refused_by_the_model(folder: tuple[Path, mm.Compiled]) -> None:
    path, _ = folder
    other = compiled({"lora": {"rank": 4}})
    with pytest.raises(InputError, match=r"an adapter of another rank"):
        other.load_trained(read_peft(path, other.adapters, all_methods()))
    pissa = compiled({"lora": {"rank": 2, "init": "pissa"}})
    with pytest.raises(InputError, match="starts from a part of the weight"):
        read_peft(path, pissa.adapters, all_methods())


def test_folders_that_are_none(folder: tuple[Path, mm.Compiled], tmp_path: Path) -> None:
    path, found = folder
    with pytest.raises(InputError, match="no such folder"):
        read_peft(tmp_path / "none", found.adapters, all_methods())
    with pytest.raises(InputError, match=r"no adapter_config\.json in it"):
        read_peft(tmp_path, found.adapters, all_methods())
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        read_peft(path, found.adapters, all_methods())
    weights.rename(path / "adapter_model.bin")
    with pytest.raises(InputError, match="only a pickle, which is not read"):
        read_peft(path, found.adapters, all_methods())
    (path / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        read_peft(path, found.adapters, all_methods())


def test_adapters_that_peft_has_no_place_for(tmp_path: Path) -> None:
    u4 = {"quantizer": "uniform", "bits": 4, "block_size": 16}
    cases = (
        (compiled({"loftq": {**u4, "rank": 2}}), "0: fitted to a quantised base that PEFT's model does not have"),
        (compiled([{"lora": {"rank": 2}}, {"lora": {"rank": 3}}]), "0: has two adapters, PEFT's folder holds one per module"),
        (compiled({"lora": {"rank": 2, "init": "pissa"}}), "0: its base lacks what the factors started with"),
    )
    for found, message in cases:
        with pytest.raises(InputError, match=message):
            write_peft(tmp_path / "out", found.adapters, trained(found), all_methods())
    with pytest.raises(InputError, match="nothing to write: the model has no adapters"):
        write_peft(tmp_path / "out", (), {}, all_methods())
    slices = [entry for entry in adapted("mha-cross", {"rank": 2}, {"op": "matmul"})[0].adapters if "[" in entry.site]
    with pytest.raises(InputError, match="rows of a larger weight, for which PEFT has no module"):
        write_peft(tmp_path / "out", slices, {}, all_methods())
    assert not (tmp_path / "out").exists()
