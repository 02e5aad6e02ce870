"""The life of an adapter from the command line: train, merge, save, load, switch, unmerge, PEFT; messages for what does not fit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import typer
from adapting import U4, X, compiled, far, network, trained
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from zoo import ZOO

import matmorph as mm
from matmorph.cli.adapters import adapter_app, merge_command
from matmorph.errors import InputError
from matmorph.exporters.adapters import adapter_arrays
from matmorph.exporters.peft import write_peft
from matmorph.folders.open import read_trained, reopen
from matmorph.ir.text.printing import print_graph
from matmorph.passes.methods import all_methods
from matmorph.runtime import Session, Trainer
from matmorph.runtime.adapters import read_slots, save_adapter
from matmorph.runtime.check import check
from matmorph.runtime.errors import ArtifactError

TRAIN: dict[str, Any] = {"train": {"loss": "mse", "trainable": ["adapters", "2.bias"]}, "export": {"target": ["cpu"], "adapters": "inputs"}}
ROUNDING = 1e-5
"""Of the artefacts' own check."""

app = typer.Typer()
app.command(name="merge")(merge_command)
app.add_typer(adapter_app, name="adapter")


def run(*words: Any) -> str:
    """What the command prints; its error is raised."""
    result = CliRunner().invoke(app, list(map(str, words)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> tuple[mm.Compiled, Path]:
    """LoRA of rank 2, scale 3, with training graphs and adapters as inputs."""
    found = compiled({"lora": {"rank": 2, "alpha": 6}}, **TRAIN)
    folder = tmp_path_factory.mktemp("home") / "train"
    found.save(folder)
    return found, folder


@pytest.fixture
def values(home: tuple[mm.Compiled, Path], tmp_path: Path) -> tuple[dict[str, torch.Tensor], Path]:
    found = trained(home[0])
    save_file(found, tmp_path / "trained.safetensors")
    return found, tmp_path / "trained.safetensors"


def answer(folder: Path) -> torch.Tensor:
    return torch.tensor(Session(folder, ["cpu"]).run({"input": X.numpy()})["output"])


def test_a_folder_is_opened_again(home: tuple[mm.Compiled, Path]) -> None:
    found, folder = home
    job, adapters = reopen(folder)
    bare = print_graph(job.graph)
    assert [line for line in bare.splitlines() if line.startswith("parameter")] == [
        line for line in print_graph(found.graph).splitlines() if line.startswith("parameter")
    ]
    for const, old in zip(job.graph.state, found.graph.state, strict=True):
        assert torch.equal(const.load(), old.load())
    again = job.adapters
    for one, two, three in zip(adapters, found.adapters, again, strict=True):
        assert (
            (one.site, one.scale, dict(one.consts))
            == (two.site, two.scale, dict(two.consts))
            == (three.site, three.scale, dict(three.consts))
        )
    assert job.report.sites == found.report.sites
    assert job.spec.export == found.spec.export


@dataclass
class Answer:
    """A class of another package."""

    hidden: torch.Tensor


class Named(torch.nn.Module):
    """Answers with it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, x: torch.Tensor) -> Answer:
        return Answer(self.net(x))


def test_named_outputs_are_kept(tmp_path: Path) -> None:
    torch.export.register_dataclass(Answer, serialized_type_name="elsewhere.Answer")
    rule = {"match": {"op": "matmul"}, "rewrite": {"lora": {"rank": 2}}}
    found = mm.compile(Named(), {"version": 1, "rules": [rule], "train": {"loss": "mse"}}, {"x": X}, {"x": {0: "batch"}})
    assert 'result "elsewhere.Answer"' in print_graph(found.graph)
    folder = found.save(tmp_path / "train")
    save_file(trained(found), tmp_path / "t.safetensors")
    run("merge", folder, "--trained", tmp_path / "t.safetensors", "--out", tmp_path / "merged")
    (got,) = Session(tmp_path / "merged", ["cpu"]).run({"x": X.numpy()}).values()
    assert far(torch.tensor(got), found.merge(tmp_path / "t.safetensors").module(x=X).hidden) < ROUNDING


@pytest.mark.full
@pytest.mark.parametrize("name", ["bert", "t5", "gpt2"])
def test_a_transformer_is_merged_from_its_folder(name: str, tmp_path: Path) -> None:
    """Named outputs of another package's class; the source's hash stays."""
    model, inputs, shapes = ZOO[name].build()
    rule = {"match": {"role": ["attention.{q,v}", "attention.qkv"]}, "rewrite": {"lora": {"rank": 2, "alpha": 1}}}
    output = {"bert": "last_hidden_state"}.get(name)
    spec = {"version": 1, "rules": [rule], "train": {"loss": "mse", **({"output": output} if output else {})}}
    found = mm.compile(model, spec, inputs, shapes)
    folder = found.save(tmp_path / "train")
    save_file(trained(found), tmp_path / "t.safetensors")
    run("merge", folder, "--trained", tmp_path / "t.safetensors", "--out", tmp_path / "merged")
    merged = found.merge(tmp_path / "t.safetensors")
    session = Session(tmp_path / "merged", ["cpu"])
    feeds = {info.name: inputs[info.name].numpy() for info in session.inputs}
    for key, got in session.run(feeds).items():
        assert far(torch.tensor(got), merged.module(**inputs)[key].detach()) < 1e-4  # float32 norms
    sources = [json.loads((path / "manifest.json").read_text())["source"] for path in (folder, tmp_path / "merged")]
    assert sources[0] == sources[1]


def test_merge_writes_a_plain_model(home: tuple[mm.Compiled, Path], values: Any, tmp_path: Path) -> None:
    found, folder = home
    told = run("merge", folder, "--trained", values[1], "--out", tmp_path / "merged")
    assert "0: lora merged, dense, error " in told
    assert "2 sites merged; largest error " in told
    assert far(answer(tmp_path / "merged"), found.load_trained(values[0]).module(X)) < ROUNDING
    assert check(tmp_path / "merged", ["cpu"]).ok
    assert not (tmp_path / "merged" / "train.json").exists()
    report = json.loads((tmp_path / "merged" / "report.json").read_text())
    assert report["sites"][0]["method"] == "lora, merged"
    assert "adapters merged at 2 sites" in report["notes"][-1]
    with pytest.raises(InputError, match="the folder exists"):
        run("merge", folder, "--out", tmp_path / "merged")
    told = run("merge", folder, "--out", tmp_path / "merged", "--force", "--json")  # as training started
    assert [line["site"] for line in json.loads(told)["sites"]] == ["0", "2"]
    assert far(answer(tmp_path / "merged"), network()(X)) < ROUNDING


def test_a_quantised_folder_is_merged(tmp_path: Path) -> None:
    found = compiled({"loftq": {**U4, "rank": 2}}, train={"loss": "mse"})
    folder = found.save(tmp_path / "train")
    save_file(trained(found), tmp_path / "t.safetensors")
    told = run("merge", folder, "--trained", tmp_path / "t.safetensors", "--out", tmp_path / "merged")
    assert "0: loftq merged, quantised anew (uniform), error " in told
    assert far(answer(tmp_path / "merged"), found.merge(tmp_path / "t.safetensors").module(X)) < ROUNDING
    with pytest.raises(InputError, match="merging quantised its base anew, which cannot be undone"):
        run("adapter", "unmerge", folder, "--merged", tmp_path / "merged", "--out", tmp_path / "back.safetensors")


@pytest.mark.parametrize("short", ["up", "down"])
def test_a_factor_without_the_other_is_refused(home: tuple[mm.Compiled, Path], values: Any, short: str, tmp_path: Path) -> None:
    """One byte of a name: the pair would be taken for none, and what it learned left out of the merge."""
    _, folder = home
    file = tmp_path / "a.onnx_adapter"
    run("adapter", "save", folder, "--trained", values[1], "--out", file)
    own, other = f"0.lora.{short}".encode(), f"0.lorx.{short}".encode()
    assert own in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(own, other))
    with pytest.raises(InputError, match="holds one factor for 0, and not the other"):
        run("merge", folder, "--trained", file, "--out", tmp_path / "no")
    assert not (tmp_path / "no").exists()
    strange = tmp_path / "b.onnx_adapter"
    strange.write_bytes(file.read_bytes().replace(b"0.lora.", b"0.lorx."))
    with pytest.raises(InputError, match=r"holds '0\.lorx\.(up|down)', which is no factor of the model"):
        run("merge", folder, "--trained", strange, "--out", tmp_path / "no")


def test_adapters_are_saved_loaded_and_switched(home: tuple[mm.Compiled, Path], values: Any, tmp_path: Path) -> None:
    found, folder = home
    told = run("adapter", "save", folder, "--trained", values[1], "--out", tmp_path / "a.onnx_adapter")
    assert "2 pairs of factors" in told
    assert "0 lora: rank 2" in run("adapter", "load", folder, tmp_path / "a.onnx_adapter")
    assert json.loads(run("adapter", "load", folder, tmp_path / "a.onnx_adapter", "--json"))["ranks"] == {"0 lora": 2, "2 lora": 2}
    session = Session(folder, ["cpu"])
    got = session.run({"input": X.numpy()}, adapter=session.load_adapter(tmp_path / "a.onnx_adapter"))["output"]
    assert far(torch.tensor(got), found.load_trained(values[0]).module(X)) < ROUNDING
    run("adapter", "save", folder, "--out", tmp_path / "start.onnx_adapter")
    files = [tmp_path / "a.onnx_adapter", tmp_path / "start.onnx_adapter"]
    told = json.loads(run("adapter", "switch", folder, *files, "--provider", "cpu", "--json"))
    assert told["moved"][str(files[0])] > 0.01
    assert told["moved"][str(files[1])] == told["base_difference"] == 0  # B = 0
    assert "one session, 2 adapters" in run("adapter", "switch", folder, *files, "--provider", "cpu")
    run("adapter", "merge", folder, "--trained", files[0], "--out", tmp_path / "merged")
    assert far(answer(tmp_path / "merged"), found.load_trained(values[0]).module(X)) < ROUNDING
    with pytest.raises(InputError, match="the file exists"):
        run("adapter", "save", folder, "--out", files[0])


def test_unmerging_finds_the_factors(home: tuple[mm.Compiled, Path], values: Any, tmp_path: Path) -> None:
    found, folder = home
    save_file({**values[0], "2.bias": torch.ones(8)}, values[1])
    run("merge", folder, "--trained", values[1], "--out", tmp_path / "merged")
    run("adapter", "unmerge", folder, "--merged", tmp_path / "merged", "--out", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert set(back) == {*values[0], "2.bias"}
    assert far(found.load_trained(back).module(X), found.load_trained(values[1]).module(X)) < ROUNDING
    with pytest.raises(InputError, match=r"missing, so .* is no artefact folder"):
        run("adapter", "unmerge", folder, "--merged", tmp_path, "--out", tmp_path / "x.safetensors")
    other = mm.compile(
        torch.nn.Linear(3, 2),
        {"version": 1, "rules": [{"match": {"op": "matmul"}, "optional": True, "rewrite": "keep"}]},
        (torch.ones(2, 3),),
    )
    with pytest.raises(InputError, match=r"has no weight 0\.weight of \[16, 24\], so it was not merged from this model"):
        run("adapter", "unmerge", folder, "--merged", other.save(tmp_path / "other"), "--out", tmp_path / "x.safetensors")


def test_peft_folders_in_and_out(home: tuple[mm.Compiled, Path], values: Any, tmp_path: Path) -> None:
    found, folder = home
    run("adapter", "to-peft", folder, "--trained", values[1], "--out", tmp_path / "peft", "--base-model", "some/base")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
    with pytest.raises(InputError, match="the folder exists"):
        run("adapter", "to-peft", folder, "--out", tmp_path / "peft")
    (tmp_path / "peft" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="something other than a PEFT adapter"):
        run("adapter", "to-peft", folder, "--out", tmp_path / "peft", "--force")
    (tmp_path / "peft" / "thesis.txt").unlink()
    run("adapter", "to-peft", folder, "--trained", values[1], "--out", tmp_path / "peft", "--force")
    run("adapter", "from-peft", folder, tmp_path / "peft", "--out", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(back[name], value) for name, value in values[0].items())
    run("merge", folder, "--trained", tmp_path / "peft", "--out", tmp_path / "merged")
    assert far(answer(tmp_path / "merged"), found.load_trained(values[0]).module(X)) < ROUNDING
    wide = compiled({"lora": {"rank": 5, "alpha": 2}})
    write_peft(tmp_path / "wide", wide.adapters, trained(wide), all_methods())
    run("adapter", "from-peft", folder, tmp_path / "wide", "--out", tmp_path / "wide.onnx_adapter")
    session = Session(folder, ["cpu"])
    got = session.run({"input": X.numpy()}, adapter=session.load_adapter(tmp_path / "wide.onnx_adapter"))["output"]
    assert far(torch.tensor(got), wide.load_trained(trained(wide)).module(X)) < ROUNDING
    with pytest.raises(InputError, match="an adapter of another rank"):
        run("adapter", "from-peft", folder, tmp_path / "wide", "--out", tmp_path / "wide.safetensors")


def test_a_trainer_s_files_are_read(home: tuple[mm.Compiled, Path], tmp_path: Path) -> None:
    from matmorph.runtime import Trainer

    found, folder = home
    trainer = Trainer(folder, providers=["cpu"], lr=0.01)
    rng = np.random.default_rng(0)
    for _ in range(3):
        trainer.step({"input": rng.standard_normal((4, 24)).astype(np.float32), "labels": rng.standard_normal((4, 8)).astype(np.float32)})
    trainer.save_parameters(tmp_path / "p.safetensors")
    trainer.save(tmp_path / "c.safetensors")
    wanted = found.load_trained(trainer.parameters()).module(X)
    for name in ("p", "c"):
        run("merge", folder, "--trained", tmp_path / f"{name}.safetensors", "--out", tmp_path / name)
        assert far(answer(tmp_path / name), wanted) < ROUNDING
    assert float((wanted - network()(X)).abs().max().detach()) > 1e-3
    with pytest.raises(InputError, match=r"2\.bias was trained too, and an adapter file holds factors only"):
        run("adapter", "save", folder, "--trained", tmp_path / "p.safetensors", "--out", tmp_path / "a.onnx_adapter")
    net = network()
    with torch.no_grad():
        net[0].weight[0] += 1
    other = compiled({"lora": {"rank": 2, "alpha": 6}}, model=net, **TRAIN).save(tmp_path / "other")
    for name in ("p", "c"):
        with pytest.raises(InputError, match="trained on another base"):
            run("merge", other, "--trained", tmp_path / f"{name}.safetensors", "--out", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_adapters_for_another_model(home: tuple[mm.Compiled, Path], values: Any, tmp_path: Path) -> None:
    found, folder = home
    net = network()
    with torch.no_grad():
        net[0].weight[0] += 1
    other = compiled({"lora": {"rank": 2, "alpha": 6}}, model=net, **TRAIN).save(tmp_path / "other")
    slots = read_slots(json.loads((folder / "manifest.json").read_text())["adapters"], "")
    save_adapter(tmp_path / "a.onnx_adapter", adapter_arrays(found.adapters, values[0], all_methods()), slots)
    with pytest.raises(InputError, match="made for another base"):
        run("merge", other, "--trained", tmp_path / "a.onnx_adapter", "--out", tmp_path / "no")
    with pytest.raises(InputError, match="made for another base"):
        run("adapter", "load", other, tmp_path / "a.onnx_adapter")
    save_file({"0.lora.down": torch.zeros(24, 5), "0.lora.up": torch.zeros(5, 16)}, tmp_path / "rank.safetensors")
    with pytest.raises(InputError, match=r"0\.lora\.down is \[24, 5\] there and \[24, 2\] in this model: an adapter of another rank"):
        run("merge", folder, "--trained", tmp_path / "rank.safetensors", "--out", tmp_path / "no")


def test_folders_and_files_that_are_none(home: tuple[mm.Compiled, Path], tmp_path: Path) -> None:
    _, folder = home
    plain = compiled({"lora": {"rank": 2}}).save(tmp_path / "plain")
    with pytest.raises(InputError, match=r"holds no training graphs \(train\.json is missing\)"):
        run("merge", plain, "--out", tmp_path / "no")
    with pytest.raises(InputError, match="no such folder"):
        run("merge", tmp_path / "none", "--out", tmp_path / "no")
    for source, message in ((tmp_path / "none", "no such file"), (tmp_path, r"a folder without adapter_config\.json")):
        with pytest.raises(InputError, match=message):
            run("merge", folder, "--trained", source, "--out", tmp_path / "no")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    (tmp_path / "bad.onnx_adapter").write_bytes(b"nothing")
    for name, message in (("bad.safetensors", "cannot be read as safetensors"), ("bad.onnx_adapter", r"not an \.onnx_adapter file")):
        with pytest.raises(InputError, match=message):
            run("merge", folder, "--trained", tmp_path / name, "--out", tmp_path / "no")
    nothing = compiled({"low_rank": {"rank": 2}}, train={"loss": "mse", "trainable": ["factors"]}).save(tmp_path / "factors")
    with pytest.raises(InputError, match="nothing to merge: the model has no adapters"):
        run("merge", nothing, "--out", tmp_path / "no")
    with pytest.raises(InputError, match="nothing to unmerge: the model has no adapters"):
        run("adapter", "unmerge", nothing, "--merged", nothing, "--out", tmp_path / "x.safetensors")
    assert not (tmp_path / "no").exists()
    job, adapters = reopen(folder)
    assert read_trained(folder, job.graph, adapters, None) == {}


def test_damaged_folders(home: tuple[mm.Compiled, Path], tmp_path: Path) -> None:
    import shutil

    _, folder = home
    for name, content, message in (
        ("graph.ir", "graph", r"graph\.ir: cannot be read"),
        ("graph.ir", None, r"graph\.ir: missing"),
        ("report.json", "{}", r"report\.json: cannot be read"),
        ("trainable.safetensors", "no", "cannot be read as safetensors"),
    ):
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        (copy / name).unlink() if content is None else (copy / name).write_text(content)
        with pytest.raises(InputError, match=message):
            run("merge", copy, "--out", tmp_path / "no", "--no-verify")
        with pytest.raises(
            InputError, match=message if content is None else rf"{name}: was changed: it has \d+ bytes, manifest\.json says"
        ):
            run("merge", copy, "--out", tmp_path / "no")
        shutil.rmtree(copy)
    assert not (tmp_path / "no").exists()


def test_one_flipped_bit_is_noticed_by_whoever_reads(home: tuple[mm.Compiled, Path], tmp_path: Path) -> None:
    """The hash of the data file is all that tells; `verify` was the only one to look at it."""
    import shutil

    _, folder = home
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "model.onnx.data").write_bytes(data)
    changed = r"model\.onnx\.data: was changed: it has another sha256 than (manifest|train)\.json says"
    out = tmp_path / "x.safetensors"
    for words in (
        ("merge", copy, "--out", tmp_path / "merged"),
        ("adapter", "save", copy, "--out", tmp_path / "x.onnx_adapter"),
        ("adapter", "to-peft", copy, "--out", tmp_path / "peft"),
        ("adapter", "unmerge", folder, "--merged", copy, "--out", out),
        ("adapter", "unmerge", copy, "--merged", folder, "--out", out),
        ("adapter", "switch", copy, tmp_path / "x.onnx_adapter"),
    ):
        with pytest.raises(InputError, match=changed):
            run(*words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]
    with pytest.raises(ArtifactError, match=changed):
        Session(copy, "cpu")
    with pytest.raises(ArtifactError, match=changed):
        Trainer(copy, "cpu")
    assert Session(copy, "cpu", verify=False).provider == Trainer(copy, "cpu", verify=False).provider
    said = run("merge", copy, "--out", tmp_path / "merged", "--no-verify")
    assert f"not checked (--no-verify): sizes and hashes in {copy}\n" in said


@pytest.mark.parametrize(("key", "value", "message"), [
    ("offset", "-8", r"bytes at -8 are not in the file"),
    ("offset", "x", r"bytes at x are not in the file"),
    ("offset", "9" * 30, r"bytes at 9+ are not in the file"),
    ("location", "../../etc/passwd", r"lies in '\.\./\.\./etc/passwd', which is not read"),
    ("location", "C:/x", r"lies in 'C:/x', which is not read"),
])  # fmt: skip
def test_places_of_weights_that_are_none(home: tuple[mm.Compiled, Path], tmp_path: Path, key: str, value: str, message: str) -> None:
    import shutil

    _, folder = home
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for path in copy.glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        for entry in (entry for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == key):
            entry.value = value
        path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=message):
        run("merge", copy, "--out", tmp_path / "no", "--no-verify")
    with pytest.raises(ArtifactError, match=r"model\.onnx: ONNX Runtime cannot load it"):
        Session(copy, "cpu", verify=False)


def test_the_spec_of_a_folder_extends_no_other(home: tuple[mm.Compiled, Path], tmp_path: Path) -> None:
    import shutil

    _, folder = home
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    outside = tmp_path / "outside.yaml"
    outside.write_text((copy / "spec.yaml").read_text())
    (copy / "spec.yaml").write_text(f"extends: {outside}\n" + outside.read_text())
    with pytest.raises(InputError, match=r"spec\.yaml: extends: the spec of a folder stands alone"):
        run("merge", copy, "--out", tmp_path / "no", "--no-verify")
