"""Checkpoints: exact to the bit, whole or not there, and refused where they do not belong."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from test_trainer import same
from tiny_training import OUT, batch, write_json, write_training

from matmorph.optimizers import AdamW
from matmorph.runtime import Batches, CheckpointError, StepInfo, Trainer, cosine
from matmorph.runtime import checkpoint as checkpoint_module
from matmorph.runtime.checkpoint import read_tensors, write_tensors
from matmorph.runtime.disk import files as files_module

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_training(tmp_path / "train")


def data() -> Batches:
    return Batches(batch(23), 4, seed=5)


HOW: dict[str, Any] = {"epochs": 3, "schedule": cosine(0.2), "accumulate": 2, "clip": 2.0}


class InterruptError(Exception):
    """A callback's way to leave `fit` in the middle."""


@pytest.mark.parametrize("at", [1, 3, 4, 7, 9])  # in the middle of an epoch, at its last update, in the last epoch, at the very end
def test_resume_is_exact(folder: Path, tmp_path: Path, at: int) -> None:
    straight = Trainer(folder, "cpu", mask={"fc.bias": 0}, segment_lr={"matrix": 2.0})
    expected = straight.fit(data(), **HOW)
    interrupted = Trainer(folder, "cpu", mask={"fc.bias": 0}, segment_lr={"matrix": 2.0})

    def leave(trainer: Trainer, info: StepInfo) -> None:
        if info.step == at:
            trainer.save(tmp_path / "run")
            raise InterruptError

    with pytest.raises(InterruptError):
        interrupted.fit(data(), **HOW, callbacks=[leave])
    resumed = Trainer.resume(folder, tmp_path / "run", "cpu")
    assert same(resumed, interrupted)
    losses = resumed.fit(data(), **HOW)
    assert same(resumed, straight)
    assert losses == expected[-len(losses) :]
    for trainer in (straight, resumed):
        trainer.fit(data(), epochs=1)  # a new run: the next epoch's order
    assert same(resumed, straight)


@pytest.mark.parametrize("at", [2, 5])
def test_resume_with_a_plain_list(folder: Path, tmp_path: Path, at: int) -> None:
    batches = [batch(3, k) for k in range(4)]
    straight, first = Trainer(folder, "cpu"), Trainer(folder, "cpu")
    straight.fit(batches, 2)
    with pytest.raises(InterruptError):
        first.fit(batches, 2, checkpoint=tmp_path / "run", checkpoint_every=1, callbacks=[raise_at(at)])
    resumed = Trainer.resume(folder, tmp_path / "run", "cpu")
    assert resumed.updates == at
    resumed.fit(batches, 2)
    assert same(resumed, straight)


def raise_at(step: int) -> Callable[[Trainer, StepInfo], None]:
    def callback(trainer: Trainer, info: StepInfo) -> None:
        if info.step == step:
            raise InterruptError

    return callback


def test_resume_after_the_end_says_so(folder: Path, tmp_path: Path) -> None:
    trainer = Trainer(folder, "cpu")
    trainer.fit(data(), 2, checkpoint=tmp_path / "run")
    said: list[str] = []
    resumed = Trainer.resume(folder, tmp_path / "run", "cpu", log=said.append)
    assert resumed.fit(data(), 2) == []
    assert said == ["nothing left to train: all 2 epochs were done when the checkpoint was written"]
    assert same(resumed, trainer)
    assert len(resumed.fit(data(), 1)) == 1


def test_manual_steps_resume(folder: Path, tmp_path: Path) -> None:
    trainer = Trainer(folder, "cpu", lr=0.05, weight_decay=0.3, clip=0.5, segment_decay=[1.0, 0.0])
    for k in range(3):
        trainer.step(batch(4, k))
    trainer.save(tmp_path / "run")
    resumed = Trainer.resume(folder, tmp_path / "run", "cpu")
    assert (resumed.lr, resumed.weight_decay, resumed.clip) == (0.05, 0.3, 0.5)
    for k in range(3, 6):
        assert trainer.step(batch(4, k)) == resumed.step(batch(4, k))
    assert same(trainer, resumed)
    other = Trainer.resume(folder, tmp_path / "run", "cpu", lr=0.0, weight_decay=0.0)
    before = other.parameters()["fc.weight"]
    other.step(batch(4, 3))
    np.testing.assert_array_equal(other.parameters()["fc.weight"], before)


