"""The Trainer on a tiny regression written by hand, beside the same training in float64 numpy; and what it says to wrong input."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from tiny_training import LR, OUT, N, Oracle, batch, initial, joined, write_json, write_training

from matmorph.optimizers import SGD, AdamAtan2, AdamW, AnyOptimizer, Lion
from matmorph.runtime import (
    ArtifactError,
    Batches,
    ExecutionError,
    InputMismatch,
    StepInfo,
    Trainer,
    TrainingError,
    linear,
    load_batches,
)
from matmorph.runtime.scaling import GROWTH_INTERVAL, LossScale

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-6
"""Parameters of size 1 after some 20 float32 updates of size 1e-2, against float64: a few roundings of 6e-8 each."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_training(tmp_path / "train")


@pytest.fixture
def trainer(folder: Path) -> Trainer:
    return Trainer(folder, "cpu", threads=1)


def assert_like(trainer: Trainer, oracle: Oracle, tolerance: float = TOLERANCE) -> None:
    parameters, moments = trainer.parameters(), trainer.moments()
    np.testing.assert_allclose(parameters["fc.weight"], oracle.w, rtol=0, atol=tolerance)
    np.testing.assert_allclose(parameters["fc.bias"], oracle.b, rtol=0, atol=tolerance)
    for which, expected in enumerate((oracle.m, oracle.v)):
        found = np.concatenate([moments[name][which].reshape(-1) for name in ("fc.weight", "fc.bias")])
        np.testing.assert_allclose(found, expected, rtol=0, atol=10 * tolerance)  # gradients are of size 10


def same(left: Trainer, right: Trainer) -> bool:
    """To the bit."""
    one, two = left.parameters(), right.parameters()
    first, second = left.moments(), right.moments()
    pairs = [(one[name], two[name]) for name in one] + [pair for name in one for pair in zip(first[name], second[name], strict=True)]
    return all(np.array_equal(a.view(np.uint32), b.view(np.uint32)) for a, b in pairs) and left.updates == right.updates


