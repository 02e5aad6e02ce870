"""examples/prune_shots.py: pruned, trained on ONNX Runtime, pruned again; what it prints is true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

import matmorph as mm

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.full
@pytest.mark.no_cover
def test_training_between_the_shots_brings_back_what_pruning_took(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / "prune_shots.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    first, *shots, last = done.stdout.splitlines()
    numbers = [[float(number) for number in re.findall(r"[\d.]+", line)] for line in shots]
    assert [int(width) for width, _, _ in numbers] == [*mm.prune_schedule(96, 8, 3, multiple_of=8)] == [72, 40, 8]
    dense, once = (float(line.split()[-1]) for line in (first, last))
    pruned, trained = numbers[-1][1:]
    # Three arms: chance is 0.33. The figures move with the versions of torch and ONNX Runtime; the gaps are ten times that.
    assert dense > 0.9
    assert trained > 0.9 > max(pruned, once)
    weights = {
        tensor.name: list(tensor.dims)
        for tensor in onnx.load(tmp_path / "out-shot" / "model.onnx", load_external_data=False).graph.initializer
    }
    assert sorted(dims for name, dims in weights.items() if name.endswith("fc1.weight")) == [[8, 24], [8, 24]]
