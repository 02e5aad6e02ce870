"""`matmorph layout`: a written folder as another runtime wants it. Heavy imports happen inside the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from matmorph.cli.output import say
from matmorph.cli.verifying import NoVerify, verifying
from matmorph.cli.working import working
from matmorph.errors import InputError, did_you_mean


def layout_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that compile wrote from a Hugging Face folder.")],
    layout: Annotated[str, typer.Option("--for", metavar="LAYOUT", help="genai, hf (optimum) or transformers.js.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR2", help="The folder to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace DIR2 where it exists.")] = False,
    no_verify: NoVerify = False,
) -> None:
    """Write the model in DIR as another runtime wants its folder.

    onnxruntime-genai and optimum open DIR itself, too: their layouts leave out reports, check vectors and training graphs. transformers.js
    wants the model in a folder of its own and its weights under another name."""
    with working(first=f"copying {folder}"):
        from matmorph.exporters.layouts.tree import LAYOUTS, TREE, write_tree
        from matmorph.exporters.staging import refuse_existing
        from matmorph.runtime.errors import ArtifactError
        from matmorph.runtime.format.reading import StoredError
        from matmorph.runtime.manifest import open_folder

        if layout not in LAYOUTS:
            hint = did_you_mean(layout, LAYOUTS)
            raise InputError(f"--for {layout}: no such layout{hint}", [f"layouts: {', '.join(LAYOUTS)}"])
        refuse_existing(out, force, TREE)
        try:
            manifest, stored = open_folder(folder, verifying(no_verify, folder))
            names = write_tree(stored, LAYOUTS[layout], out, force, manifest.cache)
        except (ArtifactError, StoredError) as error:
            raise InputError(str(error)) from error
    say(f"wrote {out}/: {', '.join(names)}")
