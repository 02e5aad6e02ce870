"""The shape of the code: which way imports point, what the runtime may touch, what is long says why."""

from __future__ import annotations

import ast
import functools
import importlib
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from matmorph.passes.methods import languages, method_table
from matmorph.passes.methods.protocol import BlockMethod, ReplaceMethod, UpdateMethod

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "matmorph"

# A module may import only from its own line and from lines above it. The longest matching prefix counts.
LAYERS = (
    ("matmorph.runtime.targets",),  # records of execution providers, for the compiler too; the rest of the runtime stands apart
    ("matmorph.errors", "matmorph.progress", "matmorph.memory"),
    ("matmorph.text",),  # text becomes tokens, for whoever calibrates or evaluates
    ("matmorph.optimizers",),  # settings for the specs, rules for the exporters
    ("matmorph.ir",),
    ("matmorph.report.model",),  # data that passes fill in; the rest of report shows it
    ("matmorph.specs",),
    ("matmorph.passes.linalg",),
    ("matmorph.passes.pruning",),
    ("matmorph.passes.methods",),
    ("matmorph.passes",),
    ("matmorph.exporters",),
    ("matmorph.report",),
    ("matmorph.models",),  # where models come from
    ("matmorph.folders",),
    ("matmorph.spec",),
    ("matmorph.compiled",),
    ("matmorph.api",),
    ("matmorph.cli", "matmorph.__main__"),
)
# Inside ir, for the modules that others build upon; the rest of ir only has to be free of cycles.
IR_LAYERS = (
    ("matmorph.ir.types",),
    ("matmorph.ir.core",),
    ("matmorph.ir.ops", "matmorph.ir.op_table", "matmorph.ir.rewiring", "matmorph.ir.site"),
    ("matmorph.ir.infer",),
    ("matmorph.ir.build", "matmorph.ir.text", "matmorph.ir.verify"),
    ("matmorph.ir.tracing",),
    ("matmorph.ir.sites.roles",),
    ("matmorph.ir.sites.matmuls",),
)
RUNTIME = "matmorph.runtime"
TARGETS = "matmorph.runtime.targets"
FORMAT = "matmorph.runtime.format"  # names and records of what lies on disk: written above, read in the runtime
DISK = "matmorph.runtime.disk"  # how a file or folder comes to be there
RUNTIME_MAY_IMPORT = {"numpy", "onnxruntime", "safetensors", *sys.stdlib_module_names}
MAY_IMPORT_RUNTIME = ("matmorph.folders", "matmorph.api", "matmorph.cli", "matmorph.__main__")
LONG_FILE, LONG_FUNCTION = 500, 80
"""Lines from which on a file or a function must say why it is one idea and not several."""
REASONS: dict[str, str] = {}
"""Module, or module.function, to the reason why it is that long."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str, *, on_import_only: bool = False) -> Iterator[str]:
    """Absolute names that a module imports, inside functions and TYPE_CHECKING blocks too unless `on_import_only`."""
    tree = ast.parse(SOURCES[name].read_text(encoding="utf-8"))
    for node in tree.body if on_import_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import in line {node.lineno}"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (module if module in SOURCES else str(node.module) for module in full)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def layer_of(name: str, layers: tuple[tuple[str, ...], ...]) -> int | None:
    found = [(len(prefix), rank) for rank, line in enumerate(layers) for prefix in line if within(name, prefix)]
    return max(found)[1] if found else None


def wrong_arrows(layers: tuple[tuple[str, ...], ...]) -> list[str]:
    ranked = {name: rank for name in SOURCES if (rank := layer_of(name, layers)) is not None}
    return [
        f"{name} imports {other}"
        for name, rank in ranked.items()
        for other in imports(name)
        if (below := layer_of(other, layers)) is not None and below > rank
    ]


def test_imports_point_one_way() -> None:
    assert wrong_arrows(LAYERS) == []


def test_imports_inside_ir_point_one_way() -> None:
    assert wrong_arrows(IR_LAYERS) == []


def test_every_module_has_a_place() -> None:
    apart = {"matmorph", *(name for name in SOURCES if within(name, RUNTIME))}
    assert [name for name in SOURCES if name not in apart and layer_of(name, LAYERS) is None] == []


def test_the_arrow_test_can_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "core.py"
    source.write_text("def f():\n    from matmorph.passes import select\n")
    monkeypatch.setitem(SOURCES, "matmorph.ir.core", source)
    assert [arrow.partition(".select")[0] for arrow in wrong_arrows(LAYERS)] == ["matmorph.ir.core imports matmorph.passes"]


def test_no_import_cycle() -> None:
    graph = {name: {other for other in imports(name, on_import_only=True) if other in SOURCES} for name in SOURCES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


def test_runtime_stands_alone() -> None:
    foreign = [
        f"{name} imports {other}"
        for name in SOURCES
        if within(name, RUNTIME)
        for other in imports(name)
        if not within(other, RUNTIME) and other.partition(".")[0] not in RUNTIME_MAY_IMPORT
    ]
    assert foreign == []


def beyond_records(names: Iterable[str], records: Iterable[str] = (FORMAT, DISK, TARGETS)) -> list[str]:
    """Imports of the runtime that are none of these of its rooms."""
    found = [(name, other) for name in names for other in imports(name) if within(other, RUNTIME)]
    return [f"{name} imports {other}" for name, other in found if not any(within(other, room) for room in records)]


def test_only_the_outermost_layers_import_runtime_beyond_its_records() -> None:
    """Everything above `errors` may know what lies on disk and what a provider can do, and nothing else of the runtime."""
    others = [name for name in SOURCES if not within(name, RUNTIME) and not any(within(name, prefix) for prefix in MAY_IMPORT_RUNTIME)]
    assert beyond_records(others) == []
    assert [other for other in imports("matmorph.errors") if within(other, RUNTIME)] == []


def test_the_format_stands_below_the_runtime() -> None:
    """So that whoever writes a folder loads nothing that runs one."""
    assert beyond_records((name for name in SOURCES if within(name, FORMAT)), [FORMAT]) == []
    assert beyond_records((name for name in SOURCES if within(name, DISK)), [DISK]) == []
    outside = {other.partition(".")[0] for name in SOURCES if within(name, FORMAT) or within(name, DISK) for other in imports(name)}
    assert outside <= {"matmorph", "numpy", *sys.stdlib_module_names}


def test_the_runtime_rule_can_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "diff.py"
    source.write_text("from matmorph.runtime.format.artifact import GRAPH\nfrom matmorph.runtime.check import check\n")
    monkeypatch.setitem(SOURCES, "matmorph.report.diff", source)
    assert beyond_records(["matmorph.report.diff"]) == ["matmorph.report.diff imports matmorph.runtime.check"]


def test_targets_are_records_alone() -> None:
    """The compiler reads them, so they load nothing else: neither the rest of the runtime nor ONNX Runtime."""
    loaded = {other for name in SOURCES if within(name, TARGETS) for other in imports(name, on_import_only=True)}
    assert [other for other in loaded if not within(other, TARGETS) and other.partition(".")[0] not in sys.stdlib_module_names] == []


@pytest.mark.parametrize("module", ["matmorph", "matmorph.runtime", "matmorph.runtime.check"])
def test_light_modules_import_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'onnx', 'yaml', 'sympy', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


HEAVY = ("torch", "onnx", "onnxruntime", "transformers", "numpy", "networkx", "sympy", "scipy", "rich")


@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        ["compile", "--help"],
        ["specs", "list"],
        ["specs", "schema"],
        ["specs", "check", "budget-40"],
        ["specs", "check", "bad.yaml"],
        ["plan", "minilm", "--spec", "bad.yaml"],
        ["compile", "minilm", "--spec", "bad.yaml", "--out", "out"],
    ],
    ids=" ".join,
)
def test_a_spec_is_read_without_what_models_need(command: list[str], tmp_path: Path) -> None:
    """So that a mistake in it is said at once."""
    (tmp_path / "bad.yaml").write_text(BAD)
    run = "from matmorph.cli.main import main\ntry: main(sys.argv[1:])\nfinally: print(sys.modules.keys() & heavy)"
    code = f"import sys\nheavy = set({HEAVY!r})\n{run}"
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout.splitlines()[-1] == "set()"
    if "bad.yaml" in command:
        assert done.stderr.startswith("bad.yaml:8:26: rules[1].rewrite.low_rank.rnak: unknown key; did you mean rank?")


BAD = """version: 1
rules:
  - match: {effective_rank: "> 3", pattern: "g = matmul(x)\\nh = mul(silu(g), u)"}
    optional: true
    rewrite:
      - {loftq: {quantizer: nf4, rank: 4}}
  - match: {op: linear}
    rewrite: {low_rank: {rnak: 2}}
