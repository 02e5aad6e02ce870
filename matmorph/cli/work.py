"""`matmorph work`: what a work folder holds, and an end of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from matmorph.cli.commands import Command, Group
from matmorph.cli.output import say, say_json

work_app = typer.Typer(help="Work folders: what compile --work DIR has finished.", no_args_is_help=True, cls=Group)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that compile --work wrote.")]
_WORDS = {"site": "rewritten matmuls", "price": "priced matmuls", "statistics": "calibrations", "tensor": "tensors of calibrations"}


@work_app.command(name="status", cls=Command)
def status_command(folder: Folder, as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> None:
    """Say what is finished in DIR.

    Pieces and bytes by kind, the model and the versions they belong to, and whether a run has the folder now."""
    from matmorph.passes.work.folder import status

    found = status(folder)
    if as_json:
        say_json({**found.record.to_dict(), "running": found.running, **_sizes(found)})
        return
    record = found.record
    say(f"{folder}: {record.model}, by matmorph {record.matmorph} with torch {record.torch}")
    for kind, count in found.counts.items():
        if count:
            say(f"  {_WORDS[kind]}: {count:,} ({found.bytes[kind]:,} bytes)")
    if not any(found.counts.values()):
        say("  nothing is finished yet")
    if found.running:
        say(f"  a run has it: {found.running}")


@work_app.command(name="clean", cls=Command)
def clean_command(folder: Folder) -> None:
    """Take what is finished in DIR away.

    And DIR itself where nothing else is in it. A folder that a run has stays."""
    from matmorph.passes.work.folder import clean

    found = clean(folder)
    say(f"{folder}: {sum(found.counts.values()):,} files taken away ({found.total:,} bytes)")


def _sizes(found: Any) -> dict[str, Any]:
    return {"finished": {kind: {"count": found.counts[kind], "bytes": found.bytes[kind]} for kind in found.counts}}
