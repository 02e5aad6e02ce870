"""`compile --train` and `matmorph train` on real command lines: what they write, print and refuse."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from matmorph.cli.main import main
from matmorph.cli.train import EpochRow, loader_of, schedule_of
from matmorph.errors import InputError
from matmorph.runtime import Session, Trainer, load_batches
from matmorph.runtime.check import check

ROOT = Path(__file__).resolve().parents[1]
FACTORY = """
import numpy as np, torch, matmorph

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = torch.nn.Linear(12, 16), torch.nn.Linear(16, 3)

    def forward(self, x):
        return {"logits": self.head(torch.tanh(self.first(x)))}

def net():
    torch.manual_seed(0)
    return matmorph.Model(Net(), {"x": torch.randn(4, 12)}, {"x": {0: "batch"}})

def batches():
    arrays = dict(np.load("train.npz"))
    return [{name: array[k : k + 10] for name, array in arrays.items()} for k in range(0, 60, 10)]

def stream():
    yield from batches()

def number(): return 7
def fails(): raise RuntimeError("no disk")
"""

SPEC = """version: 1
name: toy
rules:
  - {name: adapted, match: {path: first}, rewrite: {lora: {rank: 2}}}
train: {loss: cross_entropy, optimizer: {adamw: {lr: 1e-2}}, trainable: [adapters, "head.**"]}
"""


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A current folder with a factory, a spec, data, and training graphs in out/ written by the command line."""
    place = tmp_path_factory.mktemp("train")
    (place / "train_models.py").write_text(FACTORY)
    (place / "toy.yaml").write_text(SPEC)
    rng = np.random.default_rng(0)
    for name, rows in (("train", 60), ("dev", 21)):
        x = rng.standard_normal((rows, 12), dtype=np.float32)
        arrays = {"x": x, "labels": (x[:, 0] > 0).astype(np.int64) + (x[:, 1] > 0)}
        np.savez(place / f"{name}.npz", **arrays)
        safetensors.numpy.save_file(arrays, place / f"{name}.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        with pytest.raises(SystemExit) as caught, redirect_stdout(StringIO()) as said:
            main(["compile", "train_models:net", "--spec", "toy.yaml", "--out", "out", "--train"])
        assert not caught.value.code
        numbers = 2 * (12 + 16) + 16 * 3 + 3
        assert said.getvalue().splitlines()[-1] == (
            f"{numbers} numbers of 4 parameters train (cross_entropy, adamw): matmorph train out --data FILE --out FILE.safetensors"
        )
        yield place
    sys.modules.pop("train_models", None)


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments: str) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        said = capsys.readouterr()
        return Done(int(caught.value.code or 0), said.out, said.err)

    return call


def losses(out: str) -> list[float]:
    return [float(found) for found in re.findall(r"^ *\d+ +([0-9.]+)", out, flags=re.MULTILINE)]


def test_two_epochs_learn_and_the_parameters_go_into_a_file(run: Run, folder: Path) -> None:
    done = run("train", "out", "--data", "train.npz", "--epochs", "2", "--batch-size", "10", "--out", "t.safetensors", "--provider", "cpu")
    assert (done.code, done.err) == (0, "")
    first, second = losses(done.out)
    assert second < first
    assert re.search(r"12 updates in [0-9.]+ s; wrote t.safetensors \(put it into the model with: matmorph merge out --trained", done.out)
    trainer = Trainer("out", "cpu")
    expected = trainer.fit(load_batches("train.npz", 10), 2)
    assert [round(loss, 4) for loss in expected] == [first, second]  # the table shows four digits
    with safe_open("t.safetensors", framework="np") as file:
        assert all(np.array_equal(file.get_tensor(name), value) for name, value in trainer.parameters().items())
        assert set(file.keys()) == trainer.parameters().keys()
    assert check("out").ok  # the folder itself is as it was


def test_the_trained_model_is_the_merged_one(run: Run, folder: Path) -> None:
    """Trained values in a compiled module, merged and saved, answer as eval.onnx does."""
    import matmorph as mm
    from matmorph.models.resolve import resolve

    assert run("train", "out", "--data", "train.npz", "--out", "m.safetensors", "--provider", "cpu", "--lr", "0.05").code == 0
    model = resolve("train_models:net")
    compiled = mm.compile(model.module, "./toy.yaml", model.example_inputs, model.dynamic_shapes)
    merged = compiled.merge("m.safetensors").save("merged")
    assert not (merged / "train.json").exists()  # there is no adapter any more
    x = np.load("dev.npz")["x"]
    trainer = Trainer("out", "cpu", lr=0.05)
    trainer.fit(load_batches("train.npz", 16))
    seen: list[np.ndarray] = []
    trainer.evaluate([dict(np.load("dev.npz"))], {"logits": lambda outputs, batch: seen.append(outputs["logits"]) or 0.0})
    # one matrix product instead of three: a few roundings of float32 at values of order 1
    np.testing.assert_allclose(Session(merged, "cpu").run({"x": x})["logits"], seen[0], atol=2e-6)


