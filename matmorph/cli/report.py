"""`matmorph report`, `matmorph compare` and `matmorph diff`: written folders looked at. Heavy imports happen inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from matmorph.cli.output import refuse_file, say, say_json, write_file
from matmorph.cli.verifying import NoVerify, verifying
from matmorph.cli.working import working
from matmorph.errors import InputError

if TYPE_CHECKING:
    from matmorph.report.comparing import ComparedModel

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that compile wrote.")]
Force = Annotated[bool, typer.Option("--force", help="Replace FILE where it exists.")]
Open = Annotated[bool, typer.Option("--open", help="Show the page in the browser.")]
_STYLES = {"-": "red", "+": "green"}


def report_command(
    folder: Folder,
    show: Open = False,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the page there and leave DIR as it is.")] = None,
    force: Force = False,
    no_verify: NoVerify = False,
) -> None:
    """Draw report.html of DIR anew, with the times of run.json.

    The manifest of DIR gets the new page's hash, so that `matmorph verify` still holds."""
    if out is not None:
        refuse_file(out, force)
    with working(first=f"reading {folder}"):
        from matmorph.exporters.artifact import rewrite_page
        from matmorph.report.html import html_page
        from matmorph.report.reading import read_folder
        from matmorph.runtime.format.artifact import PAGE

        page = html_page(*read_folder(folder, verifying(no_verify, folder)))
    if out is None:
        rewrite_page(folder, page)
    else:
        write_file(out, page.encode(), force)
    _say(out or folder / PAGE, show)


def compare_command(
    left: Annotated[Path, typer.Argument(metavar="DIR1", help="A folder that compile wrote.")],
    right: Annotated[Path, typer.Argument(metavar="DIR2", help="Another one.")],
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the comparison as a page too.")] = None,
    show: Open = False,
    every: Annotated[bool, typer.Option("--all", help="List every matmul, also those treated alike.")] = False,
    force: Force = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
    no_verify: NoVerify = False,
) -> None:
    """Two folders side by side: totals, and the matmuls that differ."""
    if show and html is None:
        raise InputError("--open shows the page that --html FILE writes: give --html too")
    if html is not None:
        refuse_file(html, force)
    with working(as_json, f"reading {left} and {right}"):
        from matmorph.report.comparing import comparison, comparison_page, print_comparison
        from matmorph.report.table import make_console

        verify = verifying(no_verify, left, right)
        first, second = _side(left, verify), _side(right, verify)
    if html is not None:
        write_file(html, comparison_page(first, second).encode(), force)
    if as_json:
        say_json(comparison(first, second))
        return
    print_comparison(make_console(), first, second, every)
    if html is not None:
        _say(html, show)


def diff_command(
    folder: Folder,
    node: Annotated[str | None, typer.Option("--node", metavar="PATH", help="A matmul or module, as in report.html.")] = None,
    around: Annotated[int, typer.Option("--around", metavar="N", min=0, help="Steps of neighbours to show.")] = 1,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Draw it too.")] = None,
    force: Force = False,
    no_verify: NoVerify = False,
) -> None:
    """Show the graph around one matmul before and after.

    Without --node: how many nodes came and went, and which matmuls changed."""
    if node is None and svg is not None:
        raise InputError("--svg draws the graph around one matmul: name it with --node PATH")
    if svg is not None:
        refuse_file(svg, force)
    with working(first=f"reading {folder}"):
        from matmorph.report.diff import changed_sites, difference, lines, read_graphs, summary
        from matmorph.report.diff_svg import difference_svg
        from matmorph.report.table import make_console

        source, graph = read_graphs(folder, verifying(no_verify, folder))
    console = make_console()
    if node is None:
        for line in (*summary(source, graph), *changed_sites(source, graph)):
            console.print(line, soft_wrap=True)
        return
    found = difference(source, graph, node, around)
    for line in lines(found):
        console.print(line, style=_STYLES.get(line[0]), soft_wrap=True)
    if svg is not None:
        write_file(svg, difference_svg(found).encode(), force)
        say(f"wrote {svg}")


# ---- shared by the commands


def _side(folder: Path, verify: bool) -> ComparedModel:
    from matmorph.report.comparing import ComparedModel
    from matmorph.report.reading import read_folder

    return ComparedModel(str(folder), *read_folder(folder, verify))


def _say(page: Path, show: bool) -> None:
    import webbrowser

    opened = show and webbrowser.open(page.resolve().as_uri())
    say(f"wrote {page}{' (no browser could be opened here)' if show and not opened else ''}")
