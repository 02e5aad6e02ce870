"""The command line as a user meets it: what it prints where, exit codes, and what it hands to the API (a stand-in here)."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from reports import make_report
from typer.main import get_command

import matmorph
from matmorph import __version__
from matmorph.cli.completion import parts
from matmorph.cli.main import app, main
from matmorph.cli.watching import Lines
from matmorph.cli.working import working
from matmorph.errors import CheckError, InputError, MatmorphError, Position, SpecError, VerifyError
from matmorph.models.resolve import Model
from matmorph.progress import silent
from matmorph.specs.load import library_names

Run = Callable[..., "Done"]


@dataclass(frozen=True)
class Done:
    """What one command line did."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str | Path) -> Done:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return Done(int(caught.value.code or 0), said.out, said.err)

    return call


@dataclass
class StandIn:
    """An API that records its calls; `raises` is raised by compile."""

    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    raises: BaseException | None = None

    def load_spec(self, source: Any) -> Any:
        self.calls.append(("load_spec", (source,), {}))
        if source == "wrong.yaml":
            raise SpecError(
                "unknown key; did you mean rank?", at=Position("wrong.yaml", 7, 11), keypath="rules[0]" + ".x" * 100, details=["a"]
            )
        return f"loaded {source}"

    def inspect_model(self, *given: Any, **options: Any) -> Any:
        self.calls.append(("inspect_model", given, options))
        return make_report(rewritten=False)

    def plan(self, *given: Any, **options: Any) -> Any:
        self.calls.append(("plan", given, options))
        return make_report(is_plan=True)

    def explain(self, *given: Any, **options: Any) -> Any:
        self.calls.append(("explain", given, options))
        return SimpleNamespace(lines=lambda: ("owned by rule blocks", "  yes role"), to_dict=lambda: {"owner": "blocks"})

    def compile(self, *given: Any, **options: Any) -> Any:
        self.calls.append(("compile", given, options))
        if self.raises is not None:
            raise self.raises
        return SimpleNamespace(report=make_report(), save=self.save)

    def save(self, folder: Path, force: bool = False, train: bool | None = None, *, pareto: int | None = None) -> Path:
        self.calls.append(("save", (folder,), {"force": force, "train": train, "pareto": pareto}))
        return folder

    def given(self, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        [(_, arguments, options)] = [call for call in self.calls if call[0] == name]
        return arguments, options


MODEL = Model("a module", {"x": torch.ones(2, 3)}, {"x": {0: "batch"}}, calibration=["own batch"])
BOTH = Model("a module", (torch.ones(2, 3),), {"x": {0: "batch"}}, kwargs={"mask": torch.ones(2)})


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(matmorph, "api", stand_in, raising=False)
    monkeypatch.setitem(sys.modules, "matmorph.api", stand_in)  # type: ignore[arg-type]
    monkeypatch.setattr("matmorph.spec.load_spec", lambda source: stand_in.load_spec(source))
    monkeypatch.setattr("matmorph.models.resolve.resolve", lambda name, cache=True, **_: MODEL)
    return stand_in


# ---- before any command


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, matmorph.cli.main; print([name for name in ('torch', 'numpy', 'onnxruntime', 'rich.table') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_help_and_version(run: Run) -> None:
    done = run("--help")
    assert (done.code, done.err) == (0, "")
    assert all(f"\n  {name} " in done.out for name in ("inspect", "plan", "explain", "compile", "verify", "specs", "demo"))
    assert "..." not in done.out.split("Commands:")[1], "a one-line help was cut"
    assert run("--version") == Done(0, f"matmorph {__version__}\n", "")


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "matmorph", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"matmorph {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["compil"], "No such command 'compil'. Did you mean 'compile', "),
        (["plan", "minilm"], "Missing option '--spec'"),
        (["plan", "minilm", "--sepc", "x"], "--spec"),
        (["compile", "minilm", "--spec", "x", "--out", "o", "--pareto", "many"], "Invalid value for '--pareto'"),
    ],
)
def test_usage_errors_end_with_2(run: Run, arguments: list[str], expected: str) -> None:
    done = run(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert expected in done.err


# ---- what reaches the API


@pytest.mark.parametrize("command", ["inspect", "plan", "explain", "compile"])
def test_keyword_arguments_beside_positional_ones_reach_the_api(
    run: Run, api: StandIn, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("matmorph.models.resolve.resolve", lambda name, cache=True, **_: BOTH)
    more = {"inspect": [], "explain": ["--spec", "s", "--node", "n"], "plan": ["--spec", "s"]}
    done = run(command, "minilm", *more.get(command, ["--spec", "s", "--out", str(tmp_path / "out")]))
    assert done.code == 0
    given, options = api.given("inspect_model" if command == "inspect" else command)
    assert BOTH.example_inputs in given
    assert options["kwargs"] is BOTH.kwargs


def test_inspect(run: Run, api: StandIn) -> None:
    done = run("inspect", "minilm")
    assert (done.code, done.err) == (0, "")
    assert "attention.q" in done.out
    assert api.given("inspect_model")[0] == ("a module", MODEL.example_inputs, MODEL.dynamic_shapes)
    assert api.given("inspect_model")[1] == {"kwargs": None, "cache": False, "weights": None}
    assert "encoder.layer.5.output.dense" in run("inspect", "minilm", "--all").out


def test_plan_and_json(run: Run, api: StandIn) -> None:
    assert "would rewrite 36 of 37 sites" in run("plan", "minilm", "--spec", "low-rank-60").out
    assert api.given("plan")[0][1] == "loaded low-rank-60"
    done = run("plan", "minilm", "--spec", "low-rank-60", "--json")
    assert done.err == ""
    assert json.loads(done.out) == json.loads(json.dumps(make_report(is_plan=True).to_dict()))


def test_explain(run: Run, api: StandIn) -> None:
    done = run("explain", "minilm", "--spec", "s.yaml", "--node", "a.b")
    assert done == Done(0, "owned by rule blocks\n  yes role\n", "")
    assert api.given("explain")[0][-1] == "a.b"
    assert json.loads(run("explain", "minilm", "--spec", "s.yaml", "--node", "a.b", "--json").out) == {"owner": "blocks"}


def test_compile_prints_table_parity_and_folder(run: Run, api: StandIn, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("compile", "minilm", "--spec", "low-rank-60", "--out", out)
    assert (done.code, done.err) == (0, "")
    assert "rewrote 36 of 37 sites" in done.out
    assert "ONNX Runtime agrees with torch to 2.4e-07 on 3 batches (CPUExecutionProvider)" in done.out
    assert f"wrote {out}/ (check it anywhere with: matmorph verify {out})" in done.out
    _, options = api.given("compile")
    assert options["calibration"] == ["own batch"]
    assert api.given("save") == ((out,), {"force": False, "train": None, "pareto": None})


def test_compile_json_is_the_report_alone(run: Run, api: StandIn, tmp_path: Path) -> None:
    done = run("compile", "minilm", "--spec", "s.yaml", "--out", tmp_path / "out", "--json")
    assert done.err == ""
    assert json.loads(done.out) == json.loads(json.dumps(make_report().to_dict()))
    assert isinstance(api.given("compile")[1]["progress"], Lines)


def test_calibration_file_replaces_the_models_own(run: Run, api: StandIn, tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", x=np.ones((5, 3), dtype=np.float32))
    run("compile", "m", "--spec", "s.yaml", "--out", tmp_path / "out", "--calibration", tmp_path / "c.npz")
    [batch] = api.given("compile")[1]["calibration"]
    assert torch.equal(batch["x"], torch.ones(5, 3))


# ---- refusals before any work


def test_a_front_needs_a_budget(run: Run, api: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matmorph.passes.methods import method_table
    from matmorph.specs.load import load_spec

    monkeypatch.setattr(api, "load_spec", lambda source: load_spec(source, method_table()))
    done = run("compile", "minilm", "--spec", "low-rank-60", "--out", tmp_path / "out", "--pareto", "3")
    assert (done.code, done.out) == (2, "")
    assert "budget" in done.err
    assert api.calls == []


def test_training_graphs_need_the_specs_word(run: Run, api: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "load_spec", lambda source: SimpleNamespace(train=None))
    done = run("compile", "minilm", "--spec", "s.yaml", "--out", tmp_path / "out", "--train")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("--train: s.yaml says nothing of training\n  add to it")
    assert api.calls == []


@pytest.mark.parametrize(("option", "given"), [((), None), (("--train",), True), (("--no-train",), False)])
def test_whether_training_graphs_are_written(
    run: Run, api: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: tuple[str, ...], given: bool | None
) -> None:
    monkeypatch.setattr(api, "load_spec", lambda source: SimpleNamespace(train="as the spec says"))
    assert run("compile", "minilm", "--spec", "s.yaml", "--out", tmp_path / "out", *option).code == 0
    assert api.given("save") == ((tmp_path / "out",), {"force": False, "train": given, "pareto": None})


def test_an_existing_folder_needs_force(run: Run, api: StandIn, tmp_path: Path) -> None:
    done = run("compile", "minilm", "--spec", "s.yaml", "--out", tmp_path)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"{tmp_path}: the folder exists\n")
    assert "--force" in done.err
    assert api.calls == []
    assert run("compile", "minilm", "--spec", "s.yaml", "--out", tmp_path, "--force").code == 0
    assert api.given("save")[1] == {"force": True, "train": None, "pareto": None}


def test_a_file_in_the_way_is_never_replaced(run: Run, api: StandIn, tmp_path: Path) -> None:
    file = tmp_path / "out"
    file.write_text("mine")
    done = run("compile", "minilm", "--spec", "s.yaml", "--out", file, "--force")
    assert done == Done(2, "", f"{file} exists and is not a folder\n")
    assert file.read_text() == "mine"


def test_the_spec_is_read_before_the_model(run: Run, api: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matmorph.models.resolve.resolve", lambda name, cache=True, **_: pytest.fail("the model was loaded"))
    done = run("plan", "minilm", "--spec", "wrong.yaml")
    assert done.code == 2
    first, second = done.err.splitlines()
    assert first.startswith("wrong.yaml:7:11: rules[0].x.x")
    assert first.endswith(": unknown key; did you mean rank?")
    assert second == "  a"
    assert "\x1b" not in done.err


# ---- errors


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("m: no such model"), 2, "m: no such model"),
        (CheckError("outputs differ by 0.5"), 1, "outputs differ by 0.5"),
        (VerifyError("value bound twice"), 1, "internal error (a bug in matmorph, not in your input): value bound twice"),
        (RuntimeError("odd\nstate"), 1, "internal error (a bug in matmorph, not in your input): RuntimeError: odd state"),
        (OSError(errno.ENOSPC, "No space left on device", "out/model.onnx"), 2, "out/model.onnx: No space left on device"),
    ],
)
def test_errors_are_plain_lines(run: Run, api: StandIn, tmp_path: Path, error: Exception, code: int, line: str) -> None:
    api.raises = error
    done = run("compile", "minilm", "--spec", "s.yaml", "--out", tmp_path / "out")
    assert (done.code, done.out) == (code, "")
    assert done.err.splitlines()[0] == line
    assert "Traceback" not in done.err


def test_debug_anywhere_shows_the_traceback_too(run: Run, api: StandIn, tmp_path: Path) -> None:
    api.raises = InputError("m: no such model")
    for arguments in (["--debug", "compile"], ["compile", "--debug"]):
        done = run(*arguments, "minilm", "--spec", "s.yaml", "--out", tmp_path / "out")
        assert done.code == 2
        assert "Traceback" in done.err
        assert done.err.splitlines()[-1] == "m: no such model"


def test_an_interrupt_is_one_line(run: Run, api: StandIn, tmp_path: Path) -> None:
    api.raises = KeyboardInterrupt()
    done = run("compile", "minilm", "--spec", "s.yaml", "--out", tmp_path / "out")
    assert done == Done(130, "", "interrupted; nothing is half-written\n")


def test_code_of_the_model_does_not_end_the_program(run: Run, api: StandIn, tmp_path: Path) -> None:
    api.raises = SystemExit(0)
    done = run("compile", "minilm", "--spec", "s.yaml", "--out", tmp_path / "out")
    assert (done.code, done.out) == (2, "")
    first, second = done.err.splitlines()
    assert first == "code of the model or its data ended the program: SystemExit(0)"
    assert "raise self.raises" in second


CHATTY = """
import os, sys
import torch
import matmorph as mm

print("on import")

class Loud(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module("a\\x1b[31mb", torch.nn.Linear(4, 4))

    def forward(self, x):
        print("in forward")
        return next(self.children())(x)

def make():
    print("in the factory")
    os.system("echo by the system")
    return mm.Model(Loud(), (torch.ones(2, 4),))
"""


def test_what_a_model_prints_is_kept_out_of_the_results(tmp_path: Path) -> None:
    """And what is in its names out of the terminal's hands."""
    (tmp_path / "chatty.py").write_text(CHATTY)
    command = [sys.executable, "-m", "matmorph", "inspect", "chatty:make"]
    plain, as_json = (
        subprocess.run([*command, *more], capture_output=True, text=True, cwd=tmp_path, check=True) for more in ([], ["--json"])
    )
    assert json.loads(as_json.stdout)["sites"][0]["path"] == "a\x1b[31mb"
    assert all(words in as_json.stderr for words in ("on import", "in the factory", "by the system", "in forward"))
    assert "a\\x1b[31mb" in plain.stdout
    assert "\x1b" not in plain.stdout


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m matmorph specs schema | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr


# ---- progress


def test_progress_is_drawn_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with working() as show:
        assert show is silent
    monkeypatch.setenv("FORCE_COLOR", "1")
    with working(quiet=True) as show:
        assert isinstance(show, Lines)
    with working(first="loading a model") as show:
        show("calibrate", 0, None)
        show("calibrate", 3, 7)
    said = capsys.readouterr()
    assert said.out == ""
    assert "3/7" in said.err
    assert "loading a model" in said.err


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "minilm"],
        ["plan", "minilm", "--spec", "s"],
        ["explain", "minilm", "--spec", "s", "--node", "n"],
        ["compile", "minilm", "--spec", "s", "--out", "out"],
    ],
    ids=lambda words: words[0],
)
def test_a_command_says_what_it_does_from_its_first_moment(
    words: list[str], run: Run, api: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before the model is loaded, let alone traced."""
    monkeypatch.chdir(tmp_path)
    plain = run(*words)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("matmorph.models.resolve.resolve", lambda name, cache=True, **_: (sys.stderr.write("<resolving>\n"), MODEL)[1])
    drawn = run(*words, *(["--force"] if words[0] == "compile" else []))
    assert drawn.code == 0
    assert "loading minilm" in drawn.err.split("<resolving>")[0]
    assert "loading" not in drawn.out + plain.out
    assert plain.err == ""


# ---- specs


def test_specs_list_has_a_line_for_every_library_spec(run: Run) -> None:
    done = run("specs", "list")
    usual, other = done.out.split("\nfor the models that they name")
    names = [line.split()[0] for line in (*usual.splitlines(), *other.splitlines()[1:-2])]
    assert sorted(names) == sorted(library_names())
    assert len(names) == len(set(names))
    assert re.search(r"^tt-lora-roberta +TT-LoRA with the authors' settings for RoBERTa-base$", other, re.MULTILINE)
    assert re.search(r"^low-rank-60 +Low-rank factors .*, keeping 60 % of their parameters$", usual, re.MULTILINE)
    assert "..." not in done.out


def test_specs_list_long_says_what_each_makes_of_minilm(run: Run) -> None:
    done = run("specs", "list", "--long")
    names = [line for line in done.out.splitlines() if not line.startswith(" ")]
    assert sorted(names) == sorted(library_names())
    assert "MiniLM: does not fit (shape [12," in done.out
    assert max(map(len, done.out.splitlines())) < 80


def test_specs_show_prints_the_file(run: Run) -> None:
    done = run("specs", "show", "low-rank-60")
    assert done.code == 0
    assert re.search(r"^name: low-rank-60$", done.out, re.MULTILINE)
    wrong = run("specs", "show", "low-rank-6")
    assert (wrong.code, wrong.out) == (2, "")
    assert "did you mean low-rank-60?" in wrong.err


def test_specs_schema_is_json(run: Run, tmp_path: Path) -> None:
    done = run("specs", "schema")
    assert "rules" in json.loads(done.out)["properties"]
    out = tmp_path / "schema.json"
    assert run("specs", "schema", "--out", out) == Done(0, f"wrote {out}\n", "")
    assert out.read_bytes().decode("utf-8") == done.out
    again = run("specs", "schema", "--out", out)
    assert (again.code, again.out) == (2, "")
    assert again.err.startswith(f"{out}: the file exists")
    assert run("specs", "schema", "--out", out, "--force").code == 0


# ---- help and completion


def leaves() -> list[tuple[str, ...]]:
    """The words of every command."""

    def below(command: Any, words: tuple[str, ...]) -> list[tuple[str, ...]]:
        children = getattr(command, "commands", {})
        return [leaf for name, child in children.items() for leaf in below(child, (*words, name))] or [words]

    return below(get_command(app), ())


@pytest.mark.parametrize("words", leaves(), ids=" ".join)
def test_the_help_of_a_command_is_for_people(words: tuple[str, ...], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = run(*words, "--help")
    assert (done.code, done.err) == (0, "")
    usage = done.out.splitlines()[0]
    assert re.fullmatch(rf"Usage: matmorph {' '.join(words)}( [A-Z][A-Z0-9.]*| --[a-z-]+ [A-Z0-9]+)* \[OPTIONS\]", usage)
    assert re.search(r"^  --debug +Show Python's traceback", done.out, re.MULTILINE)
    assert not re.search(r"<(str|path|int|float|text)>|INTEGER|\bTEXT\b|\.\.\.$", done.out, re.MULTILINE)
    assert max(map(len, done.out.splitlines())) <= 80
    for line in done.out.splitlines():
        assert not re.match(r"^  -.*\S  $", line), "an option without a word about it"


@pytest.mark.parametrize("group", [(), ("specs",), ("adapter",)])
def test_a_group_lists_its_commands_whole(group: tuple[str, ...], run: Run) -> None:
    done = run(*group, "--help")
    listed = done.out.split("Commands:\n")[1].split("\n\n")[0]
    assert "..." not in listed
    assert "--debug" in done.out
    names = [line.split()[0] for line in listed.splitlines() if re.match(r"  \S", line)]
    assert set(names) == {words[len(group)] for words in leaves() if words[: len(group)] == group}


def complete(script: str, *words: str) -> list[str]:
    """What bash offers for the last word."""
    line = " ".join(f"'{word}'" for word in words)
    end = f'COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; COMPREPLY=(); _matmorph; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", f"{script}\n{end}"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_and_values(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = run("completion", "bash").out
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loud.yaml").touch()
    assert set(complete(script, "matmorph", "")) == {words[0] for words in leaves()}
    assert set(complete(script, "matmorph", "comp")) == {"compare", "compile", "completion"}
    assert set(complete(script, "matmorph", "specs", "")) == {"list", "show", "check", "schema"}
    assert set(complete(script, "matmorph", "compile", "minilm", "--spec", "lo")) == {"loftq-nf4", "loftq-u2", "loftq-u4", "lora-r8",
        "low-rank-40", "low-rank-60", "low-rank-60-plain", "low-rank-80", "loud.yaml"}  # fmt: skip
    assert complete(script, "matmorph", "train", "dir", "--schedule", "cons") == ["constant"]
    assert complete(script, "matmorph", "adapter", "to-peft", "dir", "--fo") == ["--force"]
    assert complete(script, "matmorph", "plan", "mini") == ["minilm"]
    assert set(complete(script, "matmorph", "completion", "")) == {"bash", "zsh", "fish"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_option_of_every_command_can_be_completed(shell: str, run: Run) -> None:
    script = run("completion", shell).out
    root: Any = get_command(app)
    found = {part.path: part for part in parts(root, "matmorph")}
    assert {("matmorph", *words) for words in leaves()} <= {tuple(path.split()) for path in found}
    options = {name for part in found.values() for names in part.options for name in names}
    assert {"--spec", "--out", "--force", "--json", "--debug", "--no-train"} <= options
    shown = {name.lstrip("-") for name in options}
    assert all(re.search(rf"(-l |-s |-){re.escape(name)}\b", script) for name in shown)


def test_an_unknown_shell(run: Run) -> None:
    assert run("completion", "bosh") == Done(2, "", "bosh: there are scripts for bash, zsh, fish; did you mean bash?\n")


# ---- the README


README = Path(__file__).parent.parent / "README.md"


FINE_TUNE = README.parent / "docs" / "how-to" / "fine-tune.md"


@pytest.mark.parametrize(("name", "page"), [("low_rank_mlp", README), ("lora_mlp", FINE_TUNE)])
def test_pages_show_the_examples_as_they_are(name: str, page: Path) -> None:
    example = (README.parent / "examples" / f"{name}.py").read_text().split('"""', 2)[2].strip()
    assert f"```python\n{example}\n```" in page.read_text()
    assert len(example.splitlines()) <= 24


def test_readme_is_short() -> None:
    """What, why, two commands, one example in Python and one spec, figures, limits; everything else has a page."""
    assert len(README.read_text().split()) <= 1200
    assert README.read_text().count("```python") == 1


def test_readme_spec_is_right(tmp_path: Path) -> None:
    from matmorph.passes.methods import method_table
    from matmorph.specs.load import load_spec

    (text,) = re.findall(r"```yaml\n(.*?)```", README.read_text(), re.DOTALL)
    file = tmp_path / "spec.yaml"
    file.write_text(text)
    assert len(load_spec(file, method_table()).stages[0].rules) == 3


def test_readme_error_is_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matmorph.passes.methods import method_table
    from matmorph.specs.load import load_spec

    text = README.read_text()
    first = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    Path("spec.yaml").write_text(first.replace("multiple_of: 8", "rnak: 8"))
    with pytest.raises(MatmorphError) as caught:
        load_spec("spec.yaml", method_table())
    assert f"`{caught.value.headline()}`" in text
