"""What lies on disk: every record comes back as it was written, each field stands in the file, and wrong files are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matmorph.runtime.format.adapters import Slot, Slots
from matmorph.runtime.format.artifact import (
    FileRecord,
    Handed,
    Manifest,
    ModelPart,
    ModelParts,
    Range,
    Source,
    TensorInfo,
    file_record,
    is_manifest,
    shown,
    with_file,
)
from matmorph.runtime.format.cache import CacheInfo, CacheSlot
from matmorph.runtime.format.cases import (
    Case,
    TrainingCase,
    TrainingVectors,
    case_arrays,
    read_case_arrays,
    read_training_arrays,
    training_arrays,
)
from matmorph.runtime.format.plain import ManifestError, from_plain, stored, to_plain
from matmorph.runtime.format.reading import StoredError, parse_json
from matmorph.runtime.format.training import Parameter, SearchedSite, SearchSpace, SearchTensor, Segment, TrainedLoss, TrainManifest

X, Y = TensorInfo("x", "float32", ("batch", 4)), TensorInfo("y", "float16", ("batch*seq", 3))
LABEL = TensorInfo("labels", "int64", ("batch",))
SLOT = Slot("fc", "lora", "fc.lora.down", "fc.lora.up", 4, 3, None, 2, "float32")
MANIFEST = Manifest(
    version="0.1.0",
    source=Source("5" * 64),
    inputs=(X,),
    outputs=(Y,),
    ranges={"batch": Range(1, None), "seq": Range(2, 8)},
    precision="fp16",
    tolerance=0.25,
    opset=21,
    target=("cuda", "cpu"),
    notes=("a note",),
    adapters=Slots("ab" * 32, (SLOT,)).to_dict(),
    files={"model.onnx": FileRecord("a" * 64, 3), "check.npz": FileRecord("b" * 64, 4)},
)
SPACE = SearchSpace(
    (("A", "lora"), ("A", "none"), ("B", "none")),
    (SearchedSite("fc", {"A": SearchTensor(("lora", "none"), "fc.up", "fc.down"), "B": SearchTensor(("none",))}),),
)
TRAIN = TrainManifest(
    version="0.1.0",
    fingerprint="f" * 64,
    trainable_fingerprint="e" * 64,
    precision="bf16",
    features=(X,),
    labels=(LABEL,),
    outputs=(Y,),
    kept=(X,),
    ranges={"batch": Range(1, 64)},
    loss=TrainedLoss("mse", "y", -1),
    optimizer={"name": "adamw", "lr": 0.01, "weight_decay": 0, "betas": [0.9, 0.999]},
    states=("m", "v"),
    length=20,
    parameters=(Parameter("fc.up", (3, 4), 0, "matrix", 5), Parameter("fc.down", (4, 2), 12, "matrix")),
    segments=(Segment("matrix", 0, 20),),
    adapters=[{"site": "fc"}],
    supernet=SPACE,
    initial="trainable.safetensors",
    files={"grad.onnx": FileRecord("c" * 64, 5)},
)


def through_json(data: Any) -> Any:
    return json.loads(json.dumps(data, allow_nan=False))


def test_manifest_as_it_stands_on_disk() -> None:
    """The keys and their order are the format: written out here by hand."""
    assert json.dumps(MANIFEST.to_dict()) == (
        '{"format": 1, "matmorph": "0.1.0", "source": {"weights_sha256": "' + "5" * 64 + '"}, '
        '"inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}], '
        '"outputs": [{"name": "y", "dtype": "float16", "shape": ["batch*seq", 3]}], '
        '"ranges": {"batch": [1, null], "seq": [2, 8]}, "precision": "fp16", "tolerance": 0.25, "opset": 21, "target": ["cuda", "cpu"], '
        '"notes": ["a note"], "adapters": {"fingerprint": "' + "ab" * 32 + '", "inputs": [{"site": "fc", "method": "lora", '
        '"down": "fc.lora.down", "up": "fc.lora.up", "in_features": 4, "out_features": 3, "batch": null, "rank": 2, "dtype": "float32"}]}, '
        '"files": {"check.npz": {"sha256": "' + "b" * 64 + '", "bytes": 4}, "model.onnx": {"sha256": "' + "a" * 64 + '", "bytes": 3}}}'
    )


def test_train_manifest_as_it_stands_on_disk() -> None:
    assert json.dumps(TRAIN.to_dict()) == (
        '{"format": 2, "matmorph": "0.1.0", "fingerprint": "' + "f" * 64 + '", "trainable_fingerprint": "' + "e" * 64 + '", '
        '"precision": "bf16", "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}], '
        '"labels": [{"name": "labels", "dtype": "int64", "shape": ["batch"]}], '
        '"outputs": [{"name": "y", "dtype": "float16", "shape": ["batch*seq", 3]}], '
        '"kept_outputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}], "ranges": {"batch": [1, 64]}, '
        '"loss": {"name": "mse", "output": "y", "ignore_index": -1}, '
        '"optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0, "betas": [0.9, 0.999]}, "states": ["m", "v"], "length": 20, '
        '"parameters": [{"name": "fc.up", "shape": [3, 4], "offset": 0, "segment": "matrix", "keep": 5}, '
        '{"name": "fc.down", "shape": [4, 2], "offset": 12, "segment": "matrix"}], '
        '"segments": [{"name": "matrix", "offset": 0, "length": 20}], "adapters": [{"site": "fc"}], '
        '"supernet": {"columns": [["A", "lora"], ["A", "none"], ["B", "none"]], "sites": [{"site": "fc", "tensors": '
        '{"A": {"words": ["lora", "none"], "up": "fc.up", "down": "fc.down"}, "B": {"words": ["none"], "up": null, "down": null}}}]}, '
        '"initial": "trainable.safetensors", "files": {"grad.onnx": {"sha256": "' + "c" * 64 + '", "bytes": 5}}}'
    )


def test_what_is_written_is_read_back() -> None:
    assert Manifest.from_dict(through_json(MANIFEST.to_dict())) == MANIFEST
    assert TrainManifest.from_dict(through_json(TRAIN.to_dict())) == TRAIN
    slots = Slots("ab" * 32, (SLOT, replace(SLOT, site="experts", batch=8, rank=0)))
    assert Slots.from_dict(through_json(slots.to_dict())) == slots


CHANGES: dict[str, Any] = {
    "precision": "keep",
    "tolerance": 0.5,
    "source": Source("6" * 64),
    "opset": 22,
    "ranges": {"batch": Range(3, 9)},
    "adapters": None,
    "cache": CacheInfo((CacheSlot("past", "present", 2),), "right", True, 64, 512),
    "parts": ModelParts(ModelPart("encoder.onnx", (X,), (Y,)), ModelPart("decoder.onnx", (Y,), (X,)), (Handed("y", "past.y"),)),
    "loss": TrainedLoss("cosine", None, 7),
    "optimizer": {"name": "sgd", "lr": 1, "weight_decay": 0.5},
    "supernet": None,
    "files": {"model.onnx": FileRecord("d" * 64, 9)},
    "inputs": (Y, X),
    "outputs": (),
    "features": (Y,),
    "labels": (),
    "kept": (),
    "length": 12,
    "parameters": (Parameter("fc", (20,), 0, "matrix"),),
    "segments": (Segment("a", 0, 8), Segment("b", 8, 12)),
}


@pytest.mark.parametrize(("record", "read"), [(MANIFEST, Manifest.from_dict), (TRAIN, TrainManifest.from_dict)], ids=["manifest", "train"])
def test_each_field_stands_in_the_file(record: Any, read: Callable[[Any], Any]) -> None:
    """Another value of any field makes another file; where its parts still fit each other it comes back."""
    for one in fields(record):
        value = CHANGES.get(one.name, ("other",) if isinstance(getattr(record, one.name), tuple) else "other")
        changed = replace(record, **{one.name: value}, **({"supernet": None} if one.name == "parameters" else {}))
        data = through_json(changed.to_dict())
        assert data != record.to_dict(), one.name
        if one.name == "length":
            with pytest.raises(ManifestError, match="parameters: they end at 20, length is 12"):
                read(data)
        else:
            assert read(data) == changed, one.name


def test_a_field_is_added_in_one_place() -> None:
    @dataclass(frozen=True, slots=True)
    class Wider(TensorInfo):
        origin: str = field(metadata=stored(key="from"))
        scale: float = 1.0
        unit: str | None = field(default=None, metadata=stored(omitted=True))

    wide = Wider("x", "int8", (2,), "calibration", 0.5, "m")
    assert to_plain(wide) == {"name": "x", "dtype": "int8", "shape": [2], "from": "calibration", "scale": 0.5, "unit": "m"}
    assert from_plain(Wider, to_plain(wide)) == wide
    assert to_plain(replace(wide, unit=None)) == {"name": "x", "dtype": "int8", "shape": [2], "from": "calibration", "scale": 0.5}
    assert from_plain(Wider, {"name": "x", "dtype": "int8", "shape": [], "from": ""}) == Wider("x", "int8", (), "")
    with pytest.raises(ManifestError, match=r"^top\.from: missing$"):
        from_plain(Wider, to_plain(TensorInfo("x", "int8", ())), "top")
    with pytest.raises(ManifestError, match=r"^unit: unexpected value None$"):
        from_plain(Wider, {**to_plain(wide), "unit": None})


def test_an_older_file_lacks_what_has_a_default() -> None:
    data = MANIFEST.to_dict()
    found = Manifest.from_dict({key: data[key] for key in data if key not in ("source", "opset", "target", "notes", "adapters")})
    assert found == replace(MANIFEST, source=None, opset=None, target=(), notes=(), adapters=None)
    data = TRAIN.to_dict()
    found_ = TrainManifest.from_dict({key: data[key] for key in data if key not in ("precision", "kept_outputs", "adapters", "supernet")})
    assert found_ == replace(TRAIN, precision="fp32", kept=(), adapters=(), supernet=None)


WRONG = [
    ("manifest", "", [], r"manifest: unexpected value \[\]"),
    ("manifest", "format", 2, "format: this matmorph reads format 1, the file has 2"),
    ("manifest", "matmorph", 3, "matmorph: unexpected value 3"),
    ("manifest", "tolerance", True, "tolerance: unexpected value True"),
    ("manifest", "inputs", [{"name": "x", "dtype": "int8"}], r"inputs\[0\]\.shape: missing"),
    ("manifest", "inputs", [{"name": "x", "dtype": "int8", "shape": [0.5]}], r"inputs\[0\]\.shape\[0\]: unexpected value 0\.5"),
    ("manifest", "ranges", {"seq": [2]}, r"ranges\.seq: expected \[low, high\], found \[2\]"),
    ("manifest", "files", {"/x": {}}, r"files\['/x'\]: a file must lie inside the folder"),
    ("manifest", "files", {"x": {"sha256": ""}}, r"files\['x'\]\.bytes: missing"),
    ("train", "", 1, "train: unexpected value 1"),
    ("train", "precision", "int8", "precision: unexpected value 'int8'; known are fp32, fp16, bf16, keep"),
    ("train", "loss", {}, r"loss\.name: missing"),
    ("train", "optimizer", {"lr": 1}, r"optimizer\.weight_decay: missing"),
    ("train", "optimizer", {"lr": "1"}, r"optimizer\.lr: unexpected value '1'"),
    ("train", "segments", [{"name": "a", "offset": 1, "length": 19}], "segments: a lies at 1 with 19 scalars, the one before ends at 0"),
    ("train", "supernet", {"columns": [["A"]], "sites": []}, r"supernet\.columns\[0\]: expected a tensor and a word"),
    ("train", "supernet", to_plain(replace(SPACE, columns=())), r"supernet: fc may be \('A', 'lora'\), for which there is no column"),
]


@pytest.mark.parametrize(("which", "key", "value", "message"), WRONG)
def test_a_wrong_file_is_named(which: str, key: str, value: Any, message: str) -> None:
    record, read = (MANIFEST, Manifest.from_dict) if which == "manifest" else (TRAIN, TrainManifest.from_dict)
    with pytest.raises(ManifestError, match=f"^{message}$"):
        read({**record.to_dict(), key: value} if key else value)


def test_a_manifest_of_another_version_keeps_what_is_not_known() -> None:
    record = file_record(b"<p>")
    assert record == FileRecord("33f2799467177287a29260780a107ac98ea63dd6165f67fcc0d74767d0a82090", 3)
    data = {**MANIFEST.to_dict(), "format": 9, "later": [1]}
    changed = with_file(data, "model.onnx", record)
    assert changed == {**data, "files": {**data["files"], "model.onnx": {"sha256": record.sha256, "bytes": 3}}}
    assert list(changed) == list(data)
    assert [with_file(other, "model.onnx", record) for other in ({}, [], {"files": 3}, {"files": {}})] == [None] * 4
    assert is_manifest(data)
    assert not is_manifest({"format": 1})
    assert not is_manifest([])


def test_what_a_damaged_manifest_still_says() -> None:
    assert shown(MANIFEST.to_dict()) == ("5" * 64, dict(MANIFEST.files))
    assert shown({"source": 3, "files": {"a": {"bytes": 2}, "b": 1}}) == ("", {"a": FileRecord("", 2)})
    assert shown([]) == shown({"files": 1}) == ("", {})


# check vectors


def array(*values: float) -> np.ndarray[Any, Any]:
    return np.asarray(values, np.float32)


def test_cases_come_back() -> None:
    cases = (Case({"a:b": array(1), "c": array(2, 3)}, {"y": array(4)}), Case({"a:b": array(5), "c": array()}, {"y": array(6)}))
    arrays = case_arrays(cases)
    assert list(arrays) == ["input:a:b:0", "input:c:0", "output:y:0", "input:a:b:1", "input:c:1", "output:y:1"]
    found = read_case_arrays(dict(reversed(arrays.items())))
    assert list(found) == [0, 1]
    for case, again in zip(cases, found.values(), strict=True):
        for side in ("inputs", "outputs"):
            assert getattr(again, side).keys() == getattr(case, side).keys()
            assert all(getattr(again, side)[name] is value for name, value in getattr(case, side).items())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [({}, "holds no case"), ({"input:x": array(1)}, "unexpected key 'input:x'"), ({"weight:x:0": array(1)}, "unexpected key 'weight:x:0'")],
)
def test_other_keys_are_no_cases(arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=f"^{message}$"):
        read_case_arrays(arrays)


def test_training_vectors_come_back() -> None:
    third = float(np.float32(1 / 3))
    case = TrainingCase({"x:0": array(1), "labels": array(2)}, third, 2.0, array(3, 5), array(4, 6))
    vectors = TrainingVectors(array(0.5), np.arange(2), 128.0, (case, replace(case, loss=float("nan"))))
    arrays = training_arrays(vectors, 1e-3)
    shared, own = ["nudge", "index", "loss_scale", "tolerance"], ["input:x:0", "input:labels", "loss", "count", "grad", "reference"]
    assert list(arrays) == [*shared, *(f"{name}:{k}" for k in range(2) for name in own)]
    assert {str(arrays[name].dtype) for name in ("loss_scale", "loss:0", "count:1")} == {"float32"}
    found, tolerance = read_training_arrays(arrays)
    assert (tolerance, found.loss_scale) == (1e-3, 128.0)
    assert found.nudge is vectors.nudge
    assert found.index is vectors.index
    assert [one.loss for one in found.cases[:1]] == [third]
    assert np.isnan(found.cases[1].loss)
    assert found.cases[1].count == 2.0
    assert found.cases[0].inputs.keys() == case.inputs.keys()
    assert found.cases[1].grad is case.grad
    assert found.cases[1].reference is case.reference
    wrong = {"grad:1": array(3), "index": array(1, 2), "nudge": array(), "loss:0": array(1), "tolerance": np.asarray("x")}
    for key, value in wrong.items():
        for changed in ({**arrays, key: value}, {name: one for name, one in arrays.items() if name != key}):
            with pytest.raises(ManifestError, match=f"^{key}: expected "):
                read_training_arrays(changed)
    with pytest.raises(ManifestError, match="unexpected key"):
        read_training_arrays({**arrays, f"input:x:{'9' * 5000}": array(1)})
    with pytest.raises(ManifestError, match="holds no case"):
        read_training_arrays({"nudge": array(1)})


@pytest.mark.parametrize("text", ["1e400", "-1e999", '[1.5, {"a": 2e308}]'])
def test_a_number_beyond_all_numbers_is_damage(text: str, tmp_path: Path) -> None:
    with pytest.raises(StoredError, match=r"x\.json: cannot be read: .* is beyond the largest number"):
        parse_json(text, tmp_path / "x.json", lambda data: data)
    assert parse_json("[1e308, -0.5]", tmp_path / "x.json", lambda data: data) == [1e308, -0.5]