class TestSteps:
    def test_begins_with_the_initial_values(self, trainer: Trainer) -> None:
        for name, value in initial().items():
            np.testing.assert_array_equal(trainer.parameters()[name], value)
        assert all(not vector.any() for pair in trainer.moments().values() for vector in pair)
        assert trainer.provider == "CPUExecutionProvider"
        assert trainer.updates == 0

    def test_20_steps_of_changing_size(self, trainer: Trainer) -> None:
        oracle = Oracle()
        for k in range(20):
            data = batch(1 + k % 5, seed=k)
            assert trainer.step(data) == pytest.approx(oracle.step(data), rel=1e-6)  # float32 sums of 15
        assert_like(trainer, oracle)
        assert trainer.updates == 20

    def test_settings_of_the_call(self, folder: Path) -> None:
        trainer, oracle = Trainer(folder, "cpu", lr=0.1, weight_decay=0.5, clip=0.3), Oracle()
        for k in range(5):
            trainer.step(batch(4, k))
            oracle.step(batch(4, k), lr=0.1, decay=0.5, clip=0.3)
        assert_like(trainer, oracle, 3e-6)  # steps ten times as large as above

    def test_several_batches_are_one(self, folder: Path) -> None:
        """Weighted by count: the sizes differ, so that a plain mean of gradients would not do."""
        apart, oracle = Trainer(folder, "cpu"), Oracle()
        for k in range(5):
            parts = batch(1, k), batch(7, k + 100), batch(3, k + 200)
            assert apart.step(*parts) == pytest.approx(oracle.step(joined(*parts)), rel=1e-6)  # float32 sums of 33
        assert_like(apart, oracle)

    def test_results_are_copies(self, trainer: Trainer) -> None:
        before = trainer.parameters()
        trainer.parameters()["fc.weight"][:] = 0
        trainer.moments()["fc.bias"][0][:] = 1
        assert same(trainer, trainer)
        np.testing.assert_array_equal(trainer.parameters()["fc.weight"], before["fc.weight"])
        trainer.step(batch(3))
        assert not np.array_equal(trainer.parameters()["fc.weight"], before["fc.weight"])
        np.testing.assert_array_equal(before["fc.weight"], initial()["fc.weight"])

    @pytest.mark.parametrize("optimizer", [SGD(LR, momentum=0.9), AdamAtan2(LR), Lion(LR)])
    def test_other_optimizers(self, tmp_path: Path, optimizer: AnyOptimizer) -> None:
        """Their arithmetic is judged in test_optimizers; here: their states are found and kept, and the loss falls."""
        trainer = Trainer(write_training(tmp_path / "t", optimizer), "cpu")
        losses = [trainer.step(batch(16, 0)) for _ in range(60)]
        assert losses[-1] < 0.7 * losses[0]
        assert {len(states) for states in trainer.moments().values()} == {2 if isinstance(optimizer, AdamAtan2) else 1}
        assert all(states[0].any() for states in trainer.moments().values())

    def test_mask_and_segments(self, folder: Path) -> None:
        mask = np.ones((4, OUT), np.float32)
        mask[1] = 0
        trainer = Trainer(folder, "cpu", mask={"fc.weight": mask}, segment_lr={"bias": 0.0})
        plain = Trainer(folder, "cpu")
        for k in range(3):
            trainer.step(batch(5, k))
            plain.step(batch(5, k))
        found = trainer.parameters()["fc.weight"]
        np.testing.assert_array_equal(found[1].view(np.uint32), initial()["fc.weight"][1].view(np.uint32))
        assert (found[[0, 2, 3]] != initial()["fc.weight"][[0, 2, 3]]).all()
        np.testing.assert_array_equal(trainer.parameters()["fc.bias"], initial()["fc.bias"])
        assert plain.parameters()["fc.bias"].all()
        flat = np.concatenate([mask.reshape(-1), np.ones(OUT)])
        again = Trainer(folder, "cpu", mask=flat, segment_lr=[1.0, 0.0])
        for k in range(3):
            again.step(batch(5, k))
        assert same(again, trainer)
        whole = Trainer(folder, "cpu", mask={"fc.bias": 0}, segment_decay=np.array([0, 1]))
        whole.step(batch(3))
        assert not whole.parameters()["fc.bias"].any()

    def test_loss_scale_changes_nothing_in_float32(self, folder: Path) -> None:
        scaled, plain = Trainer(folder, "cpu", loss_scale=1024.0), Trainer(folder, "cpu")
        for k in range(3):
            assert scaled.step(batch(5, k)) == plain.step(batch(5, k))
        assert scaled.loss_scale == 1024
        assert same(scaled, plain)  # a power of two rounds nothing

    def test_all_reduce_of_two_halves(self, folder: Path) -> None:
        """Two Trainers as two processes would be: each hook is given one half's vector and puts the sum of both in its place."""
        import threading

        both = threading.Barrier(2)
        vectors: dict[int, np.ndarray] = {}

        def hook(rank: int) -> Any:
            def reduce(vector: np.ndarray) -> None:
                vectors[rank] = vector.copy()
                both.wait()
                vector[:] = vectors[0] + vectors[1]
                both.wait()

            return reduce

        trainers = [Trainer(folder, "cpu", all_reduce=hook(rank), clip=1.0) for rank in range(2)]
        losses: dict[int, list[float]] = {0: [], 1: []}

        def work(rank: int) -> None:
            for k in range(4):
                losses[rank].append(trainers[rank].step(batch(3 + 2 * rank, 10 * k + rank)))

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        oracle = Oracle()
        expected = [oracle.step(joined(batch(3, 10 * k), batch(5, 10 * k + 1)), clip=1.0) for k in range(4)]
        assert losses[0] == losses[1] == pytest.approx(expected, rel=1e-6)  # float32
        assert same(*trainers)
        assert_like(trainers[0], oracle)
        assert vectors[0].shape == (N + 2,)


