"""`matmorph completion SHELL`: what a shell needs to complete the command line, made of the commands themselves.

The script is static: nothing of matmorph runs while one types.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from matmorph.cli.commands import DEBUG
from matmorph.cli.output import say
from matmorph.errors import InputError, did_you_mean


@dataclass(frozen=True, slots=True)
class Part:
    """One command or group by its words ("matmorph specs show"). `options`: by all their names, with what they take ("" = nothing) and
    their help; `words`: what may stand beside them, names of commands or values; `files`: whether a file may."""

    path: str
    options: Mapping[tuple[str, ...], tuple[str, str]]
    words: tuple[str, ...]
    files: bool


def completion_command(ctx: typer.Context, shell: Annotated[str, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")]) -> None:
    """Print a script that completes commands, options and spec names.

    bash: matmorph completion bash >> ~/.bashrc. zsh: the same with zsh and ~/.zshrc, below compinit. fish: matmorph completion fish >
    ~/.config/fish/completions/matmorph.fish."""
    if shell not in SHELLS:
        raise InputError(f"{shell}: there are scripts for {', '.join(SHELLS)}{did_you_mean(shell, SHELLS)}")
    root: Any = ctx.find_root().command
    say(SHELLS[shell](list(parts(root, "matmorph"))), end="")


def values(metavar: str | None) -> tuple[str, ...]:
    """The words that can be given for a metavar, as far as they are known."""
    from matmorph.runtime.schedules import SCHEDULES
    from matmorph.runtime.targets import TARGETS
    from matmorph.specs.load import library_names

    known: Mapping[str, Callable[[], tuple[str, ...]]] = {
        "SPEC": library_names,
        "MODEL": lambda: ("minilm", "smollm2"),
        "PROVIDER": lambda: tuple(TARGETS),
        "SCHEDULE": lambda: tuple(SCHEDULES),
        "SHELL": lambda: tuple(SHELLS),
    }
    return known.get(metavar or "", tuple)()


def parts(command: Any, path: str) -> Iterator[Part]:
    """A command and all below it, outermost first."""
    options = {
        (*param.opts, *param.secondary_opts): ("" if getattr(param, "is_flag", False) else str(param.metavar), _short(param.help))
        for param in command.params
        if param.param_type_name == "option"
    }
    options |= {("-h", "--help"): ("", "Show the help."), (DEBUG[0],): ("", _short(DEBUG[1]))}
    below = getattr(command, "commands", {})
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    words = (*below, *(word for param in arguments for word in values(param.metavar)))
    yield Part(path, options, words, files=any(param.metavar not in ("SHELL",) for param in arguments))
    for name, child in below.items():
        yield from parts(child, f"{path} {name}")


def _short(text: str | None) -> str:
    """One line without what a shell could take for its own."""
    return " ".join("".join(letter for letter in text or "" if letter not in "'\"`$\\").split())


def _names(part: Part) -> str:
    return " ".join(name for names in part.options for name in names)


def _valued(part: Part) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(names joined by `|`, known values) of the options that take something."""
    for names, (metavar, _) in part.options.items():
        if metavar:
            yield "|".join(names), values(metavar)


def _reach(found: list[Part]) -> str:
    """The paths of commands below others, as patterns of a `case`."""
    return "|".join(f'"{part.path}"' for part in found[1:])


def bash(found: list[Part]) -> str:
    """For bash's `complete`."""
    cases: list[str] = []
    for part in found:
        options = "".join(
            f'        {names}) COMPREPLY=( $(compgen -W "{" ".join(words)}" -- "$cur") $(compgen -f -- "$cur") ); return;;\n'
            for names, words in _valued(part)
        )
        files = ' $(compgen -f -- "$cur")' if part.files else ""
        cases.append(
            f'    "{part.path}")\n      case "$prev" in\n{options}      esac\n'
            f'      if [[ $cur == -* ]]; then COMPREPLY=( $(compgen -W "{_names(part)}" -- "$cur") )\n'
            f'      else COMPREPLY=( $(compgen -W "{" ".join(part.words)}" -- "$cur"){files} ); fi;;\n'
        )
    return (
        "# bash completion of matmorph\n"
        "_matmorph() {\n"
        '  local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" at=matmorph word\n'
        '  for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do\n'
        f'    case "$at $word" in {_reach(found)}) at="$at $word";; esac\n'
        "  done\n"
        '  case "$at" in\n' + "".join(cases) + "  esac\n}\ncomplete -o filenames -F _matmorph matmorph\n"
    )


def zsh(found: list[Part]) -> str:
    """For zsh's completion system."""
    cases: list[str] = []
    for part in found:
        options = "".join(f"        {names}) compadd -- {' '.join(words)}; _files; return;;\n" for names, words in _valued(part))
        files = "; _files" if part.files else ""
        cases.append(
            f'    "{part.path}")\n      case "$words[CURRENT-1]" in\n{options}      esac\n'
            f'      if [[ "$words[CURRENT]" == -* ]]; then compadd -- {_names(part)}\n'
            f"      else compadd -- {' '.join(part.words)}{files}; fi;;\n"
        )
    return (
        "#compdef matmorph\n"
        "_matmorph() {\n"
        "  local at=matmorph word\n"
        '  for word in "${(@)words[2,CURRENT-1]}"; do\n'
        f'    case "$at $word" in {_reach(found)}) at="$at $word";; esac\n'
        "  done\n"
        '  case "$at" in\n' + "".join(cases) + "  esac\n}\ncompdef _matmorph matmorph\n"
    )


def fish(found: list[Part]) -> str:
    """For fish's `complete`; conditions name the words of a command."""
    lines = ["# fish completion of matmorph", "complete -c matmorph -f"]
    for part in found:
        words = part.path.split()[1:]
        conditions = [f"__fish_seen_subcommand_from {word}" for word in words]
        if not words:
            conditions = ["__fish_use_subcommand"]
        when = f"-n '{'; and '.join(conditions)}'"
        if part.words:
            lines.append(f"complete -c matmorph {when} -a '{' '.join(part.words)}'")
        if part.files:
            lines.append(f"complete -c matmorph {when} -F")
        for names, (metavar, text) in part.options.items():
            called = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in names)
            known = f" -a '{' '.join(values(metavar))}'" if values(metavar) else ""
            taken = f" -r -F{known}" if metavar else ""
            lines.append(f"complete -c matmorph {when} {called}{taken} -d '{text}'")
    return "\n".join(lines) + "\n"


SHELLS: Mapping[str, Callable[[list[Part]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
