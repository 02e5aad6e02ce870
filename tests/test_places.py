"""How many places a new method, optimizer, condition, lowering or provider touches, counted from the code for the architecture page."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "matmorph"
PAGE = ROOT / "docs" / "about" / "architecture.md"


@dataclass(frozen=True)
class Kind:
    """`home`: the file or folder of one that exists; `names`: what of it other files could name, as an identifier, a module or a whole
    string; `key`: a word that is its name in strings alone, because variables are called so too."""

    home: str
    names: tuple[str, ...]
    key: str = ""


KINDS: Mapping[str, Kind] = {
    "a method that replaces (`low_rank`)": Kind("passes/methods/low_rank", ("LowRank", "LowRankSpec", "methods.low_rank"), "low_rank"),
    "a method that trains (`lora`)": Kind("passes/methods/lora", ("Lora", "LoraSpec", "methods.lora")),
    "an optimizer (`lion`)": Kind("optimizers/lion.py", ("Lion", "optimizers.lion"), "lion"),
    "a condition (`layer`)": Kind("specs/conditions/layer.py", ("LayerCondition", "conditions.layer")),
    "a provider (`cuda`)": Kind("runtime/targets/cuda.py", ("CUDA", "targets.cuda")),
}
PUBLIC = PACKAGE / "__init__.py"
"""The face of the package, which names the public classes: a line there is a wish, not a need."""


def mentions(tree: ast.Module, names: tuple[str, ...], key: str = "") -> set[int]:
    """Lines that name one of them: identifiers, imports, and strings that are nothing else (a place like "a.b:C" counts)."""
    found: set[int] = set()
    for node in ast.walk(tree):
        texts: list[str] = []
        if isinstance(node, ast.Name):
            texts = [node.id]
        elif isinstance(node, ast.Attribute):
            texts = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            texts = [str(node.module), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.:]+", node.value):
            texts = ["".join(names[:1]) if node.value == key else text for text in node.value.split(":")]
        if any(text == name or text.endswith(f".{name}") for text in texts for name in names):
            found.add(node.lineno)
    return found


def counted(kind: Kind) -> tuple[int, int, int]:
    """(files, lines of its own, lines elsewhere), the face of the package and empty files left out."""
    home = PACKAGE / kind.home
    own = {path: path.read_text(encoding="utf-8") for path in ([home] if home.is_file() else home.glob("*.py"))}
    others = [path for path in sorted(PACKAGE.rglob("*.py")) if path not in own and path != PUBLIC]
    lines = {path: len(mentions(ast.parse(path.read_text(encoding="utf-8")), kind.names, kind.key)) for path in others}
    files = sum(1 for text in own.values() if text) + sum(1 for count in lines.values() if count)
    return files, sum(len(text.splitlines()) for text in own.values()), sum(lines.values())


def lowering() -> tuple[int, int, int]:
    """The translation of one operator (aten.tanh_backward): a function and a line of its table."""
    file = PACKAGE / "exporters" / "onnx" / "gradient_ops.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "_tanh"]
    (table,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "backward_lowerings"]
    others = [path for path in PACKAGE.rglob("*.py") if path != file and "tanh_backward" in path.read_text(encoding="utf-8")]
    rows = len({node.lineno for node in ast.walk(table) if isinstance(node, ast.Name) and node.id == "_tanh"})
    return 1 + len([path for path in others if "exporters" in path.parts]), (function.end_lineno or 0) - function.lineno + 1, rows


def rows() -> list[str]:
    found = {what: counted(kind) for what, kind in KINDS.items()}
    found["a lowering (`aten.tanh_backward`)"] = lowering()
    return [f"| {what} | {files} | {own} | {elsewhere} |" for what, (files, own, elsewhere) in found.items()]


@pytest.mark.parametrize("row", rows())
def test_the_page_counts_as_the_code_does(row: str) -> None:
    assert row in PAGE.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("what", [what for what in KINDS if "provider" not in what])
def test_one_file_elsewhere_is_enough(what: str) -> None:
    home = PACKAGE / KINDS[what].home
    own = 1 if home.is_file() else len([path for path in home.glob("*.py") if path.read_text(encoding="utf-8")])
    assert counted(KINDS[what])[0] == own + 1


def test_a_mention_is_found_wherever_it_stands() -> None:
    text = 'from a.b.low_rank import X\nY = LowRank\nZ = "low_rank"\nW = "a:LowRank"\nV = "about low_rank"\nlow_rank = 1\n'
    assert mentions(ast.parse(text), ("LowRank", "b.low_rank"), "low_rank") == {1, 2, 3, 4}
