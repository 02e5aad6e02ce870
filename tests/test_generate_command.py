"""`matmorph generate` and `matmorph chat` on a decoder written by hand. Oracle: its definition in numpy, and transformers for templates."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_decoder import POSITIONS, VOCAB, greedy
from tiny_speaker import LETTERS, TEMPLATE, folder_with, tokenizer_text

from matmorph.cli.text.files import TextFiles
from matmorph.cli.text.template import ChatTemplate
from matmorph.cli.text.writing import written
from matmorph.errors import InputError
from matmorph.runtime import Generator

pytest.importorskip("tokenizers", reason="text needs the package tokenizers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_with(tmp_path_factory.mktemp("text") / "out")


CPU = ("--provider", "cpu", "--threads", "1")


def ids(text: str) -> list[int]:
    byte_of = dict(zip("abcdefghijklm", range(3, 16), strict=True)) | {" ": 18, "x": 22}
    return [byte_of[letter] for letter in text]


def text_of(tokens: list[int]) -> str:
    """By UTF-8 itself."""
    byte_of = {number: letter.encode("latin-1") for number, letter in enumerate(LETTERS) if number > 2 and number != 18}
    return b"".join({**byte_of, 18: b" "}.get(token, b"") for token in tokens).decode("utf-8", "replace")


# ---- generate


def test_a_text_is_continued(folder: Path, run: Any) -> None:
    wanted = greedy(ids("abc"), 9)
    code, out, err = run("generate", folder, "--prompt", "abc", "--raw", "--max-new-tokens", 9, *CPU)
    assert (code, out) == (0, text_of(wanted) + "\n")
    assert err.splitlines()[-1].startswith("3 tokens of prompt at ")
    assert f"{len(wanted)} new ones at" in err


def test_a_folder_with_a_template_is_asked(folder: Path, run: Any) -> None:
    code, out, _ = run("generate", folder, "--prompt", "abc", "--json", "--max-new-tokens", 9, *CPU)
    assert code == 0
    found = json.loads(out)
    prompt = ids(" abc x")  # the role and the line end are no tokens here
    assert found["ids"] == greedy(prompt, 9)
    assert found["prompt_tokens"] == len(prompt)


def test_stdin_may_be_the_prompt(folder: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("abc\n"))
    code, out, _ = run("generate", folder, "--prompt", "-", "--raw", "--json", "--max-new-tokens", 4, *CPU)
    assert (code, json.loads(out)["ids"]) == (0, greedy(ids("abc"), 4))


def test_without_a_number_the_positions_are_the_limit(folder: Path, run: Any) -> None:
    out = json.loads(run("generate", folder, "--prompt", "kk", "--raw", "--json", *CPU)[1])
    assert out["ids"] == greedy(ids("kk"), POSITIONS - 2)


def test_draws_follow_the_seed(folder: Path, run: Any) -> None:
    words = ("generate", folder, "--prompt", "abc", "--raw", "--json", "--temperature", 20, "--top-p", 0.9, "--max-new-tokens", 12, *CPU)
    found = [json.loads(run(*words, "--seed", seed)[1])["ids"] for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]
    expected = Generator(folder, ["cpu"]).generate([ids("abc")], max_new_tokens=12, temperature=20.0, top_p=0.9, seed=1)
    assert found[0] == expected[0].tolist()


def test_pieces_are_the_text_however_characters_are_cut(folder: Path) -> None:
    tokens = TextFiles.of(folder, None, True).tokens()
    rng = np.random.default_rng(0)
    for length in range(1, 60):
        row = rng.integers(0, VOCAB, length).tolist()
        pieces = tokens.pieces()
        parts = [pieces.piece(token) for token in row] + [pieces.rest()]
        assert "".join(parts) == tokens.text(row) == text_of(row)
    pieces = tokens.pieces()
    assert [pieces.piece(token) for token in (3, 19, 20, 21, 16, 17, 3)] == ["a", "", "", "漢", "", "é", "a"]


class Stops:
    """A generator whose user presses Ctrl-C after some tokens."""

    max_length = None

    def __init__(self, folder: Path, after: int) -> None:
        self.inner, self.after = Generator(folder, ["cpu"]), after
        self.special = self.inner.special

    def stream(self, *args: Any, **how: Any) -> Iterator[np.ndarray]:
        for number, token in enumerate(self.inner.stream(*args, **how)):
            if number == self.after:
                raise KeyboardInterrupt
            yield token


def test_ctrl_c_ends_an_answer_where_it_is(folder: Path) -> None:
    tokens, shown = TextFiles.of(folder, None, True).tokens(), []
    stopped: Any = Stops(folder, 2)
    answer = written(stopped, tokens, ids("abc"), {"max_new_tokens": 9}, shown.append)
    assert list(answer.ids) == greedy(ids("abc"), 9)[:2]
    assert not answer.ended
    assert "".join(shown) == answer.text
    stopped = Stops(folder, 0)
    with pytest.raises(KeyboardInterrupt):
        written(stopped, tokens, ids("abc"), {"max_new_tokens": 9}, shown.append)


# ---- chat


def test_a_conversation_is_kept_and_ends(folder: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    tokens = TextFiles.of(folder, None, True).tokens()
    template = ChatTemplate.of(TextFiles.of(folder, None, True))
    assert template is not None

    def answers(*messages: str) -> list[str]:
        said: list[dict[str, str]] = [{"role": "system", "content": "l"}]
        found = []
        for message in messages:
            said.append({"role": "user", "content": message})
            row = tokens.ids(template.prompt(said), special=False)
            found.append(text_of(greedy(row, 3)))
            said.append({"role": "assistant", "content": found[-1]})
        return found

    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\n\ncd\n/new\nab\n/exit\nnot read\n"))
    code, out, err = run("chat", folder, "--system", "l", "--max-new-tokens", 3, *CPU)
    assert (code, err) == (0, "")
    assert out == "".join(f"{answer}\n" for answer in [*answers("ab", "cd"), *answers("ab")])


# ---- templates


MESSAGES = [
    {"role": "system", "content": 'He said: "a < b & c"'},
    {"role": "user", "content": "é\n  two"},
    {"role": "assistant", "content": "ok"},
    {"role": "user", "content": "漢"},
]
TEMPLATES = [
    TEMPLATE,
    "{% for m in messages %}\n  {% if loop.first %}{% continue %}{% endif %}\n  {{ m | tojson }}|{{ m.content | trim }}\n{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}{% endfor %}{{ ns.n }}{{ pad_token }}",
    "{{ messages | tojson(indent=2) }}{{ messages[0]['content'].split('a')[0] }}{{ bos_token is defined }}{{ tools is none }}",
    "{% macro say(m) %}{{ m.role.upper() }}: {{ m.content }}{% endmacro %}{% for m in messages[1:] %}{{ say(m) }}{% endfor %}",
]


@pytest.mark.parametrize("text", TEMPLATES)
def test_templates_render_as_in_transformers(text: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    tokens = {"eos_token": "</s>", "pad_token": "<pad>"}
    (expected,), _ = utils.render_jinja_template([MESSAGES], chat_template=text, add_generation_prompt=True, tools=None, **tokens)
    assert ChatTemplate("t", text, tokens).prompt(MESSAGES) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for %}", "t: the chat template: line 1: "),
        ("{{ raise_exception('roles must\\nalternate') }}", "t: the chat template: roles must alternate"),
        ("{{ nothing.here }}", "t: the chat template: 'nothing' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set ns = namespace(__class__=1) %}", "a namespace has no place for '__class__'"),
        ("{% include 'file' %}", "no loader"),
        ("{{ 1 // 0 }}", "by zero"),
        ("{{ 'a' * (10 ** 10) }}", "takes too much memory"),
        ("{{ 'a' * (2 ** 25) }}", "gives 33554432 characters"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "is nested too deep"),
    ],
)
def test_a_template_that_fails_is_one_plain_line(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        ChatTemplate("t", text, {}).prompt(MESSAGES)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_without_an_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock stops it where the processor's limit does not come first, as on a system without such limits."""
    from matmorph.cli.text import template

    monkeypatch.setattr(template, "_WAIT", 1.0)
    began = time.perf_counter()
    with pytest.raises(InputError, match="t: the chat template takes more than 10 seconds"):
        ChatTemplate("t", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", {}).prompt(MESSAGES)
    assert time.perf_counter() - began < 8


@pytest.mark.full
def test_a_template_has_ten_seconds_of_a_processor() -> None:
    with pytest.raises(InputError, match="t: the chat template takes more than 10 seconds"):
        ChatTemplate("t", "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", {}).prompt(MESSAGES)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, TEMPLATE),
        ({"chat_template__jinja": None}, None),
        ({"chat_template__jinja": None, "tokenizer_config__json": {"chat_template": "own"}}, "own"),
        (
            {
                "chat_template__jinja": None,
                "tokenizer_config__json": {"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]},
            },
            "d",
        ),
        ({"chat_template__jinja": None, "chat_template__json": {"chat_template": "third"}}, "third"),
    ],
)
def test_where_a_template_is_found(more: dict[str, Any], expected: str | None, tmp_path: Path) -> None:
    found = TextFiles.of(folder_with(tmp_path / "out", **more), None, True).chat_template()
    assert (None if found is None else found[1]) == expected