def test_validation_after_each_epoch(run: Run, folder: Path) -> None:
    options = ["--validation", "dev.safetensors", "--epochs", "2", "--batch-size", "7", "--seed", "3", "--json", "--provider", "cpu"]
    done = run("train", "out", "--data", "train.safetensors", "--out", "v.safetensors", *options)
    assert done.err == ""
    result = json.loads(done.out)
    assert (result["updates"], result["parameters"], [row["epoch"] for row in result["epochs"]]) == (18, "v.safetensors", [1, 2])
    trainer = Trainer("out", "cpu")
    for number in range(2):
        (loss,) = trainer.fit(load_batches("train.npz", 7, seed=3))
        figures = trainer.evaluate(load_batches("dev.npz", 7, shuffle=False))
        row = result["epochs"][number]
        assert (row["loss"], row["validation"]["loss"]) == (pytest.approx(loss), pytest.approx(figures["loss"]))
    logits: list[np.ndarray] = []
    data = dict(np.load("dev.npz"))
    trainer.evaluate([data], {"logits": lambda outputs, batch: logits.append(outputs["logits"]) or 0.0})
    right = (logits[0].argmax(-1) == data["labels"]).mean()
    assert result["epochs"][1]["validation"]["accuracy"] == pytest.approx(right)


def test_resume_goes_on_to_the_bit(run: Run, folder: Path) -> None:
    common = ["train", "out", "--data", "train.npz", "--provider", "cpu", "--clip", "0.1", "--accumulate", "2"]
    whole = run(*common, "--epochs", "2", "--out", "whole.safetensors")
    assert run(*common, "--epochs", "1", "--out", "half.safetensors", "--checkpoint", "run.safetensors").code == 0
    rest = run(*common, "--epochs", "2", "--out", "rest.safetensors", "--resume", "run.safetensors")
    assert losses(rest.out) == losses(whole.out)[1:]
    assert rest.out.splitlines()[1].split()[0] == "2"  # the epoch that was left
    whole_values, rest_values = (safetensors.numpy.load_file(name) for name in ("whole.safetensors", "rest.safetensors"))
    assert all(np.array_equal(whole_values[name], rest_values[name]) for name in whole_values)
    done = run(*common, "--epochs", "2", "--out", "more.safetensors", "--resume", "run.safetensors")  # it was written anew
    assert done.err == "nothing left to train: all 2 epochs were done when the checkpoint was written\n"
    assert safetensors.numpy.load_file("more.safetensors").keys() == whole_values.keys()
    kept = Path("run.safetensors").read_bytes()
    anew = run(*common, "--out", "anew.safetensors", "--checkpoint", "run.safetensors")
    assert (anew.code, anew.out) == (2, "")
    assert anew.err.startswith("run.safetensors: the checkpoint exists\n  go on from it with --resume run.safetensors")
    assert Path("run.safetensors").read_bytes() == kept
    assert not Path("anew.safetensors").exists()
    assert run(*common, "--out", "anew.safetensors", "--checkpoint", "run.safetensors", "--force").code == 0


def test_loaders_of_python(run: Run, folder: Path) -> None:
    files = run("train", "out", "--data", "train_models:batches", "--epochs", "2", "--out", "b.safetensors", "--provider", "cpu")
    streamed = run("train", "out", "--data", "train_models:stream", "--epochs", "2", "--out", "s.safetensors", "--provider", "cpu",
                   "--validation", "dev.npz")  # fmt: skip
    assert losses(files.out) == losses(streamed.out)  # a generator is read anew for each epoch
    assert len(losses(files.out)) == 2
    last = streamed.out.splitlines()[2].split()
    assert len(last) == 4  # epoch, loss, and the figures of the validation data, which come with the last epoch alone
    assert len(streamed.out.splitlines()[1].split()) == 2


