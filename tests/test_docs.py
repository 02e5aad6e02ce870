"""The documentation: every block of code on every page is run, every word of the spec language has its place, no link is dead."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from pages import CODE, DOCS, ROOT, Block, completed, matches, pages, parse, read_blocks

from matmorph.errors import SpecError
from matmorph.passes.methods import method_table
from matmorph.specs.document import document_record
from matmorph.specs.json_schema import json_schema
from matmorph.specs.kinds import Kind, ListOf
from matmorph.specs.load import load_spec
from matmorph.specs.reference import reference_page
from matmorph.specs.typed import OneOf, Record

pytestmark = pytest.mark.no_cover
"""The pages run in processes of their own, and what they run is covered by the tests of its parts."""

PAGES = {page: read_blocks((DOCS / page).read_text(encoding="utf-8"), page) for page in pages()}
BLOCKS = [block for blocks in PAGES.values() for block in blocks]
RUN = [page for page, blocks in PAGES.items() if any(block.language in CODE and not block.skipped for block in blocks)]
SLOW = ("how-to/evaluate.md", "how-to/generate-text.md", "how-to/deploy-a-language-model.md", "how-to/heal-a-language-model.md")
"""Pages that compile several models, whose commands have tests of their own: run with the full grids."""
OTHER = ("text", "toml", "javascript")
GENERATED = ("reference/spec.md", "reference/library.md", "reference/cli.md", "benchmarks.md")
"""By docs/hooks.py; the last one by benchmarks/run.py, once that was run."""
Runner = Callable[[str, Path], int]


@pytest.fixture(scope="module")
def run() -> Iterator[Runner]:
    """Runs a page in a folder: its exit status."""
    environment = {**os.environ, "COLUMNS": "120", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("pages.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        asked, answers = server.stdin, server.stdout

        def ask(page: str, folder: Path) -> int:
            asked.write(f"{page}\t{folder}\n")
            asked.flush()
            return int(answers.readline())

        yield ask
        asked.close()


# ---- the code


@pytest.mark.parametrize("page", [pytest.param(page, marks=[pytest.mark.full] if page in SLOW else []) for page in RUN])
def test_page_runs(page: str, run: Runner, tmp_path: Path) -> None:
    code = run(page, tmp_path)
    assert code == 0, (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block_is_of_a_known_language_and_parses(block: Block) -> None:
    assert block.language in (*CODE, *OTHER)
    if not block.file.endswith((".toml", ".txt")):
        parse(block)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.skipped or block.title.startswith("not run")], ids=str)
def test_a_block_that_is_not_run_says_why(block: Block) -> None:
    assert re.search(r"\b(GPU|installs|another runtime|wrong on purpose)\b", block.skipped), block.title


def test_most_code_is_run() -> None:
    code = [block for block in BLOCKS if block.language in CODE]
    assert len([block for block in code if block.skipped]) <= 7
    assert len(code) >= 80
    assert {block.language for block in code if not block.skipped} == set(CODE)


# ---- the reader of pages


def test_blocks_are_read_with_their_lines() -> None:
    text = 'A\n\n```python title="a.py"\nx = 1\n```\n\n* item\n\n    ```bash\n    ls\n    ```\n```text\n```\n'
    first, second, third = read_blocks(text, "p.md")
    assert (first.line, first.language, first.file, first.text, first.skipped) == (4, "python", "a.py", "x = 1\n", "")
    assert (second.line, second.language, second.text) == (10, "bash", "ls\n")
    assert (third.language, third.text) == ("text", "\n")
    assert str(first) == "docs/p.md:4"
    with pytest.raises(ValueError, match=r"docs/p.md:1: the fence is not closed"):
        read_blocks("```python\nx\n", "p.md")


def test_a_title_that_says_why_is_no_file() -> None:
    block = Block("p.md", 1, "python", "not run by the tests: it needs a GPU", "x\n")
    assert (block.file, block.skipped) == ("", "it needs a GPU")


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("a  b\nc", "a b\n   c\n", True),
        ("a ... c", "a b\nb c", True),
        ("...", "", True),
        ("a", "a b", False),
        ("a ... c", "a b", False),
        ("a.c", "abc", False),
    ],
)
def test_printed_text_is_compared(expected: str, printed: str, same: bool) -> None:
    assert matches(expected, printed) is same


@pytest.mark.parametrize(
    "text",
    [
        "match: {role: mlp.fc1}\n",
        "rewrite:\n  low_rank: {rank: 4}\n",
        "tolerance: {weight_error: 0.5}\n",
        "extends: [low-rank-60]\n",
        "version: 1\nrules: [{match: {op: linear}, rewrite: keep}]\n",
    ],
)
def test_pieces_of_specs_are_completed(text: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(completed(text))
    assert load_spec(path, method_table()).rules


def test_a_wrong_piece_stays_wrong(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(completed("rewrite: {low_rank: {rnak: 4}}\n"))
    with pytest.raises(SpecError, match="did you mean rank"):
        load_spec(path, method_table())


@pytest.mark.parametrize("page", ["index.md"])
def test_a_failing_page_fails(page: str, run: Runner, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()  # the page saves there, without force
    assert run(page, tmp_path) == 1
    assert "docs/index.md" in (tmp_path / "log.txt").read_text()


# ---- the reference


def _fields(record: Record) -> Iterator[tuple[str, str]]:
    """(key, doc) of a mapping and of those inside it, written apart from `specs.reference`."""
    for field in record.fields():
        yield field.key, field.doc
        for kind in _leaves(field.kind):
            if isinstance(kind, Record):
                yield from _fields(kind)


def _leaves(kind: Kind) -> Iterator[Kind]:
    if isinstance(kind, ListOf):
        yield from _leaves(kind.item)
    elif isinstance(kind, OneOf):
        for one in kind.kinds:
            yield from _leaves(one)
    else:
        yield kind


def _plain(text: str) -> str:
    """What a reader sees: character references resolved, white space once."""
    return " ".join(re.sub(r"&#(\d+);", lambda found: chr(int(found[1])), text).split())


def test_the_reference_names_every_key_with_its_meaning() -> None:
    methods = method_table()
    page = _plain(reference_page(methods))
    records = [document_record(methods, {}, []), *(Record(method.Spec) for method in methods.values())]
    found = {pair for record in records for pair in _fields(record)}
    assert len(found) > 90
    for key, doc in found:
        assert f"| `{key}` |" in page, key
        assert doc, f"{key} has no doc"
        assert _plain(doc) in page, doc
    for key, schema in json_schema(methods)["$defs"]["match"]["properties"].items():
        assert f"| `{key}` |" in page
        assert _plain(schema["description"]) in page


def test_the_reference_gives_types_defaults_and_places() -> None:
    page = reference_page(method_table())
    assert "| `opset` | an integer &#62;= 18 and &#60;= 23 |" in page
    assert "| `rank` | an integer &#62;= 1, {energy: e}, {ratio: r}, {error: e} or auto ([notation](#notations)) | required |" in page
    assert "Stands at: `tolerance`, `stages[].tolerance`." in page
    assert "Stands at: `rewrite.tt.modes`." in page
    assert "| `optimizer` | [mapping](#optimizer) | `{adamw: {lr: 0.0001," in page
    assert "| `calibration` | [mapping](#calibration) | its defaults |" in page


def test_the_tables_of_the_reference_are_tables() -> None:
    rows = [line for line in reference_page(method_table()).splitlines() if line.startswith("|")]
    widths = {line.replace("\\|", "").count("|") for line in rows}
    assert widths == {4, 5}  # three or four columns, and no bar inside a cell


def test_links_within_the_reference_lead_to_headings() -> None:
    page = reference_page(method_table())
    anchors = {re.sub(r"[^\w]+", "-", title.lower()) for title in re.findall(r"^#+ (.*)$", page, re.MULTILINE)}
    links = set(re.findall(r"\]\(#([^)]*)\)", page))
    assert links
    assert links <= anchors


# ---- the site


def _nav(entry: object) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    elif isinstance(entry, list):
        for item in entry:
            yield from _nav(item)
    elif isinstance(entry, dict):
        yield from _nav(list(entry.values()))


def _config() -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    return found


def test_every_page_is_in_the_navigation_once() -> None:
    listed = list(_nav(_config()["nav"]))
    assert sorted(listed) == sorted({*pages(), *GENERATED})


def test_every_method_has_a_page_and_a_row() -> None:
    overview = (DOCS / "methods/index.md").read_text(encoding="utf-8")
    for name, method in method_table().items():
        page = (DOCS / f"methods/{name}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {name}\n")
        assert f"Kind: {method.kind}." in page
        assert f"../reference/spec.md#{name}" in page
        assert f"({name}.md) | {method.kind} |" in overview


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert "://" not in target, f"{target}: the pages stand alone"
        path = os.path.normpath(os.path.join(os.path.dirname(page), target))
        assert (DOCS / path).is_file() or path in GENERATED, target


def test_the_site_loads_nothing_from_elsewhere() -> None:
    config = _config()
    assert config["theme"]["font"] is False  # type: ignore[index]
    assert "extra_javascript" not in config
    for page in pages():
        assert not re.search(r"<(script|iframe|img|link)\b", (DOCS / page).read_text(encoding="utf-8")), page


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_docs_installs_what_it_needs_and_builds_strictly() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(["make", "-n", "docs"], capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    steps = done.stdout.splitlines()
    install = next(number for number, line in enumerate(steps) if line.endswith("-c constraints.txt -e '.[docs]'"))
    build = next(number for number, line in enumerate(steps) if "mkdocs build --strict" in line)
    assert install < build


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("mkdocstrings") is None, reason="make docs installs what builds the site")
def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "site/methods/low_rank.html").read_text(encoding="utf-8")
    assert "<math" in text
    assert "arithmatex" not in text
    assert not re.findall(r'(?:src|href)="https?://(?!squidfunk)', text)
