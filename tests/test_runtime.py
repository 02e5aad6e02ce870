"""The runtime on tiny artefacts that the tests build themselves, and on a machine (a subprocess) that has no torch."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from tiny_artifact import OUT, VOCABULARY, expected_outputs, feeds, hash_files, write_artifact

from matmorph.runtime import ArtifactError, ExecutionError, InputMismatch, ProviderError, Session, SessionError, TensorInfo
from matmorph.runtime.check import check, main, read_cases
from matmorph.runtime.difference import difference
from matmorph.runtime.feeds import size_of
from matmorph.runtime.manifest import read_manifest
from matmorph.runtime.targets import TARGETS, cuda

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write_artifact(tmp_path / "out")


@pytest.fixture
def session(artifact: Path) -> Session:
    return Session(artifact, "cpu", threads=1)


class TestSession:
    def test_outputs_by_name_in_order(self, session: Session) -> None:
        inputs = feeds(2, 5)
        outputs = session.run(inputs)
        expected = expected_outputs(**inputs)
        assert list(outputs) == ["hidden", "top"]
        # float32 dot products of four standard normal terms: a few ulp of 1e-7 each
        np.testing.assert_allclose(outputs["hidden"], expected["hidden"], rtol=0, atol=2e-6)
        np.testing.assert_array_equal(outputs["top"], expected["top"])

    def test_describes_itself(self, session: Session) -> None:
        assert session.inputs == (TensorInfo("ids", "int64", ("batch", "seq")), TensorInfo("mask", "float32", ("batch", "seq")))
        assert str(session.outputs[0]) == f"hidden: float32[batch, seq, {OUT}]"
        assert session.provider == "CPUExecutionProvider"
        assert session.manifest.notes == ("a note",)

    @pytest.mark.parametrize("optimize", [False, True])
    def test_optimisation_does_not_change_the_answer(self, artifact: Path, optimize: bool) -> None:
        inputs = feeds(1, 3)
        outputs = Session(artifact, "cpu", optimize=optimize).run(inputs)
        np.testing.assert_allclose(outputs["hidden"], expected_outputs(**inputs)["hidden"], rtol=0, atol=2e-6)  # as above

    def test_lossless_casts_are_made(self, session: Session) -> None:
        inputs = feeds(2, 5)
        narrow = {"ids": inputs["ids"].astype(np.int32), "mask": inputs["mask"].astype(np.float16)}
        np.testing.assert_array_equal(session.run(narrow)["hidden"], session.run(inputs)["hidden"])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"idz": np.ones((2, 5), np.int64)}, r"unknown input 'idz'; the model takes ids, mask; did you mean ids\?"),
            ({"mask": None}, r"missing input mask: float32\[batch, seq\]"),
            ({"ids": [[1, 2], [3, 4]]}, "input ids: expected a numpy array, got builtins.list"),
            ({"mask": np.ones((2, 5))}, r"input mask: expected float32, got float64; convert it with .astype\('float32'\)"),
            ({"mask": np.ones((2, 5), np.int8)}, "input mask: expected float32, got int8"),
            ({"ids": np.ones((2, 5), np.uint64)}, "input ids: expected int64, got uint64"),
            ({"ids": np.ones((2, 5), np.float32)}, "input ids: expected int64, got float32"),
            ({"ids": np.ones(5, np.int64)}, r"input ids: expected 2 axes \(batch, seq\), got shape \(5,\)"),
            ({"mask": np.ones((2, 6), np.float32)}, "input mask, axis 1: seq is 6 here and 5 at input ids, axis 1; both must agree"),
            ({"ids": np.ones((2, 9), np.int64)}, "input ids, axis 1: seq is 9, the model takes 2 to 8"),
            ({"ids": np.ones((2, 1), np.int64)}, "input ids, axis 1: seq is 1, the model takes 2 to 8"),
            ({"ids": np.ones((0, 5), np.int64)}, "input ids, axis 0: batch is 0, the model takes 1 or more"),
        ],
    )
    def test_input_that_does_not_fit(self, session: Session, change: dict, message: str) -> None:
        given = {name: value for name, value in {**feeds(2, 5), **change}.items() if value is not None}
        with pytest.raises(InputMismatch, match=message):
            session.run(given)

    def test_mismatch_is_a_value_error(self, session: Session) -> None:
        with pytest.raises(ValueError, match="missing input ids"):
            session.run({})

    def test_fixed_sizes_and_derived_axes(self, artifact: Path) -> None:
        inputs = [{"name": "ids", "dtype": "int64", "shape": [2, "seq"]}, {"name": "mask", "dtype": "float32", "shape": [2, "2*seq - 5"]}]
        hash_files(artifact, inputs=inputs)
        session = Session(artifact, "cpu")
        assert session.run(feeds(2, 5))["top"].shape == (2, 5)  # 2*5 - 5 = 5
        with pytest.raises(InputMismatch, match=r"input mask, axis 1: expected 2\*seq - 5 = 3 \(seq=4\), got 4"):
            session.run(feeds(2, 4))
        with pytest.raises(InputMismatch, match=r"input ids, axis 0: expected size 2, got 3 \(shape \(3, 5\)\)"):
            session.run(feeds(3, 5))

    def test_error_while_running_is_one_line(self, session: Session) -> None:
        wrong = {**feeds(1, 2), "ids": np.array([[0, VOCABULARY]])}
        with pytest.raises(ExecutionError, match=r"^CPUExecutionProvider: .*indices element out of data bounds") as caught:
            session.run(wrong)
        assert "\n" not in str(caught.value)

    def test_options(self, artifact: Path) -> None:
        with pytest.raises(ValueError, match="threads must be 1 or more, got 0"):
            Session(artifact, "cpu", threads=0)
        with pytest.raises(ValueError, match="session_options replaces threads"):
            Session(artifact, "cpu", threads=1, session_options=onnxruntime.SessionOptions())
        assert Session(artifact, "cpu", session_options=onnxruntime.SessionOptions()).run(feeds(1, 2))["top"].shape == (1, 2)


def test_size_of_is_arithmetic_and_nothing_else() -> None:
    assert size_of("(seq + 3)//4*2", {"seq": 6}) == 4
    assert size_of("seq % 4 - batch", {"seq": 6, "batch": 1}) == 1
    assert size_of("other", {"seq": 6}) is None
    assert size_of("__import__('os')", {}) is None
    assert size_of("seq // 0", {"seq": 6}) is None


def rehashed(folder: Path, model: bytes) -> None:
    (folder / "model.onnx").write_bytes(model)
    hash_files(folder)


def moved_out(path: Path) -> None:
    path.rename(path.parent.parent / "outside")
    path.symlink_to("../outside")


class TestArtifactErrors:
    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda f: (f / "manifest.json").unlink(), r"manifest\.json: missing"),
            (lambda f: (f / "model.onnx").unlink(), r"model\.onnx: missing"),
            (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json: cannot be read"),
            (lambda f: (f / "manifest.json").write_text("[]"), r"manifest\.json: manifest: unexpected value \[\]"),
            (lambda f: hash_files(f, format=2), r"format: this matmorph reads format 1, the file has 2"),
            (lambda f: hash_files(f, inputs=[{"name": "ids", "dtype": "int64"}]), r"inputs\[0\]\.shape: missing"),
            (lambda f: hash_files(f, ranges={"seq": [2]}), r"ranges\.seq: expected \[low, high\], found \[2\]"),
            (lambda f: hash_files(f, tolerance="small"), r"tolerance: unexpected value 'small'"),
            (lambda f: hash_files(f, files={"../x": {}}), r"files\['\.\./x'\]: a file must lie inside the folder"),
            (lambda f: hash_files(f, outputs=[]), r"model\.onnx: its outputs are hidden, top, the manifest says"),
            (lambda f: hash_files(f, inputs=[{"name": "ids", "dtype": "bfloat16", "shape": []}]), "bfloat16, which numpy cannot hold"),
            (lambda f: (f / "model.onnx").write_bytes(b"no model"), r"model\.onnx: was changed: it has 8 bytes, manifest\.json says"),
            (lambda f: flip_last_byte(f / "model.onnx.data"), r"model\.onnx\.data: was changed: it has another sha256"),
            (lambda f: rehashed(f, b"no model"), r"model\.onnx: ONNX Runtime cannot load it on CPUExecutionProvider"),
            (lambda f: hash_files(f, notes=5), r"manifest\.json: notes: unexpected value 5"),
            (lambda f: hash_files(f, tolerance=10**400), r"manifest\.json: tolerance: unexpected value 1000"),
            (lambda f: hash_files(f, tolerance=float("nan")), r"manifest\.json: cannot be read: NaN is no JSON"),
            (lambda f: hash_files(f, ranges={"seq": [True, None]}), r"ranges\.seq: unexpected value True"),
            (lambda f: hash_files(f, files={"C:/x": {}}), r"files\['C:/x'\]: a file must lie inside the folder"),
            (lambda f: hash_files(f, files={"a\\b": {}}), r"files\['a\\\\b'\]: a file must lie inside the folder"),
            (lambda f: (f / "manifest.json").write_text("[" * 200_000), r"manifest\.json: cannot be read: nested too deep"),
            (lambda f: (f / "manifest.json").write_text('{"a":' * 70 + "1" + "}" * 70), "nested more than 64 deep"),
            (lambda f: hash_files(f, files={}), r"model\.onnx: is not listed in manifest\.json"),
            (lambda f: moved_out(f / "model.onnx"), r"model\.onnx: is a link that leads out of the folder"),
        ],
    )
    def test_damaged_artifact(self, artifact: Path, damage, message: str) -> None:
        damage(artifact)
        with pytest.raises(ArtifactError, match=message) as caught:
            Session(artifact, "cpu")
        assert "\n" not in str(caught.value)

    def test_no_artifact(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match=r"nowhere: no such folder"):
            Session(tmp_path / "nowhere")
        with pytest.raises(ArtifactError, match=r"not an artefact folder \(neither manifest\.json nor model\.onnx is in it\)"):
            Session(tmp_path)
        (tmp_path / "file").write_text("")
        with pytest.raises(ArtifactError, match=r"file: not a folder"):
            Session(tmp_path / "file")

    def test_manifest_is_typed(self, artifact: Path) -> None:
        manifest = read_manifest(artifact)
        assert str(manifest.ranges["seq"]) == "2 to 8"
        assert sorted(manifest.files) == ["check.npz", "model.onnx", "model.onnx.data"]


class TestProviders:
    def test_choice_falls_to_cpu_with_one_line(self, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(TARGETS, "cuda", replace(TARGETS["cuda"], obstacle=lambda: "no NVIDIA driver on this machine"))
        said: list[str] = []
        session = Session(artifact, log=said.append)
        assert session.provider == "CPUExecutionProvider"
        assert said == ["running on CPU: no CUDA (no NVIDIA driver on this machine)"]

    def test_no_line_when_cpu_was_asked_for(self, artifact: Path) -> None:
        said: list[str] = []
        Session(artifact, ["CPUExecutionProvider"], log=said.append)
        assert said == []

    def test_cuda_that_does_not_load_after_all(self, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The checks from outside pass, and the session still comes up without CUDA."""
        create = onnxruntime.InferenceSession
        monkeypatch.setitem(TARGETS, "cuda", replace(TARGETS["cuda"], obstacle=lambda: None))
        monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: create(*a, **{**k, "providers": ["CPUExecutionProvider"]}))
        said: list[str] = []
        assert Session(artifact, log=said.append).provider == "CPUExecutionProvider"
        assert said == ["running on CPU: no CUDA (ONNX Runtime did not load it)"]
        monkeypatch.setattr("matmorph.runtime.session.requested", lambda _: ["CUDAExecutionProvider"])
        with pytest.raises(ProviderError, match="CUDAExecutionProvider was asked for and did not load; loaded: CPUExecutionProvider"):
            Session(artifact, "cuda")

    def test_cuda_that_fails_at_creation(self, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        create = onnxruntime.InferenceSession

        def refuse_cuda(*args: object, **options: object) -> object:
            if "CUDAExecutionProvider" in options["providers"]:
                raise RuntimeError("CUDA failure 2: out of memory\nmore")
            return create(*args, **options)

        monkeypatch.setitem(TARGETS, "cuda", replace(TARGETS["cuda"], obstacle=lambda: None))
        monkeypatch.setattr(onnxruntime, "InferenceSession", refuse_cuda)
        said: list[str] = []
        assert Session(artifact, log=said.append).provider == "CPUExecutionProvider"
        assert len(said) == 1

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ([], "providers is an empty list"),
            ("cpuu", r"cpuu is not in this onnxruntime; .*did you mean cpu\?"),
            (["CPUExecutionprovider"], r"did you mean CPUExecutionProvider\?"),
        ],
    )
    def test_wrong_request(self, artifact: Path, asked: object, message: str) -> None:
        with pytest.raises(ProviderError, match=message):
            Session(artifact, asked)

    def test_cuda_asked_for_without_driver(self, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
        monkeypatch.setattr(cuda, "_driver_obstacle", lambda: "no NVIDIA driver on this machine")
        with pytest.raises(ProviderError, match="CUDAExecutionProvider was asked for and cannot be used: no NVIDIA driver"):
            Session(artifact, "cuda")

    def test_obstacles_from_outside_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Driver:
            """Stands for libcuda with one device, unless told otherwise."""

            def __init__(self, status: int, devices: int) -> None:
                self.cuInit = lambda flags: status
                self.cuDeviceGetCount = lambda pointer: setattr(pointer._obj, "value", devices) or 0

        def missing(name: str) -> Driver:
            raise OSError(name)

        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
        assert cuda.cuda_obstacle() == "this onnxruntime was built without it"
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
        monkeypatch.setattr(cuda.ctypes, "CDLL", missing)
        assert cuda.cuda_obstacle() == "no NVIDIA driver on this machine"
        monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: Driver(100, 0))
        assert cuda.cuda_obstacle() == "the NVIDIA driver finds no usable device (cuInit error 100)"
        monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: Driver(0, 0))
        assert cuda.cuda_obstacle() == "the NVIDIA driver finds no device"
        monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: Driver(0, 1))
        text = "Failed to load libcudnn.so.9: libcudnn.so.9: not found\nPlease follow https://example.org to install CUDA."
        monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print(text))
        assert cuda.cuda_obstacle() == "libcudnn.so.9: not found"
        monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
        assert cuda.cuda_obstacle() is None