class TestFit:
    def test_follows_schedule_clip_and_accumulation(self, trainer: Trainer) -> None:
        data = [batch(3 + k, k) for k in range(5)]
        seen: list[StepInfo] = []
        losses = trainer.fit(data, 2, schedule=linear(2), accumulate=2, clip=0.5, callbacks=[lambda t, info: seen.append(info)])
        oracle, expected = Oracle(), []
        for update in range(6):
            start = 2 * (update % 3)
            factor = update / 2 if update < 2 else (6 - update) / 4
            part = joined(*data[start : start + 2])
            expected.append((oracle.step(part, lr=LR * factor, clip=0.5), part["labels"].size))
            assert seen[update].lr == pytest.approx(LR * factor)
        assert_like(trainer, oracle)
        means = [sum(loss * size for loss, size in expected[a : a + 3]) / sum(size for _, size in expected[a : a + 3]) for a in (0, 3)]
        assert losses == pytest.approx(means, rel=1e-6)  # float32
        assert [(info.step, info.epoch, info.batch, info.skipped) for info in seen] == [
            (1, 0, 2, False), (2, 0, 4, False), (3, 0, 5, False), (4, 1, 2, False), (5, 1, 4, False), (6, 1, 5, False),
        ]  # fmt: skip

    def test_a_callback_can_end_it(self, trainer: Trainer) -> None:
        losses = trainer.fit([batch(3, k) for k in range(5)], 3, callbacks=[lambda t, info: info.step == 7])
        assert trainer.updates == 7
        assert len(losses) == 2

    def test_fit_again_trains_again(self, trainer: Trainer) -> None:
        orders: list[list[float]] = []
        for _ in range(2):
            orders.append([])
            trainer.fit(Batches(batch(12), 4, seed=3), callbacks=[lambda t, info: orders[-1].append(info.grad_norm)])
        assert trainer.updates == 6
        assert trainer.fit([batch(3)], 2)[1] < 100
        assert trainer.updates == 8

    def test_quiet_where_there_is_no_terminal(self, trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
        trainer.fit([batch(3)], 2)
        assert capsys.readouterr() == ("", "")
        trainer.fit([batch(3), batch(4)], 2, progress=True)
        shown = capsys.readouterr().err
        assert shown.startswith("\repoch 1/2  update 1/4  loss ")
        assert "epoch 2/2  update 4/4" in shown
        assert shown.endswith("\n")
        assert shown.rstrip().endswith(" left")  # padded over a longer line before

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ({"epochs": 0}, "epochs must be 1 or more, got 0"),
            ({"accumulate": 0}, "accumulate must be 1 or more, got 0"),
            ({"clip": -1.0}, "clip must be a finite number above 0, got -1.0"),
            ({"checkpoint_every": 5}, "checkpoint_every needs a checkpoint to write"),
        ],
    )
    def test_settings_that_do_not_work(self, trainer: Trainer, how: dict[str, Any], message: str) -> None:
        with pytest.raises(InputMismatch, match=message):
            trainer.fit([batch(3)], **how)

    def test_loaders_that_do_not_work(self, trainer: Trainer) -> None:
        with pytest.raises(InputMismatch, match="a generator can be read only once: give a list, or Batches"):
            trainer.fit((batch(3, k) for k in range(2)), 2)
        with pytest.raises(InputMismatch, match="a schedule must know how many updates there will be"):
            trainer.fit((batch(3, k) for k in range(2)), 1, schedule=linear())


