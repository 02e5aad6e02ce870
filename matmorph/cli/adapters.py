"""`matmorph merge` and `matmorph adapter`: what becomes of adapters after training. Heavy imports happen inside the commands.

DIR is a folder with training graphs (`compile --train`): it keeps the graph, the base's weights and where the adapters started. TRAINED is
what training gave: a .safetensors file of `matmorph train`, a checkpoint, an .onnx_adapter file or a PEFT folder.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from matmorph.cli.commands import Command, Group
from matmorph.cli.output import refuse_file, say, say_json, write_file
from matmorph.cli.verifying import NoVerify, verifying
from matmorph.cli.working import step, working
from matmorph.errors import InputError
from matmorph.runtime.targets import target_names

if TYPE_CHECKING:
    from matmorph.folders.job import Job
    from matmorph.ir.adapter import Adapter
    from matmorph.passes.adapters.merging import Merged

adapter_app = typer.Typer(help="Adapters in files of ONNX Runtime and PEFT, or merged.", no_args_is_help=True, cls=Group)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder with training graphs (compile --train).")]
Trained = Annotated[
    Path | None, typer.Option("--trained", metavar="FILE", help="Trained values: .safetensors, checkpoint, .onnx_adapter or a PEFT folder.")
]
Out = Annotated[Path, typer.Option("--out", metavar="PATH", help="What to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace it where it exists.")]
Prefix = Annotated[str, typer.Option("--prefix", metavar="PREFIX", help="Leading part of our paths that PEFT's model does not have.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def merge_command(
    folder: Folder,
    out: Out,
    trained: Trained = None,
    configuration: Annotated[
        Path | None, typer.Option("--configuration", metavar="FILE", help="Of a supernet: what `matmorph search` found (search.json).")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    no_verify: NoVerify = False,
) -> None:
    """Merge the adapters of DIR into its weights and write a plain model.

    A dense weight takes them in exactly, a quantised one is quantised anew; the error of each is listed. The result is checked as compile
    checks it."""
    from matmorph.exporters.staging import refuse_existing

    refuse_existing(out, force)
    chosen = None if configuration is None else read_configuration(configuration)
    with working(as_json, f"opening {folder}") as show:
        from matmorph.folders.after_training import merged_job
        from matmorph.folders.save import save

        job, adapters, values = _opened(folder, trained, verifying(no_verify, folder))
        with step(show, "merging"):
            merged, found = merged_job(job, adapters, values or None, chosen)
        report = save(out, merged, force, show)
    if as_json:
        parity = None if report.parity is None else asdict(report.parity)
        say_json({"folder": str(out), "sites": [asdict(line) for line in found], "parity": parity})
        return
    _print_merged(found)
    say(f"wrote {out}/ (check it anywhere with: matmorph verify {out})")


adapter_app.command(name="merge", cls=Command, short_help="Merge the adapters of DIR into its weights.")(merge_command)


@adapter_app.command(name="save", cls=Command, short_help="Write adapters of DIR as one .onnx_adapter file.")
def save_command(folder: Folder, out: Out, trained: Trained = None, force: Force = False, no_verify: NoVerify = False) -> None:
    """Write trained adapters of DIR as one .onnx_adapter file.

    Sessions of a model with `export.adapters: inputs` load it."""
    refuse_file(out, force)
    with working(first=f"opening {folder}"), _readable():
        from matmorph.folders.after_training import save_adapters

        job, adapters, values = _opened(folder, trained, verifying(no_verify, folder))
        fingerprint = save_adapters(job, adapters, values, str(trained or folder), out, force)
    say(f"wrote {out} ({len(adapters)} pairs of factors for the base {fingerprint[:12]})")


@adapter_app.command(name="load", cls=Command, short_help="Check FILE against DIR and list its ranks.")
def load_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model with `export.adapters: inputs`.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An .onnx_adapter file.")],
    as_json: Json = False,
) -> None:
    """Check FILE against the model in DIR and list its ranks.

    Needs no torch."""
    from matmorph.runtime.adapters import load_adapter, read_slots
    from matmorph.runtime.manifest import read_manifest

    with _readable():
        adapter = load_adapter(file, read_slots(read_manifest(folder).adapters, str(folder)))
    if as_json:
        say_json({"file": str(file), "ranks": dict(adapter.ranks)})
        return
    for site, rank in adapter.ranks.items():
        say(f"{site}: rank {rank}")
    say(f"{file}: fits {folder} ({len(adapter.ranks)} pairs of factors)")


@adapter_app.command(name="switch", cls=Command, short_help="Run DIR with each adapter in turn, in one session.")
def switch_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model with `export.adapters: inputs`.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Adapters to switch between.")],
    provider: Annotated[list[str] | None, typer.Option("--provider", metavar="PROVIDER", help=f"{target_names()}; repeatable.")] = None,
    as_json: Json = False,
    no_verify: NoVerify = False,
) -> None:
    """Run the check inputs of DIR with each adapter in turn, in one session.

    Prints how far each moves the outputs, and that the base comes back. Needs no torch."""
    with working(as_json, f"opening {folder}"), _readable():
        from matmorph.runtime.check import read_cases
        from matmorph.runtime.difference import difference
        from matmorph.runtime.format.artifact import CHECK_VECTORS
        from matmorph.runtime.manifest import checked_file
        from matmorph.runtime.session import Session

        session = Session(folder, provider, verify=verifying(no_verify, folder))
        if not no_verify:
            checked_file(folder, CHECK_VECTORS)
        feeds = read_cases(folder, session.manifest)[0].inputs
        adapters = [session.load_adapter(file) for file in files]
        base = session.run(feeds)
        answers = [session.run(feeds, adapter=adapter) for adapter in adapters]
        again = session.run(feeds)
    moved = {str(file): max(difference(answer[name], base[name]) for name in base) for file, answer in zip(files, answers, strict=True)}
    back = max(difference(again[name], base[name]) for name in base)
    if as_json:
        say_json({"moved": moved, "base_difference": back})
        return
    for file, distance in moved.items():
        say(f"{file}: outputs move by {distance:.3g} (relative to the base's largest)")
    say(f"one session, {len(files)} adapters; the base afterwards differs by {back:.3g}")


@adapter_app.command(name="unmerge", cls=Command, short_help="Get the adapters back out of merged weights.")
def unmerge_command(
    folder: Folder,
    merged: Annotated[Path, typer.Option("--merged", metavar="DIR2", help="The folder that `matmorph merge` wrote from DIR.")],
    out: Out,
    force: Force = False,
    no_verify: NoVerify = False,
) -> None:
    """Get the adapters back: factors of what DIR2's weights have more than the stored base in DIR.

    They are exact but for the rounding of the merged weights."""
    refuse_file(out, force)
    with working(first=f"opening {folder}"):
        from safetensors.torch import save

        from matmorph.folders.after_training import unmerged

        verify = verifying(no_verify, folder, merged)
        job, adapters, _ = _opened(folder, None, verify)
        values, lines = unmerged(job.graph, adapters, merged, verify)
        write_file(out, save(values), force)
    for site, rest in lines.items():
        say(f"{site}: {rest:.2e} of the difference is not in the factors")
    say(f"wrote {out}")


@adapter_app.command(name="to-peft", cls=Command, short_help="Write the LoRA adapters of DIR for PEFT.")
def to_peft_command(
    folder: Folder,
    out: Out,
    trained: Trained = None,
    base_model: Annotated[str | None, typer.Option("--base-model", metavar="NAME", help="What PEFT is to load them beside.")] = None,
    prefix: Prefix = "",
    force: Force = False,
    no_verify: NoVerify = False,
) -> None:
    """Write the LoRA adapters of DIR as a PEFT folder."""
    with working(first=f"opening {folder}"):
        from matmorph.exporters.peft import PEFT_FOLDER, write_peft
        from matmorph.exporters.staging import refuse_existing
        from matmorph.passes.methods import all_methods

        refuse_existing(out, force, PEFT_FOLDER)
        job, adapters, values = _opened(folder, trained, verifying(no_verify, folder))
        own = {name for adapter in adapters for name in adapter.consts.values()}
        start = {const.path: const.load() for const in job.graph.state if const.path in own}
        write_peft(out, adapters, {**start, **values}, all_methods(), initial=start, base_model=base_model, prefix=prefix, force=force)
    say(f"wrote {out}/ ({len(adapters)} modules)")


@adapter_app.command(name="from-peft", cls=Command, short_help="Read a PEFT folder as trained values of DIR.")
def from_peft_command(
    folder: Folder,
    source: Annotated[Path, typer.Argument(metavar="PEFT", help="A folder that PEFT saved.")],
    out: Out,
    prefix: Prefix = "",
    force: Force = False,
    no_verify: NoVerify = False,
) -> None:
    """Read a PEFT folder as trained values of DIR (.safetensors) or as an .onnx_adapter file, by the ending of --out.

    An .onnx_adapter file may have any rank."""
    refuse_file(out, force)
    with working(first=f"opening {folder}"), _readable():
        from safetensors.torch import save

        from matmorph.exporters.adapters import adapter_arrays, serve
        from matmorph.exporters.peft import read_peft
        from matmorph.passes.adapters.values import with_values
        from matmorph.passes.methods import all_methods
        from matmorph.runtime.adapters import read_slots, save_adapter

        job, adapters, _ = _opened(folder, None, verifying(no_verify, folder))
        methods = all_methods()
        values = read_peft(source, adapters, methods, prefix=prefix)
        if out.suffix == ".onnx_adapter":
            served = serve(job.graph, adapters, job.spec.export.precision, methods)
            save_adapter(out, adapter_arrays(adapters, values, methods), read_slots(served.to_dict(), str(folder)), force)
        else:
            with_values(job.graph, values, str(source))  # refuses what the model does not take
            write_file(out, save(values), force)  # not `save_file`, whose error of a full disk is none of the system's
    say(f"wrote {out} ({len(values) // 2} modules)")


# ---- shared by the commands


def read_configuration(path: Path) -> Mapping[str, Mapping[str, str]]:
    """The configuration that a search found, or a JSON file that holds one alone. InputError for a file that is none."""
    from matmorph.runtime.format.plain import ManifestError, typed
    from matmorph.runtime.format.reading import StoredError, read_json

    try:
        data = read_json(path, lambda found: typed(found, dict, "a configuration"))
        found = typed(data.get("configuration", data), dict, "configuration")
        return {
            site: {name: typed(word, str, f"{site}.{name}") for name, word in typed(words, dict, site).items()}
            for site, words in found.items()
        }
    except StoredError as error:
        raise InputError(str(error)) from error
    except ManifestError as error:
        raise InputError(f"{path}: holds no configuration ({{site: {{tensor: word}}}}): {error}") from error


def _opened(folder: Path, trained: Path | None, verify: bool) -> tuple[Job, tuple[Adapter, ...], Mapping[str, Any]]:
    from matmorph.folders.open import read_trained, reopen

    job, adapters = reopen(folder, verify)
    return job, adapters, read_trained(folder, job.graph, adapters, trained)


def _print_merged(found: Sequence[Merged]) -> None:
    from matmorph.passes.adapters.merging import lost_notes

    for line in found:
        how = "dense" if line.quantizer is None else f"quantised anew ({line.quantizer['quantizer']})"
        say(f"{line.site}: {' + '.join(line.methods)} merged, {how}, error {line.error:.2e}, the update is {line.change:.2e} of the weight")
    worst = max(found, key=lambda line: line.error)
    say(f"{len(found)} sites merged; largest error {worst.error:.2e} ({worst.site})")
    for note in lost_notes(found):
        print(note, file=sys.stderr)


@contextmanager
def _readable() -> Iterator[None]:
    """Errors of the runtime as those that the command line prints."""
    from matmorph.runtime.errors import SessionError

    try:
        yield
    except SessionError as error:
        raise InputError(str(error)) from error
