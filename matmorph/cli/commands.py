"""How a command shows itself: usage as one would type it, arguments by the names that the text uses, `--debug` where one looks for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from typer.core import TyperCommand, TyperGroup

ORDER = (
    *("demo", "inspect", "plan", "explain", "compile", "verify", "layout", "generate", "chat", "evaluate", "report", "compare", "diff"),
    *("train", "heal", "search", "merge", "adapter", "specs", "completion"),
)
"""The commands as one meets them."""

DEBUG = ("--debug", "Show Python's traceback of an error too.")
"""Of every command, wherever it stands on the line: `main` takes it out before anything else reads the line."""


class Command(TyperCommand):
    """One command."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """What must be given, then that more may be."""
        shown = [param.metavar or param.name.upper() for param in self.params if param.param_type_name == "argument"]
        needed = [f"{param.opts[0]} {param.metavar}" for param in self.params if param.param_type_name == "option" and param.required]
        return [*shown, *needed, "[OPTIONS]"]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments by their metavar alone: of what Python type they become says nothing to a reader."""
        arguments = [(param.metavar, getattr(param, "help", None) or "") for param in self.params if param.param_type_name == "argument"]
        if arguments:
            with formatter.section("Arguments"):
                formatter.write_dl(arguments)
        with formatter.section("Options"):
            formatter.write_dl([*_records(self, ctx), DEBUG])


class Group(TyperGroup):
    """Several commands."""

    def list_commands(self, ctx: Any) -> list[str]:
        names = list(super().list_commands(ctx))
        return sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Options"):
            formatter.write_dl([*_records(self, ctx), DEBUG])
        self.format_commands(ctx, formatter)


def _records(command: Any, ctx: Any) -> Iterator[tuple[str, str]]:
    """Its options with their help."""
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx) if param.param_type_name == "option" else None
        if record is not None:
            yield record
