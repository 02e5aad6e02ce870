"""Two processes share every batch: torch.distributed (gloo) sums one vector per update, ONNX Runtime does the rest.

python examples/data_parallel.py            # 2 processes on this machine
torchrun --nproc-per-node 4 examples/data_parallel.py
"""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import matmorph as mm
from matmorph.runtime import Batches, Trainer, cosine

PROCESSES = 2


def export(folder: Path) -> None:
    """A small MLP with LoRA adapters and its training graphs."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Linear(32, 4))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    rules = [{"name": "all", "match": {"op": "linear"}, "rewrite": {"lora": {"rank": 4, "alpha": 8}}}]
    compiled = mm.compile(model, {"version": 1, "rules": rules}, (torch.randn(8, 16, generator=generator),), dynamic_shapes=({0: "batch"},))
    compiled.export_training(folder, loss="cross_entropy", optimizer=mm.AdamW(lr=1e-2))


def train(folder: Path, rank: int, world: int) -> dict[str, np.ndarray]:
    """What one process does; with world 1 it reads whole batches and talks to nobody."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((96, 16), dtype=np.float32)
    labels = x[:, :4].argmax(1)

    def all_reduce(vector: np.ndarray) -> None:
        dist.all_reduce(torch.from_numpy(vector))  # shares the array's memory, so the sum is in place

    trainer = Trainer(folder, "cpu", threads=1, all_reduce=all_reduce if world > 1 else None)
    data = Batches({"input": x, "labels": labels}, 16, seed=2, part=(rank, world))
    losses = trainer.fit(data, epochs=4, schedule=cosine(warmup=2), clip=1.0)
    print(f"process {rank} of {world}: losses {' '.join(f'{loss:.6f}' for loss in losses)}", flush=True)
    return trainer.parameters()


def launch() -> None:
    """Exports, trains in one process, and starts two more as torchrun would."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "train"
        export(folder)
        alone = train(folder, 0, 1)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {**os.environ, "FOLDER": str(folder), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(PROCESSES)}
        processes = [subprocess.Popen([sys.executable, __file__], env={**shared, "RANK": str(rank)}) for rank in range(PROCESSES)]
        if any([process.wait() for process in processes]):
            sys.exit("a process failed")
        found = [dict(np.load(folder.parent / f"rank{rank}.npz")) for rank in range(PROCESSES)]
    between = max(float(np.abs(found[0][name] - found[1][name]).max()) for name in alone)
    beside = max(float(np.abs(found[0][name] - alone[name]).max()) for name in alone)
    print(f"largest difference between the processes {between:.1e}, from one process with whole batches {beside:.1e}")


def main() -> None:
    if "RANK" not in os.environ:
        launch()
        return
    dist.init_process_group("gloo")
    folder, rank = Path(os.environ["FOLDER"]), dist.get_rank()
    np.savez(folder.parent / f"rank{rank}.npz", **train(folder, rank, dist.get_world_size()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
