"""Execution providers: one that is defined here alone, put into the table, is known wherever providers differ."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporting import Mlp, randn, seeded
from quantizing import METHODS, quantize
from rewriting import LINEAR, graph_of, rewritten, rule_of

import matmorph as mm
from matmorph.errors import ExportError, InputError, SpecError
from matmorph.passes.kernel_costs import kernel_notes, predicted_times
from matmorph.passes.linalg.contraction_cost import planning_target
from matmorph.passes.methods import method_table
from matmorph.runtime import ProviderError, Session
from matmorph.runtime.targets import TARGETS, target_names
from matmorph.runtime.targets.cpu import CPU, CPU_RATES
from matmorph.runtime.targets.kernels import read_kernels
from matmorph.runtime.targets.target import KernelCost, Limits, Target
from matmorph.specs.json_schema import json_schema
from matmorph.specs.schema import Export

NPU = Target(
    name="npu",
    provider="CPUExecutionProvider",  # stands in for one that this ONNX Runtime does not have
    title="NPU",
    memory="cpu",
    obstacle=lambda: None,
    kernels=lambda: read_kernels("com.microsoft MatMulNBits\n 1 T1 T2 T1 T3 T4 T1 -> T1\n npu 1+ T1=float32\n", "npu"),
    limits={"MatMulNBits": Limits(blocks=(32,), bits=(4,))},
    lacks={"fp16": "its products are float32"},
    rates=replace(CPU_RATES, source="made up"),
    costs={
        ("uniform_4", "fp32"): KernelCost("four bits at once", ((0.5, 0.5), (0.25, 0.5), (2, 3))),
        ("nf4", ""): KernelCost("never looked at", basis="not measured"),
    },
)


@pytest.fixture
def npu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table with one more line, before the one that is always there."""
    monkeypatch.delitem(TARGETS, "cpu")
    monkeypatch.setitem(TARGETS, "npu", NPU)
    monkeypatch.setitem(TARGETS, "cpu", CPU)
    assert list(TARGETS) == ["cuda", "npu", "cpu"]


def spec(target: Any, rewrite: Any = None, **export: Any) -> dict[str, Any]:
    method = rewrite or {"low_rank": {"rank": 2}}
    return {"version": 1, "rules": [{"match": {"path": "**"}, "rewrite": method}], "export": {"target": target, **export}}


