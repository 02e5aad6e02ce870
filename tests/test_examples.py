"""The examples run in an empty folder, and what they print is true."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.no_cover
"""They run in processes of their own."""


def run(folder: Path, script: str, *words: str, code: int = 0) -> str:
    """What the script prints; `folder` is where it works."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, str(EXAMPLES / script), *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == code, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which hf_folder.py worked, and what it printed."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    return folder, run(folder, "hf_folder.py")


def test_every_example_is_tested() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for path in sorted(EXAMPLES.rglob("*.*")):
        if "node_modules" not in path.parts and path.suffix in (".py", ".mjs"):
            assert path.name in tests, path


def test_a_hugging_face_folder_goes_through_the_command_line(bert: tuple[Path, str]) -> None:
    folder, said = bert
    commands = [line.split()[2] for line in said.splitlines() if line.startswith("$ matmorph")]
    assert commands == ["inspect", "plan", "compile", "verify"]
    assert "ONNX Runtime agrees with torch" in said
    assert (folder / "out-bert" / "model.onnx").is_file()


def test_deployment_imports_no_torch(bert: tuple[Path, str]) -> None:
    said = run(bert[0], "deploy.py", "out-bert")
    assert "torch was imported: False" in said
    assert "last_hidden_state: float32 (4, 4, 64)" in said
    assert re.search(r"^files: \d+ as listed", said, re.MULTILINE)


def test_deployment_refuses_a_changed_file(bert: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(bert[0] / "out-bert", tmp_path / "out")
    data = tmp_path / "out" / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    assert "model.onnx.data" in run(tmp_path, "deploy.py", "out", code=1)


def test_a_vision_transformer_keeps_its_batch_free(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    said = run(tmp_path, "vit.py").splitlines()
    before, after = (int(word.replace(",", "")) for word in re.findall(r"[\d,]{4,}", said[0]))
    assert 0.6 < after / before < 0.7, "three blocks lose half of the MLP, two thirds of their MACs"
    assert said[1:] == ["1 image: logits (1, 2)", "3 images: logits (3, 2)"]


@pytest.mark.full  # test_adapter_inputs has the same on smaller models
def test_one_session_switches_three_adapters(tmp_path: Path) -> None:
    said = run(tmp_path, "three_adapters.py").splitlines()
    figures = [re.fullmatch(r"(\w+): accuracy ([\d.]+) without, ([\d.]+) with its adapter", line) for line in said[3:]]
    assert [found[1] for found in figures if found] == ["sign", "sum", "product"]
    for found in figures:
        assert found is not None
        assert float(found[2]) < 0.75 < 0.95 < float(found[3])  # random weights guess; 150 steps learn 256 rows
    assert {path.name for path in tmp_path.glob("*.onnx_adapter")} == {"sign.onnx_adapter", "sum.onnx_adapter", "product.onnx_adapter"}


@pytest.mark.full  # installs onnxruntime-node from the package index of npm
def test_node_agrees_with_torch(bert: tuple[Path, str], tmp_path: Path) -> None:
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not on this machine")
    place = tmp_path / "node"
    shutil.copytree(EXAMPLES / "node", place, ignore=shutil.ignore_patterns("node_modules"))
    installed = subprocess.run(["npm", "install", "--no-audit", "--no-fund"], cwd=place, capture_output=True, text=True, check=False)
    if installed.returncode != 0:
        pytest.skip(f"npm cannot install onnxruntime-node here: {installed.stderr.strip().splitlines()[-1:]}")
    folder = bert[0] / "out-bert"
    (place / "cases.json").write_text(run(place, "node/vectors.py", str(folder)), encoding="utf-8")
    done = subprocess.run(["node", "run.mjs", str(folder), "cases.json"], cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(r"onnxruntime-node agrees to \d", done.stdout)
