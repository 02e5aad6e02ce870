"""New weights on disk: the same numbers in the same layout, one file that nobody sees, and a full disk that is told."""

from __future__ import annotations

import errno
import gc
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import matmorph as mm
from matmorph.errors import InputError
from matmorph.exporters.data_file import data_file
from matmorph.exporters.onnx.onnx_model import write_model
from matmorph.passes.linalg import whiten
from matmorph.passes.linalg.whiten import relative_weight_error
from matmorph.passes.rewriting import spill
from matmorph.passes.rewriting.spill import LEAST, Spill
from matmorph.runtime.format.artifact import DATA, MODEL
from matmorph.specs.schema import Export

WIDE = LEAST // 4 // 64
"""Rows of 64 float32 that are just worth a place on disk."""


def seeded(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


LAYOUTS = {
    "rows": seeded(WIDE, 64),
    "transposed": seeded(64, WIDE).T,
    "axes in another order": seeded(4, WIDE, 16).permute(2, 0, 1),
    "half": seeded(2 * WIDE, 64).to(torch.bfloat16),
    "bytes": (seeded(4 * WIDE, 64) * 9).to(torch.uint8),
    "truth": seeded(4 * WIDE, 64) > 0,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_weight_comes_back_in_its_layout(name: str) -> None:
    tensor = LAYOUTS[name]
    held = Spill()
    held.kept(seeded(WIDE, 65))  # something before it, of no whole line
    back = held.kept(tensor)()
    assert back.dtype == tensor.dtype
    assert back.stride() == tensor.stride()
    assert torch.equal(back, tensor)
    assert back.data_ptr() != tensor.data_ptr()


def test_a_part_of_a_larger_one_comes_back_row_by_row() -> None:
    tensor = seeded(WIDE, 80)[:, :64]
    back = Spill().kept(tensor)()
    assert torch.equal(back, tensor)
    assert back.is_contiguous()


def test_each_keeps_its_own_numbers() -> None:
    held = Spill()
    tensors = [seeded(WIDE + k, 64) * k for k in range(4)]
    loads = [held.kept(tensor) for tensor in tensors]
    loads[1]().zero_()  # a private mapping
    assert all(torch.equal(load(), tensor) for load, tensor in zip(loads, tensors, strict=True))


def test_small_weights_stay_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: pytest.fail("a file for a small weight"))
    tensor = seeded(WIDE - 1, 64)
    assert Spill().kept(tensor)() is tensor


@pytest.mark.skipif(sys.platform != "linux", reason="lists the open files of the process as Linux does")
def test_the_file_has_no_name_and_goes_with_its_last_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    load = Spill().kept(seeded(WIDE, 64))
    assert list(tmp_path.iterdir()) == []
    assert len(opened_in(tmp_path)) == 1
    assert load().shape == (WIDE, 64)
    del load
    gc.collect()
    assert opened_in(tmp_path) == []


def opened_in(folder: Path) -> list[str]:
    links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    return [target for link in links if os.path.lexists(link) and (target := os.readlink(link)).startswith(str(folder))]


class Full(io.BytesIO):
    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told_with_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(InputError, match=r"has no room for new weights, of which the next takes 0\.1 MiB") as caught:
        Spill().kept(seeded(WIDE, 64))
    assert caught.value.details == ("set TMPDIR to a folder on a disk with room for the new weights",)


def test_what_is_written_does_not_depend_on_where_weights_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All on disk, and none: every file but that of times is the same to the byte."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32)).eval()
    x = seeded(4, 32)
    written = []
    spec = {
        "version": 1,
        "name": "both",
        "rules": [
            {"match": {"path": "0"}, "rewrite": {"low_rank": {"rank": 8}}},
            {"match": {"path": "2"}, "rewrite": {"quantize": {"quantizer": "uniform", "bits": 4, "block_size": 16}}},
        ],
    }
    for least in (1, sys.maxsize):
        monkeypatch.setattr(spill, "LEAST", least)
        folder = mm.compile(model, spec, (x,), ({0: "batch"},), calibration=[(x,)]).save(tmp_path / str(least))
        written.append({path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"})
    assert written[0] == written[1]


def test_the_error_of_a_large_matrix_is_summed_up_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside float64 over the whole; both sum up 6 000 squares in float64, so a few of its roundings."""
    w = seeded(3, 20, 100)
    other = w + 1e-3 * seeded(3, 20, 100)
    exact = float((w.double() - other.double()).norm() / w.double().norm())
    monkeypatch.setattr(whiten, "_LARGE", 1600)
    assert relative_weight_error(w, other) == pytest.approx(exact, rel=1e-6)  # the difference itself is rounded to float32
    assert relative_weight_error(w, w) == 0.0


@pytest.mark.full
def test_a_session_reads_weights_beyond_four_gib(tmp_path: Path) -> None:
    """The data file begins with a hole of 4 GiB, which takes no room on disk; ONNX Runtime maps what lies behind it."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="reads the file")
    model, x = torch.nn.Linear(64, 64).eval(), seeded(2, 64)
    with data_file(tmp_path) as data:
        data._open().seek(1 << 32)
        data.position = 1 << 32
        write_model(mm.trace(model, (x,)), tmp_path / MODEL, data, Export())
    assert (tmp_path / DATA).stat().st_size > 1 << 32
    session = onnxruntime.InferenceSession(str(tmp_path / MODEL), providers=["CPUExecutionProvider"])
    [found] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    exact = (x.double() @ model.weight.double().T + model.bias.double()).detach().numpy()
    assert abs(found - exact).max() <= 64 * 2**-24 * 4  # 64 products of numbers up to 4 by 1/8, each rounded in float32