"""


@pytest.mark.parametrize("name", [name for name in SOURCES if within(name, "matmorph.passes.methods") and name.endswith(".settings")])
def test_a_method_and_its_settings_say_the_same(name: str) -> None:
    folder = name.removesuffix(".settings")
    key = folder.rpartition(".")[2]
    language, method = languages()[key], method_table()[key]
    assert issubclass(method, language)
    assert language.name == method.name == key
    assert method.__mro__[1] is language
    family = next(base for base in (ReplaceMethod, UpdateMethod, BlockMethod) if issubclass(method, base))
    assert language.kind == family.kind


def test_all_our_methods_have_settings_of_their_own() -> None:
    folders = {name.split(".")[3] for name in SOURCES if within(name, "matmorph.passes.methods") and name.endswith(".settings")}
    assert {name for name, method in method_table().items() if within(method.__module__, "matmorph")} == folders


def test_the_format_loads_no_onnx_runtime() -> None:
    names = [name for name in SOURCES if within(name, FORMAT)]
    code = f"import sys, {', '.join(names)}; print([m for m in ('torch', 'onnxruntime', 'safetensors') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_no_module_under_two_names() -> None:
    """A class that exists twice compares unequal to itself; it happens when a folder of the package is on sys.path."""
    for info in pkgutil.walk_packages([str(PACKAGE)], "matmorph."):
        if info.name != "matmorph.__main__":
            importlib.import_module(info.name)
    loaded = {
        name: file for name, module in sys.modules.items() if (file := getattr(module, "__file__", None)) and PACKAGE in Path(file).parents
    }
    assert set(loaded) >= set(SOURCES) - {"matmorph.__main__"}
    assert [name for name in loaded if not within(name, "matmorph")] == []
    assert [file for file, count in Counter(loaded.values()).items() if count > 1] == []


def long_ones() -> dict[str, int]:
    """Lines of the long files and functions, by module or module.function."""
    found: dict[str, int] = {}
    for name, path in SOURCES.items():
        source = path.read_text(encoding="utf-8")
        if (lines := len(source.splitlines())) >= LONG_FILE:
            found[name] = lines
        found.update({f"{name}.{function}": lines for function, lines in lines_of_functions(source).items()})
    return found


@functools.cache
def lines_of_functions(source: str) -> dict[str, int]:
    """Of the long ones."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lines = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    return {name: count for name, count in lines.items() if count >= LONG_FUNCTION}