class TestCheck:
    def test_whole_artifact(self, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
        result = check(artifact, "cpu")
        assert result.ok
        assert result.problems == ()
        assert result.max_difference is not None
        assert result.max_difference <= 1e-6  # float32 against float64: a few ulp
        assert result.lines[0] == "files: 3 as listed in manifest.json"
        assert re.fullmatch(r"outputs: 3 cases on CPUExecutionProvider, largest difference \S+, allowed 1e-05", result.lines[1])
        assert main([str(artifact), "--provider", "cpu"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "ok"

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda f: (f / "model.onnx.data").unlink(), r"missing file: .*model\.onnx\.data"),
            (lambda f: flip_last_byte(f / "model.onnx.data"), r"changed file: .*model\.onnx\.data has another sha256"),
            (lambda f: (f / "check.npz").write_bytes(b"short"), r"changed file: .*check\.npz has 5 bytes"),
            (lambda f: (f / "notes.txt").write_text("hello"), r"extra file: .*notes\.txt is not listed"),
            (lambda f: ((f / "sub").mkdir(), (f / "sub" / "x").write_text("")), r"extra file: .*sub/x is not listed"),
            (lambda f: (f / "manifest.json").write_text("{"), r"manifest\.json: cannot be read"),
            (lambda f: (f / "manifest.json").unlink(), r"manifest\.json: missing"),
        ],
    )
    def test_damage_is_named_and_exits_1(self, artifact: Path, damage, message: str, capsys: pytest.CaptureFixture[str]) -> None:
        damage(artifact)
        assert main([str(artifact), "--provider", "cpu"]) == 1
        shown = capsys.readouterr()
        assert len(shown.err.splitlines()) == 1
        assert re.search(message, shown.err)
        assert shown.out.splitlines()[-1] == "failed: 1 problem"

    def test_changed_model_is_not_loaded(self, artifact: Path) -> None:
        flip_last_byte(artifact / "model.onnx.data")
        result = check(artifact, "cpu")
        assert result.max_difference is None
        assert result.lines == ("outputs: not run, because files are not as they were",)

    def test_not_an_artifact_exits_2(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([str(tmp_path)]) == 2
        assert "not an artefact folder" in capsys.readouterr().err
        assert main([str(tmp_path / "none")]) == 2
        with pytest.raises(SystemExit) as caught:
            main([])
        assert caught.value.code == 2

    def test_provider_that_is_not_there_exits_2(self, artifact: Path) -> None:
        assert main([str(artifact), "--provider", "tpu"]) == 2

    def test_outputs_that_differ(self, artifact: Path) -> None:
        with np.load(artifact / "check.npz") as archive:
            arrays = dict(archive)
        arrays["output:hidden:1"] = arrays["output:hidden:1"] + np.float32(0.5)
        scale = max(1.0, float(np.abs(arrays["output:hidden:1"]).max()))
        np.savez(artifact / "check.npz", **arrays)
        hash_files(artifact)
        result = check(artifact, "cpu")
        assert not result.ok
        assert result.max_difference == pytest.approx(0.5 / scale, rel=1e-4)  # the sum in float32 is exact to 1e-7, far below
        assert len(result.problems) == 1
        assert result.problems[0].startswith("case 1: output hidden differs by")

    def test_case_that_does_not_run(self, artifact: Path) -> None:
        with np.load(artifact / "check.npz") as archive:
            arrays = dict(archive)
        arrays["input:ids:0"] = np.full((1, 2), VOCABULARY)
        np.savez(artifact / "check.npz", **arrays)
        hash_files(artifact)
        (problem,) = check(artifact, "cpu").problems
        assert re.match("case 0: CPUExecutionProvider: .*out of data bounds", problem)

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({}, "holds no case"),
            ({"input:ids:0": np.ones(1)}, "case 0 does not hold every input: differs in mask"),
            ({"ids": np.ones(1)}, "unexpected key 'ids'"),
            ({"input:ids:x": np.ones(1)}, "unexpected key 'input:ids:x'"),
            ({"input:ids:0": np.array([{}])}, "cannot be read"),  # needs pickle, which is never loaded
        ],
    )
    def test_check_vectors_that_are_wrong(self, artifact: Path, arrays: dict, message: str) -> None:
        np.savez(artifact / "check.npz", **arrays)
        hash_files(artifact)
        (problem,) = check(artifact, "cpu").problems
        assert message in problem

    def test_check_vectors_that_are_missing(self, artifact: Path) -> None:
        (artifact / "check.npz").unlink()
        hash_files(artifact)
        (problem,) = check(artifact, "cpu").problems
        assert problem.endswith("check.npz: missing, so no output can be checked")

    def test_names_may_hold_colons(self, artifact: Path) -> None:
        inputs = [{"name": "a:b", "dtype": "float32", "shape": []}]
        hash_files(artifact, inputs=inputs, outputs=[{"name": "y", "dtype": "float32", "shape": []}])
        np.savez(artifact / "check.npz", **{"input:a:b:12": np.float32(1), "output:y:12": np.float32(2)})
        (case,) = read_cases(artifact, read_manifest(artifact))
        assert case.inputs == {"a:b": 1.0}
        assert case.outputs == {"y": 2.0}


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_difference() -> None:
    one = np.array([1.0, -4.0], np.float32)
    assert difference(one, one) == 0.0
    assert difference(one + np.float32(0.5), one) == 0.125  # 0.5 / 4, exact in binary
    assert difference(one / 16 + np.float32(0.5), one / 16) == 0.5  # small outputs: absolute
    inf, nan = float("inf"), float("nan")
    assert difference(one[:1], one) == inf
    assert difference(np.array([nan, 1.0]), np.array([1.0, 1.0])) == inf
    assert difference(np.array([-inf, 1.0]), np.array([-inf, 1.0])) == 0.0
    assert difference(np.array([inf, 1.0]), np.array([-inf, 1.0])) == inf
    assert difference(np.array([nan]), np.array([nan])) == 0.0
    assert difference(np.array([1, 2]), np.array([1, 2])) == 0.0
    assert difference(np.array([1, 2]), np.array([1, 3])) == inf
    assert difference(np.zeros((0, 2), np.float32), np.zeros((0, 2), np.float32)) == 0.0


