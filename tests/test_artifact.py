"""The artefact folder: complete, the same every time, and never half there."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exporting import Mlp, mlp_graph, randn, seeded

from matmorph.errors import CheckError, ExportError, InputError, VerifyError
from matmorph.exporters.artifact import (
    Artifact,
    WrittenReport,
    json_bytes,
    npz_bytes,
    write_artifact,
)
from matmorph.exporters.onnx.onnx_model import OnnxInfo
from matmorph.exporters.staging import is_artifact, refuse_existing, staged_folder
from matmorph.exporters.vectors import check_vectors
from matmorph.ir.tracing.trace import trace
from matmorph.runtime.check import check
from matmorph.runtime.format.cases import Case
from matmorph.specs.schema import Export

FILES = {"model.onnx", "model.onnx.data", "report.json", "report.html", "spec.yaml", "check.npz", "manifest.json", "run.json"}


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    graph = mlp_graph()
    return Artifact(
        graph=graph,
        export=Export(),
        version="0.0",
        source_sha256="5" * 64,
        spec="version: 1\n",
        describe=lambda folder, info: WrittenReport({"bytes": info.bytes, "name": "Größe"}, "<p>ok</p>"),
        cases=check_vectors(graph, [randn(3, 5, 8)]).cases,
        run=lambda: {"seconds": 1.5},
        notes=("traced in eval mode",),
    )


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_complete_and_accepted_by_the_runtime(artifact: Artifact, tmp_path: Path) -> None:
    info = write_artifact(tmp_path / "out", artifact)
    files = read(tmp_path / "out")
    assert set(files) == FILES
    manifest = json.loads(files["manifest.json"])
    assert set(manifest["files"]) == FILES - {"manifest.json", "run.json"}
    for name, entry in manifest["files"].items():
        assert entry == {"sha256": hashlib.sha256(files[name]).hexdigest(), "bytes": len(files[name])}
    assert manifest["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", "seq", 8]}]
    assert manifest["outputs"] == [{"name": "output", "dtype": "float32", "shape": ["batch", "seq", 4]}]
    assert manifest["ranges"] == {"batch": [1, None], "seq": [1, None]}
    assert (manifest["format"], manifest["precision"], manifest["opset"], manifest["target"]) == (1, "fp32", 21, ["cuda", "cpu"])
    assert (manifest["source"], manifest["notes"]) == ({"weights_sha256": "5" * 64}, ["traced in eval mode"])
    assert manifest["tolerance"] == info.tolerance
    assert json.loads(files["run.json"]) == {"seconds": 1.5}
    assert json.loads(files["report.json"]) == {"bytes": info.bytes, "name": "Größe"}
    result = check(tmp_path / "out", ["cpu"])  # the reader of all this: hashes, then outputs on ONNX Runtime
    assert not result.problems
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_vectors_are_torch_s_answers(artifact: Artifact, tmp_path: Path) -> None:
    write_artifact(tmp_path / "out", artifact)
    with np.load(tmp_path / "out" / "check.npz") as stored:
        assert set(stored.files) == {f"{side}:{k}" for side in ("input:x", "output:output") for k in range(3)}
        for k in range(3):
            expected = seeded(Mlp)(torch.from_numpy(stored[f"input:x:{k}"])).detach().numpy()
            np.testing.assert_allclose(stored[f"output:output:{k}"], expected, rtol=1e-6, atol=1e-6)  # the same kernels


def test_same_bytes_but_for_the_run(artifact: Artifact, tmp_path: Path) -> None:
    write_artifact(tmp_path / "a", artifact)
    write_artifact(tmp_path / "b", replace(artifact, run=lambda: {"seconds": 9}))
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    assert {name for name in FILES if a[name] != b[name]} == {"run.json"}


def test_npz_reads_back_and_has_no_clock() -> None:
    arrays = {"a:b:0": np.arange(6).reshape(2, 3), "empty": np.zeros((0, 2), np.float32), "scalar": np.array(True)}
    data = npz_bytes(arrays)
    assert data == npz_bytes(arrays)
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        assert list(stored.files) == list(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(stored[name], array)
            assert stored[name].dtype == array.dtype


def test_inputs_take_the_type_of_the_exported_graph(tmp_path: Path) -> None:
    module_ = seeded(lambda: torch.nn.Linear(4, 3)).half()
    graph = trace(module_, (randn(2, 4).half(),), ({0: "batch"},))
    cases = (Case({"input": randn(2, 4).half().numpy()}, {"output": np.zeros((2, 3), np.float16)}),)
    write_artifact(tmp_path / "out", Artifact(graph, Export(), "0", "", "", lambda *_: WrittenReport({}, ""), cases))
    with np.load(tmp_path / "out" / "check.npz") as stored:
        assert stored["input:input:0"].dtype == np.float32


def test_not_finite_is_not_json() -> None:
    with pytest.raises(VerifyError, match="not finite"):
        json_bytes({"error": float("nan")})


# ------------------------------------------------------------------------------------------------------------ existing folders


def test_existing_folder_needs_force(artifact: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_artifact(out, artifact)
    before = read(out)
    with pytest.raises(InputError, match="the folder exists") as caught:
        write_artifact(out, replace(artifact, spec="new"))
    assert caught.value.exit_code == 2
    assert read(out) == before
    (out / "stray.txt").write_text("x")
    write_artifact(out, replace(artifact, spec="new"), force=True)
    assert set(read(out)) == FILES
    assert (out / "spec.yaml").read_text() == "new"
    assert list(tmp_path.iterdir()) == [out]


def test_force_replaces_an_empty_folder_only_with_force(artifact: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(InputError, match="exists"):
        refuse_existing(out, force=False)
    write_artifact(out, artifact, force=True)
    assert is_artifact(out)


@pytest.mark.parametrize("content", [{"notes.txt": "mine"}, {"manifest.json": '{"name": "a web app"}'}, {"manifest.json": "{"}])
def test_force_spares_what_is_not_ours(content: dict[str, str], artifact: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name, text in content.items():
        (out / name).write_text(text)
    with pytest.raises(InputError, match="something other than an artefact"):
        write_artifact(out, artifact, force=True)
    assert {path.name: path.read_text() for path in out.iterdir()} == content


@pytest.mark.parametrize("force", [False, True])
def test_a_file_in_the_way(force: bool, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("out", "link"):
        with pytest.raises(InputError, match="exists and is not a folder"), staged_folder(tmp_path / name, force):
            pytest.fail("entered")


# ------------------------------------------------------------------------------------------------------------ failures


def broken_check(folder: Path, info: OnnxInfo) -> WrittenReport:
    """What a parity check does: it finds a folder that runs, and refuses it."""
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "model.onnx.data", "spec.yaml", "check.npz", "manifest.json"}
    assert not check(folder, ["cpu"]).problems
    raise CheckError("parity")


def broken_run() -> dict[str, object]:
    raise KeyboardInterrupt


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"export": Export(precision="bf16")}, ExportError),
        ({"describe": lambda *_: WrittenReport({"x": float("inf")}, "")}, VerifyError),
        ({"describe": broken_check}, CheckError),
        ({"run": broken_run}, KeyboardInterrupt),
    ],
)
def test_failure_leaves_nothing(existing: bool, change: dict[str, object], error: type, artifact: Artifact, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    if existing:
        write_artifact(out, artifact)
    before = read(out) if existing else None
    with pytest.raises(error):
        write_artifact(out, replace(artifact, **change), force=existing)
    if existing:
        assert read(out) == before
        assert list(out.parent.iterdir()) == [out]
    else:
        assert not list(tmp_path.iterdir())  # nor the parent that was made for it


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "no permission"), (errno.EROFS, "no permission"), (errno.EIO, "cannot be written")],
)
def test_the_disk_says_no(number: int, words: str, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, data: bytes) -> int:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "write_bytes", refuse)  # after model.onnx.data has been written
    with pytest.raises(InputError, match=words):
        write_artifact(tmp_path / "out", artifact)
    assert not list(tmp_path.iterdir())


def test_parent_is_a_file(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        write_artifact(tmp_path / "file" / "out", artifact)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_parent(artifact: Artifact, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="no permission"):
        write_artifact(tmp_path / "out", artifact)


def test_permissions_are_those_of_any_new_folder(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with staged_folder(tmp_path / "out") as staging:
        assert staging.parent == tmp_path
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
