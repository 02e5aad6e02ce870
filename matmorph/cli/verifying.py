"""`--no-verify`, which every command has that reads a folder and holds its files against the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from matmorph.cli.output import complain

NoVerify = Annotated[bool, typer.Option("--no-verify", help="Read files of a folder without checking their sizes and hashes.")]


def verifying(skipped: bool, *folders: Path) -> bool:
    """Whether files are checked; where they are not, a line on stderr says so."""
    if skipped:
        complain(f"not checked (--no-verify): sizes and hashes in {', '.join(map(str, folders))}")
    return not skipped
