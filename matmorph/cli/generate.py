"""`matmorph generate DIR --prompt PROMPT`: text from a written folder, as it comes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from matmorph.cli.output import complain, say_json, say_now
from matmorph.cli.text import loading
from matmorph.cli.text.loading import Speaker, speaker
from matmorph.cli.text.writing import Answer, room_for, written
from matmorph.cli.train import readable_errors
from matmorph.cli.verifying import NoVerify
from matmorph.errors import InputError


def generate_command(
    folder: loading.Folder,
    prompt: Annotated[str, typer.Option("--prompt", metavar="PROMPT", help="The text; - reads it from stdin.")],
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="Ask it as a message, or continue it as it is; by default asked where DIR can.")
    ] = None,
    system: loading.SystemText = None,
    max_new_tokens: loading.MaxNew = None,
    temperature: loading.Temperature = 0.0,
    top_k: loading.TopK = None,
    top_p: loading.TopP = None,
    seed: loading.Seed = 0,
    adapter: loading.Adapter = None,
    tokenizer: loading.Tokenizer = None,
    provider: loading.Providers = None,
    threads: loading.Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print ids, text and rates as JSON, at the end.")] = False,
    no_verify: NoVerify = False,
) -> None:
    """Continue a text, or answer it.

    The text comes as it is made; rates follow on stderr. A model with a chat template is asked PROMPT as a message (--raw continues it),
    any other continues it. Needs no torch."""
    given = _read(prompt)
    made = speaker(
        folder,
        tokenizer=tokenizer,
        threads=threads,
        provider=provider,
        no_verify=no_verify,
        adapter=adapter,
        quiet=as_json,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    ids = _ids(made, given, chat, system)
    with readable_errors():
        how = {**made.how, "max_new_tokens": room_for(made.generator, len(ids), max_new_tokens)}
        answer = written(made.generator, made.tokens, ids, how, _hidden if as_json else say_now)
    if as_json:
        say_json(_record(answer))
        return
    say_now("\n")
    complain(answer.line())


def _read(prompt: str) -> str:
    """The text, without the line end that a shell adds. Raises InputError for none, and for what is no text."""
    try:
        text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
        text.encode("utf-8")
    except UnicodeError as error:
        raise InputError("--prompt: the text is not UTF-8") from error
    if not text:
        raise InputError("--prompt: there is no text")
    return text


def _ids(made: Speaker, text: str, chat: bool | None, system: str | None) -> list[int]:
    asked = made.template is not None if chat is None else chat
    if not asked:
        if system is not None:
            raise InputError("--system: a text that is continued as it is has no place for it; a chat template has")
        return made.tokens.ids(text, special=True)
    if made.template is None:
        raise InputError("--chat: the folder has no chat template", ["--raw continues the text as it is"])
    first = [] if system is None else [{"role": "system", "content": system}]
    return made.tokens.ids(made.template.prompt([*first, {"role": "user", "content": text}]), special=False)


def _hidden(piece: str) -> None:
    """JSON is printed whole."""


def _record(answer: Answer) -> dict[str, object]:
    return {
        "text": answer.text,
        "ids": list(answer.ids),
        "ended": answer.ended,
        "prompt_tokens": answer.prompt,
        "prefill_tokens_per_second": round(answer.prefill_rate, 2),
        "decode_tokens_per_second": None if answer.decode_rate is None else round(answer.decode_rate, 2),
    }
