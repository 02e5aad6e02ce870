"""Mutants of what reads files and judges their texts: each leaves one door open, and the checks below must notice."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from mutating import Mutant, killer, mutated, unmutated


def record(m: Any, data: bytes) -> Any:
    return m.FileRecord(hashlib.sha256(data).hexdigest(), len(data))


def refused(call: Any, *arguments: Any) -> bool:
    """Errors are known by name: their module may be another one than ours."""
    try:
        call(*arguments)
    except Exception as error:
        return type(error).__name__ in ("StoredError", "ManifestError")
    return False


def hashes(m: Any) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "a").write_bytes(b"good")
        (folder / "b").write_bytes(b"more")
        stored = m.StoredFolder(folder, {"a": record(m, b"good"), "b": record(m, b"mo"), "gone": record(m, b"")}, "manifest.json")
        assert stored.checked("a") == folder / "a"
        assert refused(stored.checked, "b"), "another size"
        assert refused(stored.checked, "gone")
        (folder / "c").write_bytes(b"unknown")
        assert refused(stored.checked, "c"), "not listed"
        (folder / "a").write_bytes(b"goof")
        assert refused(stored.checked, "a"), "changed at once, to the same size"
        os.utime(folder / "b", ns=(1, 1))
        assert m.StoredFolder(folder, stored.files, "manifest.json", verify=False).checked("b") == folder / "b"


def links(m: Any) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder, store = Path(place) / "models--x" / "snapshots" / "1", Path(place) / "models--x" / "blobs"
        folder.mkdir(parents=True)
        store.mkdir()
        for name, target in (("out", Path(place) / "secret"), ("hub", store / "1"), ("in", folder / "real")):
            target.write_bytes(b"x")
            (folder / name).symlink_to(target)
        assert refused(m.inside, folder, "out")
        assert not refused(m.inside, folder, "hub")
        assert not refused(m.inside, folder, "in")


def names(m: Any) -> None:
    assert not refused(m.check_name, "a/b-1.onnx", "x")
    for name in ("", ".", "..", "../a", "a/../b", "/a", "a//b", "a\\b", "C:/x", "C:x", "a\nb", 5, None):
        assert refused(m.check_name, name, "x"), name


def numbers(m: Any) -> None:
    assert m.typed(5, int, "x") == 5
    assert m.typed(True, bool, "x") is True
    for value in (True, 10**400, -(1 << 63), float("nan"), float("inf"), "5", None, [5]):
        assert refused(m.typed, value, (int, float), "x"), value


def texts(m: Any) -> None:
    for fine in (
        "s0 + 2*s1",
        "Mul(Symbol('s27', positive=True, integer=True), Integer(-2))",
        "Max(1, s0)",
        "s0**2",
        "FloorDiv(s0, 2) <= 9",
    ):
        assert m._judge_expression(fine) is None, fine
    for wrong in (
        *("__import__('os')", "s0.__class__", "[s0]", "(lambda: s0)()", "eval(s0)", "open('x')", "Max('x')", "Symbol('x y')"),
        *("9**9**9**9", "Pow(Pow(Pow(Pow(s0, 9), 9), 9), 9)", "LShift(1, 99999)", "1" * 30, "s0 if s0 else s1", 5, ["s0"], {"s0": 1}),
    ):
        assert m._judge_expression(wrong) is not None, wrong
    for fine in ("torch.ops.aten.linear.default", "torch.ops.higher_order.cond", "_operator.add", "torch.sym_max", "math.trunc"):
        assert m._judge_operator(fine) is None, fine
    for wrong in (
        *("torch.ops.load_library", "torch.ops.aten.linear", "torch.hub.load", "_operator.methodcaller", "math.nothing", "#x:y"),
        *("torch.ops.aten.save.default", "torch.ops.aten.from_file.default", "torch.ops.aten.__class__.__call__", 5),
    ):
        assert m._judge_operator(wrong) is not None, wrong
    assert m._judge_name("x_1") is None
    assert m._judge_name("x; y") is not None
    assert m._judge_path("a.0.b-c") is None
    assert m._judge_path('a"b') is not None


CHECKS = (hashes, links, names, numbers, texts)
MUTANTS = {
    "hashes are not looked at": Mutant("changed", "sha256(path) == record.sha256", "True"),
    "sizes are not looked at": Mutant("StoredFolder.checked", "fault is not None", "fault is not None and 'sha256' in fault"),
    "what is not listed is fine": Mutant(
        "StoredFolder.checked", "not self.verify or name in UNHASHED", "not self.verify or name not in self.files"
    ),
    "files are never checked": Mutant("StoredFolder.checked", "not self.verify or name in UNHASHED", "True"),
    "links may lead anywhere": Mutant("inside", "real.is_relative_to(home)", "True"),
    "a hub's links are refused": Mutant("inside", "any(real.is_relative_to(store) for store in _stores(folder, home))", "False"),
    "a folder may be left": Mutant("check_name", "('', '.', '..')", "('', '.')"),
    "absolute names are fine": Mutant("check_name", "('', '.', '..')", "('.', '..')"),
    "backslashes are fine": Mutant("check_name", "'\\\\' not in text", "True"),
    "drives are fine": Mutant("check_name", "not _DRIVE.match(text)", "True"),
    "True is a number": Mutant("typed", "isinstance(value, bool) and bool not in (kind if isinstance(kind, tuple) else (kind,))", "False"),
    "numbers have no end": Mutant("typed", "not abs(value) < _LARGEST", "False"),
    "NaN is a number": Mutant("typed", "not abs(value) < _LARGEST", "abs(value) >= _LARGEST"),
    "any function is called": Mutant("_is_known_call", "name not in _FUNCTIONS | _POWERS", "False"),
    "powers have no end": Mutant("_is_power", "abs(number) <= _LARGEST_POWER", "True"),
    "powers of powers have no end": Mutant(
        "_is_power", "_is_arithmetic(base, depth - 1, powers - 1)", "_is_arithmetic(base, depth - 1, powers)"
    ),
    "a symbol has any name": Mutant("_is_known_call", "written.fullmatch(text) is not None", "True"),
    "an operator opens files": Mutant("_judge_registered", "'opens the file that it is given' if files else None", "None"),
    "any callable is an operator": Mutant(
        "_judge_registered", "isinstance(found, torch._ops.OpOverload | torch._ops.HigherOrderOperator)", "callable(found)"
    ),
    "any name of a module is one": Mutant("_judge_operator", "value in _ON_SIZES", "True"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_killed(name: str) -> None:
    assert killer(mutated(MUTANTS[name]), CHECKS) is not None


def test_the_code_itself_passes() -> None:
    assert killer(unmutated(MUTANTS.values()), CHECKS) is None