# What the deploying machine has: the package, numpy, onnxruntime, safetensors. Everything else that matmorph depends on is barred.
DEPLOY = """
import sys

class Barred:
    names = {
        "torch", "onnx", "yaml", "sympy", "networkx", "rich", "typer", "scipy",
        "onnxscript", "onnx_ir", "onnx_graphsurgeon", "transformers",
    }
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"barred: {name}", name=name)

sys.meta_path.insert(0, Barred())
import numpy as np
import matmorph
from matmorph.runtime import Session
from matmorph.runtime.check import main

assert matmorph.__version__
outputs = Session(sys.argv[1], "cpu").run({"ids": np.array([[1, 2]]), "mask": np.ones((1, 2), np.float32)})
print(list(outputs), outputs["hidden"].shape)
code = main([sys.argv[1], "--provider", "cpu"])
print(sorted(m for m in sys.modules if m.startswith("matmorph.") and not m.startswith("matmorph.runtime")))
sys.exit(code)
"""


def test_deploying_machine_needs_no_torch(artifact: Path) -> None:
    done = subprocess.run([sys.executable, "-c", DEPLOY, str(artifact)], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "['hidden', 'top'] (1, 2, 3)"
    assert lines[-2] == "ok"
    assert lines[-1] == "[]"  # nothing of matmorph but its runtime was loaded


def test_check_command(artifact: Path) -> None:
    """The command as a user types it, on whatever providers this machine has; nothing but plain lines."""
    command = [sys.executable, "-m", "matmorph.runtime.check", str(artifact)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "ok"


def test_every_error_has_one_base() -> None:
    for error in (ArtifactError, ExecutionError, InputMismatch, ProviderError):
        assert issubclass(error, SessionError)