def without_driver(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.setitem(TARGETS, name, replace(TARGETS[name], obstacle=lambda: "no driver"))


def test_the_table() -> None:
    assert [target.provider for target in TARGETS.values()] == ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert all(name == target.name for name, target in TARGETS.items())
    assert list(TARGETS.values())[-1].obstacle() is None, "the last is always there"
    assert Export().target == ("cuda", "cpu")
    assert target_names() == "cpu or cuda"


@pytest.mark.usefixtures("npu")
def test_a_spec_names_it() -> None:
    with pytest.raises(SpecError, match=r'one of cuda, npu, cpu, got the text "npv"; did you mean npu\?'):
        mm.load_spec(spec("npv"))
    assert mm.load_spec(spec(["npu", "cpu"])).export.target == ("npu", "cpu")
    one, listed = json_schema(method_table())["properties"]["export"]["properties"]["target"]["oneOf"][:2]
    assert one == listed["items"] == {"enum": ["cuda", "npu", "cpu"]}
    assert Export().target == ("cuda", "cpu"), "a further provider does not change what a file is written for"
    planned = {"tt": {"modes": {"out": [2, 8], "in": [2, 4]}, "rank": 2, "target": ["npu"]}}
    assert mm.load_spec(spec(["cpu"], planned)).rules[0].rewrite[0].spec.target == ("npu",)


def test_without_it_a_spec_does_not() -> None:
    with pytest.raises(SpecError, match=r'expected one of cuda, cpu, got the text "npu"'):
        mm.load_spec(spec("npu"))


@pytest.mark.usefixtures("npu")
def test_a_model_is_compiled_checked_and_run_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_driver(monkeypatch, "cuda")
    compiled = mm.compile(seeded(Mlp), spec(["npu"]), {"x": randn(2, 7, 8)}, {"x": {0: "batch", 1: "rows"}})
    folder = compiled.save(tmp_path / "out")
    assert json.loads((folder / "manifest.json").read_text())["target"] == ["npu"]
    assert compiled.report.notes == ()
    x = randn(3, 5, 8)
    found = Session(folder, "npu").run({"x": x.numpy()})["output"]
    assert np.abs(found - compiled.module(x=x).detach().numpy()).max() < 1e-5  # two products of 8 to 16 float32 numbers
    said: list[str] = []
    assert Session(folder, log=said.append).provider == NPU.provider
    assert said == ["running on NPU: no CUDA (no driver)"]


@pytest.mark.usefixtures("npu")
def test_a_machine_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_driver(monkeypatch, "cuda", "npu")
    compiled = mm.compile(seeded(Mlp), spec(["npu", "cuda"]), {"x": randn(2, 7, 8)})
    folder = compiled.save(tmp_path / "out")
    where = "outputs not checked: export.target is npu and cuda alone, which this machine does not have (no driver; no driver)"
    assert compiled.report.notes == (where,)
    said: list[str] = []
    assert Session(folder, log=said.append).provider == "CPUExecutionProvider"
    assert said == ["running on CPU: no CUDA (no driver), no NPU (no driver)"]
    with pytest.raises(ProviderError, match="CPUExecutionProvider was asked for and cannot be used: no driver"):
        Session(folder, "npu")


@pytest.mark.usefixtures("npu")
def test_its_precisions_and_kernels_are_held(tmp_path: Path) -> None:
    def saved(target: list[str], rewrite: Any = None, **export: Any) -> None:
        mm.compile(seeded(Mlp), spec(target, rewrite, **export), {"x": randn(2, 7, 8)}).save(tmp_path / "out", force=True)

    with pytest.raises(ExportError, match=r"export\.precision fp16 does not run on target npu: its products are float32") as caught:
        saved(["npu"], precision="fp16")
    assert "set export.target to [cuda, cpu], or export.precision to fp32 or bf16" in str(caught.value)
    bits = {"quantize": {"quantizer": "uniform", "bits": 8, "block_size": 32}}
    with pytest.raises(ExportError, match=r"export\.target npu has no MatMulNBits with 8 bits, used in fc\d") as caught:
        saved(["cpu", "npu"], bits)
    assert "npu: float32, blocks of 32, 4 bits; cuda: bfloat16, float16, float32, blocks of 16" in str(caught.value)
    saved(["cpu", "npu"], {"quantize": {"quantizer": "uniform", "bits": 4, "block_size": 32}})


@pytest.mark.usefixtures("npu")
def test_its_costs_are_said_and_planned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    use = quantize(quantizer="uniform", bits=4)
    _, (outcome,) = rewritten(graph_of(LINEAR), rule_of(use, force=True), methods=METHODS)
    export = Export(target=("cuda", "npu"), tokens=(1, 300))
    assert kernel_notes(outcome, export) == (
        "npu: four bits at once: time over dense 0.5 x at 1 row, 2 to 3 x at 256 rows",
        "cuda (read in the kernel, not measured): packed for few rows, else unpacked on every call for a dense product",
    )
    assert predicted_times(use.spec, export) == ((1, 0.5), (256, 2))
    assert predicted_times(quantize(quantizer="nf4").spec, export) == (), "known, but not measured"
    _, (table,) = rewritten(graph_of(LINEAR), rule_of(quantize(quantizer="nf4"), force=True), methods=METHODS)
    assert kernel_notes(table, Export(target=("npu",))) == ("npu (not measured): never looked at",)
    assert planning_target(("cuda", "npu")) == "npu", "measured before estimated"
    monkeypatch.setitem(TARGETS, "npu", replace(NPU, rates=None))
    assert planning_target(("npu", "cuda")) == "cuda"
    with pytest.raises(InputError, match="no contraction costs are known for npu; they are for cpu, cuda"):
        planning_target(("npu",))


def test_the_record_is_read_without_onnxruntime() -> None:
    code = "import sys, matmorph.runtime.targets; print([m for m in ('numpy', 'onnxruntime', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