# ---- bad input


@pytest.mark.parametrize(
    ("words", "more", "message"),
    [
        (("generate", "--prompt", "a"), {"tokenizer__json": None}, "has no tokenizer.json, so text cannot become tokens"),
        (("generate", "--prompt", "a"), {"tokenizer__json": "{}"}, "tokenizer.json: the package tokenizers cannot read it: "),
        (("generate", "--prompt", "a"), {"tokenizer_config__json": "["}, "tokenizer_config.json: cannot be read"),
        (("generate", "--prompt", "a"), {"generation_config__json": None}, "no configuration in it names an end token"),
        (("generate", "--prompt", ""), {}, "--prompt: there is no text"),
        (("generate", "--prompt", "a", "--chat"), {"chat_template__jinja": None}, "--chat: the folder has no chat template"),
        (("generate", "--prompt", "a", "--raw", "--system", "b"), {}, "--system: a text that is continued as it is has no place"),
        (("generate", "--prompt", "a" * 48, "--raw"), {}, "the prompt has 48 tokens, and the model has positions for 48"),
        (("generate", "--prompt", "a", "--raw", "--max-new-tokens", "48"), {}, "1 tokens and 48 new ones are 49"),
        (("generate", "--prompt", "a", "--top-k", "3"), {}, "set a temperature"),
        (("generate", "--prompt", "a", "--adapter", "none"), {}, "takes no adapters"),
        (
            ("generate", "--prompt", "a"),
            {"chat_template__jinja": "{{ raise_exception('no') }}"},
            "chat_template.jinja: the chat template: no",
        ),
        (("chat",), {"chat_template__jinja": None}, "has no chat template"),
        (("chat",), {"tokenizer_config__json": {"chat_template": [{"name": "x"}]}, "chat_template__jinja": None}, "is named default"),
    ],
)
def test_what_cannot_be_said_is_an_error_of_the_input(words: Any, more: Any, message: str, tmp_path: Path, run: Any) -> None:
    folder = folder_with(tmp_path / "out", **more)
    code, out, err = run(words[0], folder, *words[1:], *CPU)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_changed_tokenizer_is_refused_and_another_folders_may_be_named(tmp_path: Path, run: Any) -> None:
    folder = folder_with(tmp_path / "out")
    other = tmp_path / "source"
    other.mkdir()
    (folder / "tokenizer.json").rename(other / "tokenizer.json")
    code, _, err = run("generate", folder, "--prompt", "abc", "--tokenizer", other, "--json", "--max-new-tokens", 3, *CPU)
    assert (code, err) == (0, "")
    (folder / "tokenizer.json").write_text(tokenizer_text() + " ")
    code, _, err = run("generate", folder, "--prompt", "abc", *CPU)
    assert code == 2
    assert "tokenizer.json: was changed" in err
    code, out, err = run("generate", folder, "--prompt", "abc", "--raw", "--no-verify", "--max-new-tokens", 3, *CPU)
    assert (code, out) == (0, text_of(greedy(ids("abc"), 3)) + "\n")


def test_no_torch_is_loaded(folder: Path) -> None:
    heavy = "('torch', 'onnx', 'transformers', 'jinja2')"
    call = "from matmorph.cli.main import main\ntry: main(sys.argv[1:])"
    code = f"import sys\n{call}\nfinally: print([name for name in {heavy} if name in sys.modules])"
    words = ["generate", str(folder), "--prompt", "abc", "--max-new-tokens", "2", "--json", *CPU]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