REFUSED = {
    "no folder": (["nowhere", "--data", "train.npz"], 2, "nowhere: no such folder"),
    "no training graphs": ([".", "--data", "train.npz"], 2, ".: holds no training graphs (train.json is missing)"),
    "no data": (["out", "--data", "tain.npz"], 2, "tain.npz: no such file"),
    "another kind of data": (["out", "--data", "toy.yaml"], 2, "toy.yaml: expected a file that ends in .npz or .safetensors"),
    "no such callable": (
        ["out", "--data", "train_models:batch"], 2, "train_models:batch: train_models has no batch; did you mean batches?"
    ),
    "no batches": (["out", "--data", "train_models:number"], 2, "train_models:number: gives a int, not a series of batches"),
    "a loader that fails": (["out", "--data", "train_models:fails"], 2, "train_models:fails: fails() raised RuntimeError: no disk"),
    "labels that are missing": (
        ["out", "--data", "nolabels.npz"], 2, "the batch has no labels: the loss cross_entropy needs labels: int64[batch]"
    ),
    "an unknown array": (["out", "--data", "more.npz"], 2, "unknown input 'y'; the model takes x, labels"),
    "no schedule": (
        ["out", "--data", "train.npz", "--schedule", "cosin"], 2,
        "--schedule cosin: there are constant, linear, cosine; did you mean cosine?",
    ),
    "half an update": (["out", "--data", "train.npz", "--warmup", "2.5"], 2, "--warmup 2.5: from 1 on it is a number of updates"),
    "no epochs": (["out", "--data", "train.npz", "--epochs", "0"], 2, "epochs must be 1 or more, got 0"),
    "a loss that runs away": (["out", "--data", "nan.npz"], 1, "step 1: the loss is nan; parameters and moments are those after step 0"),
    "no checkpoint": (["out", "--data", "train.npz", "--resume", "no.safetensors"], 2, "no.safetensors: no such file"),
    "a schedule of a stream": (
        ["out", "--data", "train_models:stream", "--schedule", "linear"], 2, "a schedule must know how many updates there will be"
    ),
    "no column to trim by": (["out", "--data", "train.npz", "--trim", "mask"], 2, "trim_padding: the batch has no mask"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(run: Run, folder: Path, name: str) -> None:
    arrays = dict(np.load("train.npz"))
    np.savez("nolabels.npz", x=arrays["x"])
    np.savez("more.npz", **arrays, y=arrays["labels"])
    np.savez("nan.npz", x=np.full_like(arrays["x"], np.nan), labels=arrays["labels"])
    arguments, code, message = REFUSED[name]
    done = run("train", *arguments, "--out", "refused.safetensors", "--provider", "cpu")
    assert (done.code, done.out) == (code, "")
    assert done.err.splitlines()[-1].startswith(message) or done.err.startswith(message)
    assert "Traceback" not in done.err
    assert not (folder / "refused.safetensors").exists()


@pytest.mark.parametrize(("out", "message"), [
    ("train.safetensors", "train.safetensors: the file exists\n  choose another name, or replace it with --force"),
    ("out", "out: trained parameters go into a file that ends in .safetensors"),
    ("trained.npz", "trained.npz: trained parameters go into a file that ends in .safetensors"),
])  # fmt: skip
def test_a_place_for_the_result_is_looked_at_first(run: Run, folder: Path, out: str, message: str) -> None:
    before = (folder / "train.safetensors").read_bytes()
    assert run("train", "out", "--data", "train.npz", "--out", out) == Done(2, "", f"{message}\n")
    assert (folder / "train.safetensors").read_bytes() == before


def test_force_replaces_the_file(run: Run, folder: Path) -> None:
    (folder / "old.safetensors").write_bytes(b"old")
    assert run("train", "out", "--data", "train.npz", "--out", "old.safetensors", "--force", "--provider", "cpu").code == 0
    assert (folder / "old.safetensors").read_bytes() != b"old"


def test_compile_without_training_graphs(run: Run, folder: Path) -> None:
    assert run("compile", "train_models:net", "--spec", "toy.yaml", "--out", "plain", "--no-train").code == 0
    assert not (folder / "plain" / "train.json").exists()
    spec = SPEC.partition("train:")[0]
    (folder / "untrained.yaml").write_text(spec)
    done = run("compile", "train_models:net", "--spec", "untrained.yaml", "--out", "none", "--train")
    assert done.err.startswith("--train: untrained.yaml says nothing of training\n")
    assert (done.code, (folder / "none").exists()) == (2, False)


def test_what_trains_is_refused_with_its_place(run: Run, folder: Path) -> None:
    (folder / "wrong.yaml").write_text(SPEC.replace('"head.**"', '"haed.**"'))
    done = run("compile", "train_models:net", "--spec", "wrong.yaml", "--out", "none")
    assert done.code == 2
    assert done.err.startswith("wrong.yaml:5:84: train.trainable[1]: no parameter is called haed.**\n  nearest: head.")
    assert not (folder / "none").exists()


def test_training_needs_no_torch(folder: Path) -> None:
    arguments = ["train", str(folder / "out"), "--data", str(folder / "train.npz"), "--out", str(folder / "light.safetensors")]
    code = (
        "import sys; from matmorph.cli.main import main\n"
        f"try: main({arguments} + ['--provider', 'cpu'])\n"
        "except SystemExit as end: print(end.code)\n"
        "print([name for name in ('torch', 'onnx', 'yaml', 'sympy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-2:] == ["0", "[]"]


def test_a_warm_up_is_updates_or_a_share() -> None:
    by_number, by_share = schedule_of("constant", 4), schedule_of("constant", 0.2)
    assert by_number is not None
    assert by_share is not None
    assert [by_number(update, 10) for update in (0, 2, 4)] == [0, 0.5, 1]
    assert [by_share(update, 10) for update in (0, 1, 2)] == [0, 0.5, 1]
    assert schedule_of("constant", 0) is None
    with pytest.raises(InputError, match="must be whole"):
        schedule_of("constant", 1.5)


def test_a_name_with_a_colon_that_is_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "a:b.npz").write_bytes((folder / "train.npz").read_bytes())
    assert len(loader_of("a:b.npz", 10, 0, None)) == 6  # type: ignore[arg-type]
    assert EpochRow(1, 0.5).validation == {}
