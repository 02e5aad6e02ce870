"""Two processes over torch.distributed (gloo), each with half of every batch, against one process with whole batches."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_training import batch, write_training

from matmorph.runtime import Batches, Trainer, linear

ROOT = Path(__file__).resolve().parents[1]

WORKER = """
import sys
import numpy as np
import torch
import torch.distributed as dist
from matmorph.runtime import Batches, Trainer, linear

folder, data, result = sys.argv[1:]
dist.init_process_group("gloo")
rank = dist.get_rank()
trainer = Trainer(folder, "cpu", all_reduce=lambda vector: dist.all_reduce(torch.from_numpy(vector)))
loader = Batches(dict(np.load(data)), 5, seed=3, part=(rank, 2))  # 3 rows and 2: the parts weigh differently
losses = trainer.fit(loader, 2, schedule=linear(1), accumulate=2, clip=1.0)
np.savez(f"{result}{rank}.npz", losses=losses, **trainer.parameters())
dist.destroy_process_group()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_processes_are_one(tmp_path: Path) -> None:
    folder = write_training(tmp_path / "train")
    np.savez(tmp_path / "data.npz", **batch(22))
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", WORKER, str(folder), str(tmp_path / "data.npz"), str(tmp_path / "rank")]
    processes = [
        subprocess.Popen(arguments, env={**shared, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True, cwd=ROOT) for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    alone = Trainer(folder, "cpu")
    losses = alone.fit(Batches(batch(22), 5, seed=3), 2, schedule=linear(1), accumulate=2, clip=1.0)
    found = [dict(np.load(tmp_path / f"rank{rank}.npz")) for rank in range(2)]
    for name, value in alone.parameters().items():
        np.testing.assert_array_equal(found[0][name], found[1][name])
        np.testing.assert_allclose(found[0][name], value, rtol=0, atol=1e-6)  # the same sums in another order, float32, six updates
    np.testing.assert_allclose(found[0]["losses"], losses, rtol=1e-6)


@pytest.mark.full
def test_the_example_runs() -> None:
    script = ROOT / "examples" / "data_parallel.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("largest difference between the processes 0.0e+00, from one process with whole batches ")
    assert float(last.rpartition(" ")[2]) < 1e-6  # 24 updates in float32, sums in another order