def test_what_is_long_has_a_reason() -> None:
    """A question, not a law: is it one idea? Split by idea, or say here why it is one."""
    assert {name: lines for name, lines in long_ones().items() if not REASONS.get(name, "").strip()} == {}


def test_no_reason_for_what_is_not_long() -> None:
    assert set(REASONS) - set(long_ones()) == set()


def test_the_question_of_length_can_be_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "core.py"
    monkeypatch.setitem(SOURCES, "matmorph.ir.core", source)
    line = "    x = 1\n"
    source.write_text(f"def short():\n{line * (LONG_FUNCTION - 2)}def long():\n{line * (LONG_FUNCTION - 1)}" + "\n" * LONG_FILE)
    assert set(long_ones()) - set(REASONS) == {"matmorph.ir.core", "matmorph.ir.core.long"}
    monkeypatch.setitem(REASONS, "matmorph.ir.core", "  ")
    with pytest.raises(AssertionError):
        test_what_is_long_has_a_reason()
    monkeypatch.setitem(REASONS, "matmorph.ir.core", "a table")
    monkeypatch.setitem(REASONS, "matmorph.ir.core.long", "one walk")
    test_what_is_long_has_a_reason()
    source.write_text("")
    with pytest.raises(AssertionError):
        test_no_reason_for_what_is_not_long()


def test_no_assert_in_the_package() -> None:
    """An assert is a traceback for a user, or nothing at all under `python -O`."""
    found = [
        f"{name}:{node.lineno}"
        for name, path in SOURCES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert)
    ]
    assert found == []


def docstrings(tree: ast.Module) -> set[ast.Constant]:
    bodies = [node.body for node in ast.walk(tree) if isinstance(getattr(node, "body", None), list)]
    return {
        statement.value
        for body in bodies
        for statement in body
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str)
    }


METHODS_ROOM = "matmorph.passes.methods"
MAY_NAME_METHODS = {
    METHODS_ROOM: "the table of the methods that there are",
    f"{METHODS_ROOM}.glora": "lora is the paper's word for what one of its tensors may be",
    "matmorph.runtime.supernet": "a supernet is trained and searched without torch, which glora's own folder needs",
    "matmorph.runtime.evolution": "a supernet is trained and searched without torch, which glora's own folder needs",
}
"""Modules that name methods other than their own, and why."""


def named_methods(name: str, names: tuple[str, ...]) -> set[str]:
    """Methods that a string of the module names (a docstring apart), and that are not the one it belongs to."""
    tree = ast.parse(SOURCES[name].read_text(encoding="utf-8"))
    skipped = docstrings(tree)
    texts = [
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node not in skipped and isinstance(node.value, str)
    ]
    found = {word for text in texts for word in re.findall(r"(?<![\w.])[a-z_]+(?!\w)", text)}
    return {method for method in names if method in found and not within(name, f"{METHODS_ROOM}.{method}")}


def test_a_method_is_named_in_its_own_file_alone() -> None:
    names = tuple(method_table())
    found = {name: methods for name in SOURCES if (methods := named_methods(name, names))}
    strange = {name: methods for name, methods in found.items() if not any(allowed(name, place) for place in MAY_NAME_METHODS)}
    assert strange == {}
    assert [place for place in MAY_NAME_METHODS if not any(allowed(name, place) for name in found)] == []


def allowed(name: str, place: str) -> bool:
    """The table is one module, everything else a file or folder with what lies in it."""
    return name == place if place == METHODS_ROOM else within(name, place)


def test_the_naming_test_can_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "rewrite.py"
    source.write_text('"""About low_rank."""\n\nEXAMPLE = "rank 4 of {low_rank: {rank: 4}}"\nOTHER = "low_rankish"\n')
    monkeypatch.setitem(SOURCES, "matmorph.passes.rewriting.rewrite", source)
    assert named_methods("matmorph.passes.rewriting.rewrite", ("low_rank", "tt")) == {"low_rank"}