class TestEvaluate:
    def test_weighted_means(self, trainer: Trainer) -> None:
        data = [batch(2, 0), batch(9, 1)]

        def error(outputs: Any, given: Any) -> np.ndarray:
            assert list(outputs) == ["y"]
            return np.abs(outputs["y"] - given["labels"])

        before = trainer.parameters()
        found = trainer.evaluate(data, {"error": error, "rows": lambda outputs, given: len(given["x"])})
        whole = joined(*data)
        start = initial()
        assert found["loss"] == pytest.approx(Oracle().loss(whole), rel=1e-6)  # float32
        assert found["count"] == whole["labels"].size
        expected = np.abs(whole["x"].astype(np.float64) @ start["fc.weight"] + start["fc.bias"] - whole["labels"]).mean()
        assert found["error"] == pytest.approx(expected, rel=1e-6)  # float32
        assert found["rows"] == 5.5
        np.testing.assert_array_equal(trainer.parameters()["fc.weight"], before["fc.weight"])

    def test_nothing_to_evaluate(self, trainer: Trainer) -> None:
        with pytest.raises(InputMismatch, match="there is nothing to evaluate"):
            trainer.evaluate([])


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"labels": None}, r"the batch has no labels: the loss mse needs labels: float32\[batch, 3\]"),
            ({"x": None}, r"missing input x: float32\[batch, 4\]"),
            ({"labels": np.zeros((3, OUT))}, r"input labels: expected float32, got float64; convert it with"),
            ({"labels": np.zeros((3, OUT), np.int64)}, "input labels: expected float32, got int64"),
            ({"labels": np.zeros((4, OUT), np.float32)}, "input labels, axis 0: batch is 4 here and 3 at input x, axis 0"),
            ({"labels": np.zeros((3, 2), np.float32)}, "input labels, axis 1: expected size 3, got 2"),
            ({"x": np.zeros((65, 4), np.float32)}, "input x, axis 0: batch is 65, the model takes 1 to 64"),
            ({"lables": np.zeros(3)}, r"unknown input 'lables'; the model takes x, labels; did you mean labels\?"),
        ],
    )
    def test_a_batch_that_does_not_fit(self, trainer: Trainer, change: dict[str, Any], message: str) -> None:
        given = {name: value for name, value in {**batch(3), **change}.items() if value is not None}
        for run in (trainer.step, lambda one: trainer.evaluate([one]), lambda one: trainer.fit([one])):
            with pytest.raises(InputMismatch, match=message):
                run(given)
        assert trainer.updates == 0

    def test_no_batch(self, trainer: Trainer) -> None:
        with pytest.raises(InputMismatch, match="step needs a batch"):
            trainer.step()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"lr": -1.0}, "lr must be a finite number of at least 0, got -1.0"),
            ({"lr": math.nan}, "lr must be"),
            ({"weight_decay": math.inf}, "weight_decay must be"),
            ({"clip": 0.0}, "clip must be a finite number above 0"),
            ({"loss_scale": 0.0}, "loss_scale must be a finite number above 0"),
            ({"mask": {"fc.wieght": 0}}, r"mask: no trainable parameter is called 'fc.wieght'; did you mean fc.weight\?"),
            ({"mask": {"fc.bias": np.ones(2)}}, r"mask: fc.bias has shape \(3,\), its mask has \(2,\)"),
            ({"mask": np.ones(3)}, r"mask: expected a vector of 15 numbers, .* got shape \(3,\)"),
            ({"mask": {"fc.bias": 0.5}}, "mask: holds something other than 0 and 1"),
            ({"mask": np.zeros(N)}, "mask: is 0 everywhere, so nothing would train"),
            ({"segment_lr": {"matrx": 1}}, r"segment_lr: no segment is called 'matrx'; did you mean matrix\?"),
            ({"segment_decay": [1, 2, 3]}, r"segment_decay: expected 2 factors, one per segment, got shape \(3,\)"),
            ({"segment_lr": [1, -2]}, "segment_lr: a factor must be a finite number of at least 0, got -2.0"),
        ],
    )
    def test_settings_that_do_not_work(self, folder: Path, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(InputMismatch, match=message):
            Trainer(folder, "cpu", **settings)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda f: (f / "train.json").unlink(), r"holds no training graphs \(train\.json is missing\)"),
            (lambda f: (f / "train.json").write_text("{"), r"train\.json: cannot be read"),
            (lambda f: write_json(f, format=9), r"train\.json: format: this matmorph reads format 2, the file has 9"),
            (lambda f: write_json(f, length=16), r"parameters: they end at 15, length is 16"),
            (lambda f: write_json(f, parameters=[]), r"parameters: they end at 0, length is 15"),
            (
                lambda f: write_json(f, segments=[{"name": "s", "offset": 1, "length": 14}]),
                r"segments: s lies at 1 with 14 scalars, the one before ends at 0",
            ),
            (
                lambda f: write_json(f, segments=[{"name": "s", "offset": k, "length": n} for k, n in ((0, 7), (7, 8))]),
                r"segments: a name stands there twice",
            ),
            (lambda f: write_json(f, optimizer={"name": "adamw", "weight_decay": 0}), r"optimizer\.lr: missing"),
            (lambda f: write_json(f, precision="fp8"), r"precision: unexpected value 'fp8'; known are fp32, fp16, bf16, keep"),
            (lambda f: write_json(f, states=["m", 3]), r"states\[1\]: unexpected value 3"),
            (lambda f: (f / "grad.onnx").unlink(), r"grad\.onnx: missing"),
            (lambda f: (f / "apply.onnx").write_bytes(b"short"), r"apply\.onnx: was changed: it has 5 bytes, train\.json says"),
            (lambda f: write_json(f, initial="../x.safetensors"), r"initial: '\.\./x\.safetensors': a file must lie inside the folder"),
            (lambda f: write_json(f, initial="/x.safetensors"), r"initial: '/x\.safetensors': a file must lie inside the folder"),
            (lambda f: write_json(f, parameters=[{"name": "w", "shape": [15], "offset": -8, "segment": "s"}]), "w lies at -8 with 15"),
            (
                lambda f: write_json(f, labels=[]),
                r"grad\.onnx: its inputs are labels, loss_scale, theta, x, train\.json says loss_scale, th",
            ),
            (lambda f: write_json(f, states=["m"]), r"apply\.onnx: its inputs are"),
            (lambda f: write_json(f, initial="other.safetensors"), r"other\.safetensors: missing"),
            (lambda f: replace_initial(f, {"fc.weight": np.zeros((4, 3), np.float32)}), r"differs in fc\.bias"),
            (
                lambda f: replace_initial(f, {**initial(), "fc.bias": np.zeros(2, np.float32)}),
                r"fc\.bias is float32\[2\], train\.json says float32\[3\]",
            ),
        ],
    )
    def test_damaged_folder(self, folder: Path, damage: Any, message: str) -> None:
        damage(folder)
        with pytest.raises(ArtifactError, match=message) as caught:
            Trainer(folder, "cpu")
        assert "\n" not in str(caught.value)

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match="nowhere: no such folder"):
            Trainer(tmp_path / "nowhere")
        (tmp_path / "file").write_text("")
        with pytest.raises(ArtifactError, match="file: not a folder"):
            Trainer(tmp_path / "file")

    def test_onnx_runtime_refuses(self, folder: Path) -> None:
        """A label array that train.json lets through and the graph does not."""
        write_json(folder, labels=[{"name": "labels", "dtype": "float32", "shape": ["batch", "width"]}])
        trainer = Trainer(folder, "cpu")
        with pytest.raises(ExecutionError, match=r"^CPUExecutionProvider: "):
            trainer.step({**batch(3), "labels": np.zeros((3, 2), np.float32)})
        assert trainer.step(batch(3)) > 0


