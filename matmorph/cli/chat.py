"""`matmorph chat DIR`: a conversation with a written folder."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from matmorph.cli.output import complain, say_now
from matmorph.cli.text import loading
from matmorph.cli.text.loading import Speaker, speaker
from matmorph.cli.text.template import ChatTemplate
from matmorph.cli.text.writing import room_for, written
from matmorph.cli.train import readable_errors
from matmorph.cli.verifying import NoVerify
from matmorph.errors import InputError

if TYPE_CHECKING:
    from matmorph.runtime.decoding import PromptCache

EXIT, NEW = "/exit", "/new"


def chat_command(
    folder: loading.Folder,
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
    no_verify: NoVerify = False,
) -> None:
    """Talk with a model that has a chat template.

    A line is a message. /new begins another conversation, /exit or the end of input ends it, Ctrl-C stops an answer. What the model keeps
    of earlier messages is not computed again. Needs no torch."""
    made = speaker(
        folder,
        tokenizer=tokenizer,
        threads=threads,
        provider=provider,
        no_verify=no_verify,
        adapter=adapter,
        quiet=False,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    if made.template is None:
        raise InputError(f"{tokenizer or folder}: has no chat template", ["matmorph generate continues a text without one"])
    if sys.stdin.isatty():
        complain(f"a line is a message; {NEW} begins another conversation, {EXIT} ends it, Ctrl-C stops an answer")
    first = [] if system is None else [{"role": "system", "content": system}]
    _talk(made, made.template, first, max_new_tokens)


def _talk(made: Speaker, template: ChatTemplate, first: list[dict[str, str]], asked: int | None) -> None:
    from matmorph.runtime.decoding import PromptCache

    said, cache, turn = list(first), PromptCache(), 0
    while (line := _line()) is not None and line != EXIT:
        if line == NEW:
            said, cache = list(first), PromptCache()
        elif line:
            said.append({"role": "user", "content": line})
            how = {**made.how, "seed": made.how["seed"] + turn}
            said.append({"role": "assistant", "content": _answered(made, template.prompt(said), how, asked, cache)})
            turn += 1


def _answered(made: Speaker, prompt: str, how: dict[str, Any], asked: int | None, cache: PromptCache) -> str:
    ids = made.tokens.ids(prompt, special=False)
    with readable_errors():
        new = room_for(made.generator, len(ids), asked)
        try:
            answer = written(made.generator, made.tokens, ids, {**how, "max_new_tokens": new, "cache": cache}, say_now)
        except KeyboardInterrupt:  # before the first token
            say_now("\n")
            return ""
    say_now("\n")
    return answer.text


def _line() -> str | None:
    """The next message; None at the end of input."""
    if sys.stdin.isatty():
        try:
            return input("> ").strip()
        except EOFError:
            return None
    try:
        found = sys.stdin.readline()
    except UnicodeError as error:
        raise InputError("the message is not UTF-8") from error
    return found.strip() if found else None
