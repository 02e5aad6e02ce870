"""What `generate` and `chat` load alike, and the options that both have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from matmorph.cli.text.files import TextFiles
from matmorph.cli.text.template import ChatTemplate
from matmorph.cli.train import readable_errors
from matmorph.cli.verifying import verifying
from matmorph.cli.working import working
from matmorph.errors import InputError
from matmorph.runtime.targets import target_names
from matmorph.text.tokens import Tokens

if TYPE_CHECKING:
    from matmorph.runtime.generator import Generator
    from matmorph.runtime.seq2seq_generator import Seq2SeqGenerator

    AnyGenerator: TypeAlias = Generator | Seq2SeqGenerator

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that compile wrote, of a model with a key/value cache.")]
MaxNew = Annotated[int | None, typer.Option("--max-new-tokens", metavar="N", help="At most so many; 256 where there is room.")]
Temperature = Annotated[float, typer.Option("--temperature", metavar="X", help="0 takes the likeliest token, more draws one.")]
TopK = Annotated[int | None, typer.Option("--top-k", metavar="N", help="Draw among the N likeliest tokens.")]
TopP = Annotated[float | None, typer.Option("--top-p", metavar="X", help="Draw among the likeliest that have X together.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Of the draws: the same seed draws the same.")]
Adapter = Annotated[Path | None, typer.Option("--adapter", metavar="FILE", help="An .onnx_adapter file for this model.")]
SystemText = Annotated[str | None, typer.Option("--system", metavar="PROMPT", help="What the chat template puts first.")]
Tokenizer = Annotated[Path | None, typer.Option("--tokenizer", metavar="DIR2", help="A folder with tokenizer.json, where DIR has none.")]
Threads = Annotated[int | None, typer.Option("--threads", metavar="N", help="CPU threads of one operator.")]
Providers = Annotated[list[str] | None, typer.Option("--provider", metavar="PROVIDER", help=f"{target_names()}; repeatable.")]


@dataclass(frozen=True, slots=True)
class Speaker:
    """A model with its text. `how`: arguments of `Generator.stream` that stay."""

    generator: AnyGenerator
    tokens: Tokens
    template: ChatTemplate | None
    how: dict[str, Any]


def speaker(
    folder: Path,
    *,
    tokenizer: Path | None,
    threads: int | None,
    provider: list[str] | None,
    no_verify: bool,
    adapter: Path | None,
    quiet: bool,
    **sampling: Any,
) -> Speaker:
    """Loaded. Raises InputError."""
    verify = verifying(no_verify, folder)
    with working(quiet, f"opening {folder}"), readable_errors():
        from matmorph.runtime.errors import ArtifactError
        from matmorph.runtime.format.reading import StoredError
        from matmorph.runtime.manifest import artifact_folder, read_manifest

        try:
            files = TextFiles.of(artifact_folder(folder), tokenizer, verify)
            tokens, template = files.tokens(), ChatTemplate.of(files)
        except StoredError as error:
            raise ArtifactError(str(error)) from error
        from matmorph.runtime.generator import Generator
        from matmorph.runtime.seq2seq_generator import Seq2SeqGenerator

        kind = Generator if read_manifest(folder).parts is None else Seq2SeqGenerator
        generator = kind(folder, provider, threads=threads, verify=verify)
        if generator.special.eos is None:
            raise InputError(
                f"{folder}: no configuration in it names an end token", ["a generation_config.json beside the source model does"]
            )
        loaded = None if adapter is None else generator.load_adapter(adapter)
    return Speaker(generator, tokens, template, {**sampling, "adapter": loaded})