HOLDS = """
import sys
from matmorph.runtime.checkpoint import only_writer

with only_writer(sys.argv[1]):
    print("have it", flush=True)
    sys.stdin.read()
"""


def test_a_checkpoint_has_one_writer(folder: Path, tmp_path: Path) -> None:
    path, trainer = tmp_path / "run", Trainer(folder, "cpu")
    command = [sys.executable, "-c", HOLDS, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "have it\n"
        with pytest.raises(CheckpointError, match=f"process {other.pid} is writing to this file; give each run a file of its own"):
            trainer.fit([batch(3)], checkpoint=path)
        assert trainer.updates == 0
        other.kill()
    trainer.fit([batch(3)], checkpoint=path)
    assert [entry.name for entry in tmp_path.iterdir() if "run" in entry.name] == ["run"]


def test_the_loss_scale_is_resumed(folder: Path, tmp_path: Path) -> None:
    write_json(folder, precision="fp16")
    trainer = Trainer(folder, "cpu")
    bad = {"x": np.full((2, 4), 1e15, np.float32), "labels": np.zeros((2, OUT), np.float32)}
    trainer.step(bad)
    trainer.step(batch(3))
    trainer.save(tmp_path / "run")
    assert Trainer.resume(folder, tmp_path / "run", "cpu").loss_scale == trainer.loss_scale == 2**15
    assert Trainer.resume(folder, tmp_path / "run", "cpu", loss_scale=4.0).loss_scale == 4


def test_same_state_same_bytes(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        trainer = Trainer(folder, "cpu")
        trainer.fit(data(), 1, checkpoint=tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_parameters_alone(folder: Path, tmp_path: Path) -> None:
    trainer = Trainer(folder, "cpu")
    trainer.step(batch(3))
    trainer.save_parameters(tmp_path / "new" / "trained.safetensors")
    tensors = safetensors.numpy.load_file(tmp_path / "new" / "trained.safetensors")
    assert sorted(tensors) == ["fc.bias", "fc.weight"]
    for name, value in trainer.parameters().items():
        np.testing.assert_array_equal(tensors[name], value)
    with pytest.raises(CheckpointError, match="holds parameters, but no state to resume from"):
        Trainer.resume(folder, tmp_path / "new" / "trained.safetensors", "cpu")


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"fingerprint": "c" * 64},
                r"was trained on another model: the fingerprint of its base is aaaaaaaaaaaaaaaa, .* has cccccccccccccccc",
            ),
            ({"trainable_fingerprint": "d" * 64}, "the trainable_fingerprint of its trainable parameters is bbbbbbbbbbbbbbbb, .* has dddd"),
            (
                {"optimizer": {"name": "adamw", "lr": 1, "betas": [0.9, 0.999], "eps": 1e-6, "weight_decay": 0.01}},
                r"was trained by another optimizer: eps 1e-08; .* has eps 1e-06",
            ),
        ],
    )
    def test_another_model(self, folder: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        Trainer(folder, "cpu").save(tmp_path / "run")
        write_json(folder, **change)
        with pytest.raises(CheckpointError, match=message):
            Trainer.resume(folder, tmp_path / "run", "cpu")

    @pytest.mark.parametrize(("before", "after", "message"), [
        (7, 5, r"another optimizer: kept entries of fc.weight 7; .* has kept entries of fc.weight 5$"),
        (None, 5, r"another optimizer: kept entries of fc.weight unset; .* has kept entries of fc.weight 5$"),
    ])  # fmt: skip
    def test_other_kept_entries(self, folder: Path, tmp_path: Path, before: int | None, after: int, message: str) -> None:
        def keep(count: int | None) -> None:
            parameters = json.loads((folder / "train.json").read_text())["parameters"]
            for one in parameters:
                if one["name"] == "fc.weight" and count is not None:
                    one["keep"] = count
            write_json(folder, parameters=parameters)

        keep(before)
        Trainer(folder, "cpu").save(tmp_path / "run")
        assert Trainer.resume(folder, tmp_path / "run", "cpu").updates == 0
        keep(after)
        with pytest.raises(CheckpointError, match=message):
            Trainer.resume(folder, tmp_path / "run", "cpu")

    def test_another_learning_rate_is_no_other_optimizer(self, tmp_path: Path) -> None:
        first, second = (write_training(tmp_path / name, AdamW(lr)) for name, lr in (("a", 0.1), ("b", 0.2)))
        Trainer(first, "cpu").save(tmp_path / "run")
        assert Trainer.resume(second, tmp_path / "run", "cpu").lr == 0.1

    def test_not_a_checkpoint(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="none: no such file"):
            Trainer.resume(folder, tmp_path / "none", "cpu")
        with pytest.raises(CheckpointError, match="train: not a file"):
            Trainer.resume(folder, folder, "cpu")
        (tmp_path / "text").write_text("hello")
        with pytest.raises(CheckpointError, match="text: cannot be read"):
            Trainer.resume(folder, tmp_path / "text", "cpu")
        safetensors.numpy.save_file({"a": np.ones(1)}, tmp_path / "other")
        with pytest.raises(CheckpointError, match="other: not a checkpoint of matmorph"):
            Trainer.resume(folder, tmp_path / "other", "cpu")
        safetensors.numpy.save_file({"a": np.ones(1)}, tmp_path / "later", {"matmorph": json.dumps({"format": 2})})
        with pytest.raises(CheckpointError, match="later: this matmorph reads checkpoints of format 1"):
            Trainer.resume(folder, tmp_path / "later", "cpu")

    def test_a_folder_is_no_file(self, folder: Path) -> None:
        with pytest.raises(CheckpointError, match="is a folder; a checkpoint is one file"):
            Trainer(folder, "cpu").save(folder)


# A process that writes a second state over the first and is killed where the argument says.
KILLED = """
import os, signal, sys
import numpy as np
from matmorph.runtime import checkpoint
from matmorph.runtime.disk import files

path, where = sys.argv[1:]
checkpoint.write_tensors(path, {"theta": np.zeros(1000, np.float32)}, {"step": 1})
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if where == "before the flush":
    files._flush = die
if where == "before the rename":
    files.os.replace = die
if where == "after the rename":
    files._flush_folder = die
checkpoint.write_tensors(path, {"theta": np.ones(1000, np.float32)}, {"step": 2})
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize(("where", "step"), [("before the flush", 1), ("before the rename", 1), ("after the rename", 2)])
def test_a_killed_process_leaves_a_whole_file(tmp_path: Path, where: str, step: int) -> None:
    path = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), where], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    tensors, about = read_tensors(path)
    assert about["step"] == step
    assert (tensors["theta"] == step - 1).all()
    write_tensors(path, {"theta": np.full(3, 7, np.float32)}, {"step": 3})  # what was left behind does not stand in the way
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
    assert read_tensors(path)[1]["step"] == 3


# RLIMIT_FSIZE stands for a full disk: the operating system refuses to write on (EFBIG).
FULL = """
import resource, signal, sys
import numpy as np
from matmorph.runtime import checkpoint, CheckpointError

path = sys.argv[1]
checkpoint.write_tensors(path, {"theta": np.zeros(10, np.float32)}, {"step": 1})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    checkpoint.write_tensors(path, {"theta": np.ones(100_000, np.float32)}, {"step": 2})
except CheckpointError as error:
    print(error)
"""


@pytest.mark.skipif(os.name == "nt" or not hasattr(resource, "RLIMIT_FSIZE"), reason="POSIX limits")
def test_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{path} cannot be written: the disk is full (File too large); the older file is as it was\n"
    assert read_tensors(path)[1]["step"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (safetensors.SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EACCES, "Permission denied"), "cannot be written: Permission denied; nothing was left behind"),
    ],
)
def test_what_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, message: str) -> None:
    def refuse(*_: object) -> None:
        raise raised

    monkeypatch.setattr(checkpoint_module.safetensors.numpy, "save_file", refuse)
    with pytest.raises(CheckpointError, match=message):
        write_tensors(tmp_path / "run", {"theta": np.ones(3, np.float32)}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_training(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error reaches the user, and the state in memory goes on."""
    trainer = Trainer(folder, "cpu")
    trainer.fit([batch(3)], checkpoint=tmp_path / "run")

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files_module, "_flush", full)
        with pytest.raises(CheckpointError, match=r"the disk is full .*; the older file is as it was"):
            trainer.fit([batch(3)], checkpoint=tmp_path / "run")
    assert Trainer.resume(folder, tmp_path / "run", "cpu").updates == 1
    assert trainer.updates == 2
    trainer.step(batch(3))
