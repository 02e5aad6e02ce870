"""Loaders and schedules: every row once, the same order for the same seed, and transformers' factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from matmorph.runtime import Batches, InputMismatch, constant, cosine, linear, load_batches, trim_padding
from matmorph.runtime.progress import ProgressLine


def rows(count: int) -> dict[str, np.ndarray]:
    return {"ids": np.arange(count * 3).reshape(count, 3), "labels": np.arange(count)}


def labels(batches: Any) -> list[list[int]]:
    return [batch["labels"].tolist() for batch in batches]


class TestBatches:
    def test_every_row_once_and_together(self) -> None:
        loader = Batches(rows(11), 4, seed=1)
        assert len(loader) == 3
        for epoch in range(3):
            batches = list(loader.epoch(epoch))
            assert [len(batch["labels"]) for batch in batches] == [4, 4, 3]
            assert sorted(np.concatenate(labels(batches)).tolist()) == list(range(11))
            assert all((batch["ids"][:, 0] == 3 * batch["labels"]).all() for batch in batches)

    def test_order_depends_on_seed_and_epoch_alone(self) -> None:
        one, two, other = (Batches(rows(20), 4, seed=seed) for seed in (1, 1, 2))
        assert labels(one.epoch(3)) == labels(two.epoch(3)) != labels(one.epoch(4))
        assert labels(one.epoch(3)) != labels(other.epoch(3))
        assert labels(one.epoch(3, 2)) == labels(one.epoch(3))[2:]
        assert labels(one) == labels(one.epoch(0))

    def test_plain_order_and_dropped_rest(self) -> None:
        loader = Batches(rows(7), 3, shuffle=False, drop_last=True)
        assert labels(loader) == [[0, 1, 2], [3, 4, 5]]
        assert len(loader) == 2

    def test_parts_share_each_batch(self) -> None:
        whole = labels(Batches(rows(12), 5, seed=4).epoch(1))
        parts = [labels(Batches(rows(12), 5, seed=4, part=(k, 2)).epoch(1)) for k in range(2)]
        assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(batch) for batch in whole]

    @pytest.mark.parametrize(
        ("arrays", "how", "message"),
        [
            ({}, {}, "there is no sample in the data"),
            ({"a": np.zeros((0, 2))}, {}, "there is no sample in the data"),
            ({"a": np.zeros(3), "b": np.zeros(4)}, {}, "the arrays have different numbers of samples: a: 3, b: 4"),
            ({"a": np.zeros(3), "b": np.zeros(())}, {}, "array b is a single number"),
            (rows(4), {"batch_size": 0}, "batch_size must be 1 or more, got 0"),
            (rows(4), {"batch_size": 5, "drop_last": True}, "4 rows make no batch of 5"),
            (rows(4), {"part": (2, 2)}, r"part must be \(k, parts\)"),
            (rows(5), {"batch_size": 4, "part": (0, 2)}, "a batch of 1 rows cannot be shared by 2 parts"),
        ],
    )
    def test_data_that_does_not_work(self, arrays: Any, how: dict[str, Any], message: str) -> None:
        with pytest.raises(InputMismatch, match=message):
            Batches(arrays, **{"batch_size": 2, **how})

    def test_trim_padding(self) -> None:
        mask = np.array([[1, 1, 0, 0], [1, 1, 1, 0]])
        arrays = {"ids": np.arange(8).reshape(2, 4), "attention_mask": mask, "labels": np.arange(2), "other": np.zeros((2, 5))}
        (batch,) = Batches(arrays, 2, shuffle=False, transform=trim_padding())
        assert batch["ids"].tolist() == [[0, 1, 2], [4, 5, 6]]
        assert (batch["attention_mask"].shape, batch["labels"].shape, batch["other"].shape) == ((2, 3), (2,), (2, 5))
        with pytest.raises(InputMismatch, match="the batch has no mask"):
            trim_padding("mask")(arrays)
        empty = trim_padding()({**arrays, "attention_mask": 0 * mask})
        assert empty["ids"].shape == (2, 4)


class TestFiles:
    def test_both_kinds(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", **rows(6))
        safetensors.numpy.save_file(rows(6), tmp_path / "a.safetensors")
        first, second = (load_batches(tmp_path / name, 4, seed=2) for name in ("a.npz", "a.safetensors"))
        assert labels(first) == labels(second) == labels(Batches(rows(6), 4, seed=2))

    def test_files_that_do_not_work(self, tmp_path: Path) -> None:
        with pytest.raises(InputMismatch, match=r"a\.csv: expected a file that ends in \.npz or \.safetensors"):
            load_batches(tmp_path / "a.csv", 4)
        with pytest.raises(InputMismatch, match=r"a\.npz: no such file"):
            load_batches(tmp_path / "a.npz", 4)
        for name in ("a.npz", "a.safetensors"):
            (tmp_path / name).write_bytes(b"nothing of the kind")
            with pytest.raises(InputMismatch, match=rf"{name}: cannot be read"):
                load_batches(tmp_path / name, 4)
        np.savez(tmp_path / "objects.npz", a=np.array([{}, {}]))
        with pytest.raises(InputMismatch, match=r"objects\.npz: cannot be read: Object arrays"):
            load_batches(tmp_path / "objects.npz", 1)
        np.savez(tmp_path / "uneven.npz", a=np.zeros(3), b=np.zeros(4))
        with pytest.raises(InputMismatch, match=r"uneven\.npz: the arrays have different numbers of samples"):
            load_batches(tmp_path / "uneven.npz", 1)


class TestSchedules:
    @pytest.mark.parametrize(("ours", "theirs"), [(linear, get_linear_schedule_with_warmup), (cosine, get_cosine_schedule_with_warmup)])
    @pytest.mark.parametrize("warmup", [0, 7])
    def test_as_in_transformers(self, ours: Any, theirs: Any, warmup: int) -> None:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        peer, schedule = theirs(optimizer, warmup, 40), ours(warmup)
        for update in range(40):
            assert schedule(update, 40) == pytest.approx(peer.get_last_lr()[0], abs=1e-12)  # float64
            optimizer.step()
            peer.step()

    def test_shares_and_ends(self) -> None:
        assert [constant(2)(k, 9) for k in range(4)] == [0, 0.5, 1, 1]
        assert linear(0.25)(5, 40) == 0.5
        assert linear(final=0.1)(40, 40) == pytest.approx(0.1)
        assert cosine(final=0.5)(20, 40) == pytest.approx(0.75)
        assert linear()(50, 40) == 0

    @pytest.mark.parametrize("how", [{"warmup": -1}, {"warmup": 1.5}, {"final": 2.0}])
    def test_settings_that_do_not_work(self, how: dict[str, Any]) -> None:
        with pytest.raises(InputMismatch, match=f"{next(iter(how))} must be"):
            linear(**how)


def test_progress_without_a_total(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressLine(None, show=True)
    bar.update(1, 1, 2, 0.5, 1e-3)
    bar.close()
    shown = capsys.readouterr().err
    assert shown.startswith("\repoch 1/2  update 1  loss 0.5000  lr 0.001  ")
    assert shown.endswith("/s\n")