def replace_initial(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    safetensors.numpy.save_file(tensors, folder / "trainable.safetensors")
    write_json(folder)


def huge(value: float) -> dict[str, np.ndarray]:
    """A batch whose loss, or whose gradient alone, is not finite."""
    return {"x": np.full((2, 4), value, np.float32), "labels": np.zeros((2, OUT), np.float32)}


class TestNotFinite:
    def test_loss(self, trainer: Trainer, tmp_path: Path) -> None:
        trainer.step(batch(3))
        before, moments = trainer.parameters(), trainer.moments()
        with pytest.raises(TrainingError, match=r"^step 2: the loss is inf; parameters and moments are those after step 1$"):
            trainer.step(huge(1e25))
        with pytest.raises(TrainingError, match=r"^step 2: the loss is nan"):
            trainer.step(huge(math.nan))
        with pytest.raises(TrainingError, match=r"^step 2: the loss is nan"):
            trainer.step(batch(3), huge(math.nan))
        for name, value in trainer.parameters().items():
            np.testing.assert_array_equal(value, before[name])
            np.testing.assert_array_equal(trainer.moments()[name], moments[name])
        trainer.save(tmp_path / "good")
        data = [batch(3), huge(1e25)]
        with pytest.raises(TrainingError, match=r"step 3: the loss is inf; .* step 2; the checkpoint of step 1 is kept: .*good"):
            trainer.fit(data)
        assert Trainer.resume(trainer._folder, tmp_path / "good", "cpu").updates == 1

    def test_gradient_in_float32_stops_at_once(self, trainer: Trainer) -> None:
        """Errors of 1e15 and rows of 1e15: the loss is 1e30, the square of the gradient no float32."""
        trainer.step(batch(3))
        before = trainer.parameters()
        pattern = r"^step 2: the gradient is not finite \(norm inf\), 1 time in a row, max_skips is 0; .* after step 1$"
        with pytest.raises(TrainingError, match=pattern):
            trainer.step(huge(1e15))
        for name, value in trainer.parameters().items():
            np.testing.assert_array_equal(value, before[name])

    def test_gradient_in_half_precision_is_skipped(self, folder: Path) -> None:
        write_json(folder, precision="fp16")
        trainer = Trainer(folder, "cpu")
        assert trainer.max_skips == 20
        assert trainer.loss_scale == 2**16
        trainer.step(batch(3))
        before, infos = trainer.parameters(), []
        trainer.fit([huge(1e15)] * 3 + [batch(3, 1)], callbacks=[lambda t, info: infos.append(info)])
        assert [(info.step, info.skipped, info.loss_scale) for info in infos] == [
            (2, True, 2.0**16),
            (2, True, 2.0**15),
            (2, True, 2.0**14),
            (2, False, 2.0**13),
        ]
        assert trainer.updates == 2
        assert not np.array_equal(trainer.parameters()["fc.weight"], before["fc.weight"])
        reference = Trainer(write_training(folder.parent / "other"), "cpu")
        for seed in (0, 1):
            reference.step(batch(3, seed))
        assert same(trainer, reference)  # scales are powers of two, and a skipped update leaves every bit

    def test_too_many_skips(self, folder: Path) -> None:
        write_json(folder, precision="fp16")
        trainer = Trainer(folder, "cpu", max_skips=2)
        with pytest.raises(TrainingError, match=r"step 1: the gradient is not finite \(norm inf\), 3 times in a row, max_skips is 2"):
            trainer.fit([huge(1e15)] * 5)

    def test_skips_in_a_row_are_counted(self, folder: Path) -> None:
        write_json(folder, precision="fp16")
        trainer = Trainer(folder, "cpu", max_skips=1)
        trainer.fit([huge(1e15), batch(3), huge(1e15), batch(3, 1)])
        assert trainer.updates == 2

    def test_scale(self) -> None:
        scale = LossScale(8.0, dynamic=True)
        assert scale.after(True) == LossScale(4.0, True)
        for _ in range(GROWTH_INTERVAL - 1):
            scale = scale.after(False)
        assert scale.value == 8
        assert scale.after(False) == LossScale(16.0, True)
        assert LossScale(1.0, True).after(True).value == 1
        assert LossScale(3.0).after(True) == LossScale(3.0)


NO_TORCH = """
import sys

class Barred:
    names = {
        "torch", "onnx", "yaml", "sympy", "networkx", "rich", "typer", "scipy",
        "onnxscript", "onnx_ir", "onnx_graphsurgeon", "transformers",
    }
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"barred: {name}", name=name)

sys.meta_path.insert(0, Barred())
from matmorph.runtime import Trainer, linear, load_batches
folder, data, checkpoint = sys.argv[1:]
trainer = Trainer(folder, "cpu")
print(len(trainer.fit(load_batches(data, 4), epochs=2, schedule=linear(0.1), clip=1.0, checkpoint=checkpoint)))
again = Trainer.resume(folder, checkpoint, "cpu")
print(again.evaluate(load_batches(data, 4)) == trainer.evaluate(load_batches(data, 4)))
print(sorted(m for m in sys.modules if m.startswith("matmorph.") and not m.startswith("matmorph.runtime")))
"""


def test_training_needs_no_torch(folder: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **batch(10))
    arguments = [str(folder), str(tmp_path / "data.npz"), str(tmp_path / "checkpoint")]
    done = subprocess.run([sys.executable, "-c", NO_TORCH, *arguments], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "True", "[]"]
    assert done.stderr == ""


def test_files_become_batches(trainer: Trainer, tmp_path: Path) -> None:
    safetensors.numpy.save_file(batch(10), tmp_path / "data.safetensors")
    losses = trainer.fit(load_batches(tmp_path / "data.safetensors", 4), 3)
    assert losses[2] < losses[0]


def test_the_settings_reach_the_graph(tmp_path: Path) -> None:
    """A lr and decay of the export are the defaults."""
    trainer = Trainer(write_training(tmp_path / "t", AdamW(0.5, weight_decay=0.25)), "cpu")
    assert (trainer.lr, trainer.weight_decay, trainer.clip) == (0.5, 0.25, None)
    assert trainer.manifest.optimizer["eps"] == 1e-8
