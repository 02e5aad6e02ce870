"""The code of the documentation, read from its pages and run as a reader would: block after block, in an empty folder.

* `python`: executed; the blocks of a page share their names.
* `yaml`: a spec, loaded and held against the JSON Schema. A piece of one (keys of a rule, or of a file without `rules`) is completed first.
* `bash`: commands, one a line; `matmorph ...`, `python -m matmorph.runtime.check ...` and `python FILE.py` are known.
* `console`: commands after `$ ` and what they print, `...` standing for anything; under a line `# exit code N` they end with N.
* `text` and others are not code.

A title that is a file's name makes the block that file: a python file is imported, a spec is loaded, anything else is only written. A title
`not run by the tests: WHY` is seen by the reader too; such a block is only parsed.

As a script this is a server: it imports what the pages need once, then for every line `PAGE<tab>FOLDER` forks, runs the page there, and
answers with the exit status. What a page prints goes to FOLDER/log.txt.
"""

from __future__ import annotations

import ast
import contextlib
import io
import multiprocessing
import os
import re
import runpy
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
CODE = ("python", "yaml", "bash", "console")
NOT_RUN = "not run by the tests: "
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[a-z]*)(?P<rest>[^`\n]*)$")
_TITLE = re.compile(r'title="([^"]*)"')
_RULE_KEYS = ("match", "rewrite", "expect", "optional", "force", "pays", "untie")


@dataclass(frozen=True)
class Block:
    """A fenced block. `line`: of its first line of text, from 1."""

    page: str
    line: int
    language: str
    title: str
    text: str

    @property
    def skipped(self) -> str:
        """Why it is not run, "" where it is."""
        return self.title.removeprefix(NOT_RUN) if self.title.startswith(NOT_RUN) else ""

    @property
    def file(self) -> str:
        """The file that it is, "" where it is none."""
        return self.title if re.fullmatch(r"[\w.-]+\.\w+", self.title) else ""

    def __str__(self) -> str:
        return f"docs/{self.page}:{self.line}"


def pages() -> tuple[str, ...]:
    """The pages that people write, as paths below docs."""
    return tuple(sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")))


def read_blocks(text: str, page: str) -> tuple[Block, ...]:
    """The fenced blocks of a page in order; ValueError for a fence that is not closed."""
    found: list[Block] = []
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        opening = _FENCE.match(lines[at])
        at += 1
        if opening is None:
            continue
        end = next((k for k in range(at, len(lines)) if lines[k] == f"{opening['indent']}```"), None)
        if end is None:
            raise ValueError(f"docs/{page}:{at}: the fence is not closed")
        body = [line.removeprefix(opening["indent"]) for line in lines[at:end]]
        title = _TITLE.search(opening["rest"])
        found.append(Block(page, at + 1, opening["language"], title[1] if title else "", "\n".join(body) + "\n"))
        at = end + 1
    return tuple(found)


def parse(block: Block) -> None:
    """Raises where the text is not even code of its language."""
    if block.language == "python":
        ast.parse(block.text)
    elif block.language == "yaml":
        yaml.safe_load(block.text)
    elif block.language in ("bash", "console"):
        for command in _commands(block.text):
            if not shlex.split(command, comments=True):
                raise ValueError(f"{block}: no command: {command}")


def run_page(page: str) -> None:
    """Runs a page's blocks in the current folder. Raises what they raise."""
    import torch

    torch.manual_seed(0)
    sys.path.insert(0, os.getcwd())
    names: dict[str, Any] = {"__name__": "page"}
    for block in read_blocks((DOCS / page).read_text(encoding="utf-8"), page):
        if block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
        if block.language in CODE and not block.skipped:
            print(f"-- {block}", flush=True)
            _RUNNERS[block.language](block, names)


def _python(block: Block, names: dict[str, Any]) -> None:
    if block.file:
        import_module(Path(block.file).stem)
        return
    padded = "\n" * (block.line - 1) + block.text  # so that a traceback shows the line of the page
    exec(compile(padded, str(block), "exec"), names)


def _yaml(block: Block, _: dict[str, Any]) -> None:
    import jsonschema

    import matmorph as mm
    from matmorph.passes.methods import method_table
    from matmorph.specs.json_schema import json_schema

    path = Path(block.file or f"block-{block.line}.yaml")
    text = completed(block.text)
    path.write_text(text, encoding="utf-8")
    mm.load_spec(path)
    jsonschema.validate(yaml.load(text, Yaml12), json_schema(method_table()))


class Yaml12(yaml.SafeLoader):
    """PyYAML reads 1e-4 as text; YAML 1.2, which editors and the schema mean, as a number."""


Yaml12.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[+-]?[0-9]+(\.[0-9]*)?[eE][+-]?[0-9]+$"), list("+-0123456789"))


def completed(text: str) -> str:
    """A whole spec of what may be a piece of one."""
    keys = re.findall(r"^(\w+):", text, re.MULTILINE)
    if "version" in keys:
        return text
    if any(key in _RULE_KEYS for key in keys):
        match = "" if "match" in keys else "    match: {op: matmul}\n"
        rewrite = "" if "rewrite" in keys else "    rewrite: keep\n"
        rule = "".join(f"    {line}\n" if line else "\n" for line in text.splitlines())
        return f"version: 1\nrules:\n  - name: rule\n{match}{rewrite}{rule}"
    rules = "" if "rules" in keys or "extends" in keys or "stages" in keys else "rules: [{match: {op: matmul}, rewrite: keep}]\n"
    return f"version: 1\n{rules}{text}"


def _bash(block: Block, _: dict[str, Any]) -> None:
    for command in _commands(block.text):
        code = _run(command)
        if code:
            raise AssertionError(f"{block}: exit code {code}: {command}")


def _console(block: Block, _: dict[str, Any]) -> None:
    for said_code, command, expected in re.findall(
        r"(?:^# exit code (\d)\n)?^\$ (.*)\n((?:(?!\$ |# exit code).*\n)*)", block.text, re.MULTILINE
    ):
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = _run(command)
        if code != int(said_code or 0):
            raise AssertionError(f"{block}: exit code {code}, not {said_code or 0}: {command}\n{said.getvalue()}")
        if expected and not matches(expected, said.getvalue()):
            raise AssertionError(f"{block}: {command} printed\n{said.getvalue()}\nwhere the page says\n{expected}")


def matches(expected: str, printed: str) -> bool:
    """Whether text is as the page says: white space counts once, `...` is anything."""

    def squeezed(text: str) -> str:
        return " ".join(text.split())

    pattern = ".*".join(re.escape(part) for part in squeezed(expected).split("..."))
    return re.fullmatch(pattern, squeezed(printed), re.DOTALL) is not None


def _commands(text: str) -> list[str]:
    """The commands of a block, continued lines joined, `$ ` and comments dropped."""
    lines = text.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def _run(command: str) -> int:
    """The exit code of one command, run in this process; `> FILE` at its end is followed as a shell does."""
    words = shlex.split(command, comments=True)
    if ">" in words[:-1]:
        with Path(words[-1]).open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
            return _run(shlex.join(words[: words.index(">")]))
    known: Mapping[tuple[str, ...], Callable[[list[str]], object]] = {
        ("matmorph",): _matmorph,
        ("python", "-m", "matmorph.runtime.check"): _check,
        ("python",): lambda arguments: runpy.run_path(arguments[0], run_name="__main__"),
    }
    start = next((start for start in known if tuple(words[: len(start)]) == start), None)
    if start is None:
        raise AssertionError(f"no test can run this command: {command}")
    try:
        result = known[start](words[len(start) :])
    except SystemExit as exit_:
        result = exit_.code
    return result if isinstance(result, int) else 0


def _matmorph(arguments: list[str]) -> object:
    from matmorph.cli.main import main

    return main(arguments)


def _check(arguments: list[str]) -> object:
    from matmorph.runtime.check import main

    return main(arguments)


_RUNNERS: Mapping[str, Callable[[Block, dict[str, Any]], None]] = {"python": _python, "yaml": _yaml, "bash": _bash, "console": _console}


# ---- the server


def _work(page: str, folder: str) -> None:
    """In a process of its own."""
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        run_page(page)
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        raise SystemExit(1) from None
    print(f"-- {time.process_time():.1f} s", flush=True)


def _serve() -> None:
    for name in ("matmorph.api", "matmorph.cli.main", "matmorph.exporters.onnx.onnx_model", "onnxscript", "onnxruntime", "jsonschema"):
        import_module(name)
    from matmorph.passes.methods import method_table

    method_table()
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
    for line in sys.stdin:
        page, folder = line.rstrip("\n").split("\t")
        process = context.Process(target=_work, args=(page, folder))
        process.start()
        process.join()
        print(process.exitcode, flush=True)


if __name__ == "__main__":
    _serve()
