"""What `mkdocs build` does beside its plugins: pages that are written by the program itself, and formulas as MathML."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Iterator
from itertools import takewhile
from typing import Any

import click
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.main import get_command

from matmorph.cli.main import app
from matmorph.passes.methods import method_table
from matmorph.runtime.targets.cpu import CPU
from matmorph.specs.load import library_names, library_text
from matmorph.specs.reference import reference_page

BENCHMARKS = "benchmarks.md"
_PRIME = re.compile(r"<msup>(<mi>[^<]*</mi>)<mi>&#x02032;</mi></msup>")  # a prime is raised by itself
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are generated."""
    pages = {"reference/spec.md": reference_page(method_table()), "reference/library.md": library_page(), "reference/cli.md": cli_page()}
    if files.get_file_from_path(BENCHMARKS) is None:
        pages[BENCHMARKS] = (
            "# Benchmarks\n\n`python benchmarks/run.py` measures everything and writes this page; it has not been run here yet.\n"
        )
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts the table of kernels where a page asks for it."""
    return text.replace("<!-- kernel costs -->", kernel_table())


def on_page_content(text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Every formula of a page as MathML; PluginError for one that cannot be read whole."""

    def formula(found: re.Match[str]) -> str:
        tag, latex = found[1], html.unescape(found[2]).strip()
        mathml = convert(latex, display="block" if tag == "div" else "inline")
        if "\\" in html.unescape(mathml):
            raise PluginError(f"{page.file.src_uri}: a command in this formula is not known: {latex}")
        mathml = mathml.replace("<mo>&#x02016;</mo>", '<mo stretchy="false">&#x02016;</mo>')  # the bars of a norm, both of one height
        mathml = _PRIME.sub(r'<mrow>\1<mo lspace="0" rspace="0">&#x02032;</mo></mrow>', mathml)
        return f'<{tag} class="formula">{mathml}</{tag}>'

    return _FORMULA.sub(formula, text)


# ---- kernels


def kernel_table() -> str:
    """The measured costs, as notes of plans have them."""
    rows = ["| kernel | 1 row | 16 rows | 256 rows |", "| --- | --- | --- | --- |"]
    for cost in CPU.costs.values():
        figures = (f"{low:g}" if low == high else f"{low:g} to {high:g}" for low, high in cost.ratios)
        rows.append(f"| {cost.kernel} | {' | '.join(figures)} |")
    return "\n".join(rows)


# ---- library specs


def library_page() -> str:
    """Every spec that comes with matmorph, with the comment that opens it."""
    parts = [
        "# Library specs\n\nThe specs that come with matmorph. `--spec NAME` uses one, `extends: [NAME]` builds on one, "
        "`matmorph specs show NAME` prints one. This page is generated from the files."
    ]
    for name in library_names():
        text = library_text(name)
        comment = [line.removeprefix("#").strip() for line in takewhile(lambda line: line.startswith("#"), text.splitlines())]
        body = "\n".join(text.splitlines()[len(comment) :])
        said = [line for line in comment if line and not line.startswith(("yaml-language-server", "matmorph "))]
        parts.append(f"## {name}\n\n{' '.join(said)}\n\n```yaml\n{body}\n```")
    return "\n\n".join(parts) + "\n"


# ---- command line

_FIRST = ("inspect", "plan", "explain", "compile", "report", "compare", "diff", "verify", "specs", "demo")


def cli_page() -> str:
    """Every command with its arguments and options."""
    root = get_command(app)
    parts = [
        "# Command line\n\nGenerated from the commands themselves. MODEL is `minilm` (the embedded encoder of the `demo` extra), a local "
        "Hugging Face folder, a `.gguf` file, `package.module:factory` (a callable that returns `matmorph.Model`), or a `.pt2` file of "
        "`torch.export.save`.\n\nExit codes: 0 done; 1 a check failed; 2 the input is wrong. `--debug` with any command shows the "
        "traceback of an error. With `--json` stdout holds JSON only."
    ]
    for words, command in _commands(root, "matmorph"):
        about = textwrap.dedent(command.help or "").strip()
        parts.append(f"## {words}\n\n{about}\n\n{_parameters(command)}")
    return "\n\n".join(parts) + "\n"


def _commands(command: Any, words: str) -> Iterator[tuple[str, click.Command]]:
    """The commands below a group that do something, those that compile first."""
    inner_of = dict(getattr(command, "commands", {}))
    for name, inner in sorted(inner_of.items(), key=lambda item: _FIRST.index(item[0]) if item[0] in _FIRST else len(_FIRST)):
        path = f"{words} {name}"
        yield from [(path, inner)] if not hasattr(inner, "commands") else _commands(inner, path)


def _parameters(command: Any) -> str:
    rows = ["| argument or option | default | meaning |", "| --- | --- | --- |"]
    for one in command.params:
        if one.name == "help":
            continue
        option = one.param_type_name == "option"
        names = ", ".join([*one.opts, *one.secondary_opts]) if option else one.metavar or one.name.upper()
        value = f" {one.metavar}" if option and one.metavar else ""
        given = one.default if one.default is not None and one.default is not False else None
        default = "required" if one.required else f"`{given}`" if given is not None and given != () else "-"
        rows.append(f"| `{names}{value}` | {default} | {' '.join((one.help or '').split()).replace('|', '&#124;')} |")
    return "\n".join(rows) if len(rows) > 2 else "It takes no arguments."
