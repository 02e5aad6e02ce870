"""A chat template rendered, in a process of its own: `python render.py`, JSON on stdin, JSON on stdout.

A template is a program that came with a model. jinja2's sandbox keeps it from Python's objects but not from looping for ever or filling
the memory, so the system bounds both. Nothing of matmorph is imported. What templates may use is what transformers gives them: blocks
trimmed, loop controls, `raise_exception`, `strftime_now`, a `tojson` that keeps letters, and `{% generation %}`, which marks answers.
"""

from __future__ import annotations

import contextlib
import json
import sys
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class _Marked(Extension):
    """`{% generation %}...{% endgeneration %}`: what stands in it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        found: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return found


class _Names(Namespace):
    """A template's own variables; none of Python's."""

    def __init__(*args: Any, **values: Any) -> None:
        for name in dict(*args[1:], **values):
            _refuse_private(name)
        Namespace.__init__(*args, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a namespace has no place for {name!r}")


def _refuse(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def rendered(template: str, variables: dict[str, Any]) -> str:
    """The text. Raises what jinja2 does."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Marked, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form), "namespace": _Names}
    return environment.from_string(template).render(**variables)


def _bounded(seconds: int, memory: int) -> None:
    """Of the processor, and bytes; where the system has limits for a process. On Windows whoever waits for this one stops it."""
    with contextlib.suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))


def _answer(asked: dict[str, Any]) -> dict[str, str]:
    try:
        text = rendered(asked["template"], asked["variables"])
    except TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"}
    except MemoryError:
        return {"error": "takes too much memory"}
    except RecursionError:
        return {"error": "is nested too deep"}
    except Exception as error:  # a template may do whatever raises in Python
        return {"error": " ".join(str(error).split())[:500] or type(error).__name__}
    longest = asked["longest"]
    return {"text": text} if len(text) <= longest else {"error": f"gives {len(text)} characters, at most {longest} are taken"}


if __name__ == "__main__":
    asked = json.loads(sys.stdin.buffer.read())
    _bounded(asked["seconds"], asked["memory"])
    sys.stdout.buffer.write(json.dumps(_answer(asked)).encode("ascii"))
