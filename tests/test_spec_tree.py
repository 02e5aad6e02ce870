"""Positioned YAML: every error with its position, positions and keypaths of what is read, and dicts as the same trees."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from matmorph.errors import Position, SpecError
from matmorph.specs.tree import MAX_DEPTH, MAX_NODES, MapTree, Scalar, SeqTree, Tree, from_data, read, read_bytes, to_data

BRACE = 'a brace form is text and needs quotes: "attention.{q,v}"'
TYPED = "values are typed by their key"
QUOTES = "a value that begins with * or & needs quotes"

ERRORS = [
    ("", "f.yaml:1:1: the spec is empty"),
    ("# only a comment\n", "f.yaml:1:1: the spec is empty"),
    ("---\n", "f.yaml:2:1: the spec is empty"),
    ("low-rank", "f.yaml:1:1: a spec is a mapping (version, rules ...), got low-rank"),
    ("\n- 1\n- 2", "f.yaml:2:1: a spec is a mapping (version, rules ...), got a list of 2"),
    ("a: 1\nb: 2\na: 3", "f.yaml:3:1: a: duplicate key; it is already given at f.yaml:1:1"),
    ("r:\n  - {b: 1, b: 2}", "f.yaml:2:12: r[0].b: duplicate key; it is already given at f.yaml:2:6"),
    ("a: !!python/object/apply:os.system [x]", f"f.yaml:1:4: a: YAML tags are not allowed (!!python/object/apply:os.system); {TYPED}"),
    ("a: !!str 1", f"f.yaml:1:4: a: YAML tags are not allowed (!!str); {TYPED}"),
    ("a: [!mine 1]", f"f.yaml:1:5: a[0]: YAML tags are not allowed (!mine); {TYPED}"),
    ("!!str a: 1", "f.yaml:1:1: YAML tags are not allowed (!!str)"),
    ("a: &x [*x]", "f.yaml:1:8: a[0]: the alias *x lies inside its own anchor"),
    ("a: *x", "f.yaml:1:4: a: no anchor &x stands before this alias *x; a value that begins with * needs quotes"),
    ("? [a, b]\n: 1", "f.yaml:1:3: a key must be a name, not a list, a mapping, an alias or nothing"),
    ("? {a: b}\n: 1", "f.yaml:1:3: a key must be a name, not a list, a mapping, an alias or nothing"),
    ("? ''\n: 1", "f.yaml:1:3: a key must be a name, not a list, a mapping, an alias or nothing"),
    ("a: &x b\n*x : 1", "f.yaml:2:1: a key must be a name, not a list, a mapping, an alias or nothing"),
    ("a: &x {b: 1}\nc:\n  <<: *x", "f.yaml:3:3: c: YAML merge keys (<<) are not read; use extends, or repeat the keys"),
    ("a: 1\n---\nb: 2", "f.yaml:2:1: a second document begins here (---); a spec is one document"),
    ("m: {role: attention.{q,v}}", f"f.yaml:1:21: YAML syntax: expected ',' or '}}', but got '{{'; {BRACE}"),
    ("m:\n  role: {q,v}", f"f.yaml:2:10: m.role: q has no value in this {{...}} mapping; {BRACE}"),
    ("m:\n  path: **.5.**", f"f.yaml:2:10: YAML syntax: expected alphabetic or numeric character, but found '*'; {QUOTES}"),
    ("m: %64", "f.yaml:1:4: YAML syntax: found character '%' that cannot start any token; "
               "a value that begins with this character needs quotes"),
    ("a:\n\tb: 1", "f.yaml:2:1: YAML syntax: found character '\\t' that cannot start any token; a tab cannot indent here; use spaces"),
    ("a: b: c", "f.yaml:1:5: YAML syntax: mapping values are not allowed here; "
                "a value that contains ': ' needs quotes, and nested keys go on a line of their own"),
    ("a: [1, 2", "f.yaml:1:9: YAML syntax: expected ',' or ']', but got 'stream end'; a comma is missing, or a bracket is not closed"),
    ("a: 'x", "f.yaml:1:6: YAML syntax: found unexpected end of stream; "
              "a quote is not closed, or \\ begins an unknown escape (single quotes have none)"),
    ("a: 1\nb", "f.yaml:2:2: YAML syntax: could not find expected ':'; a key needs ': ' and a value"),
    ("a: 1\n- b", "f.yaml:2:1: YAML syntax: expected block end, but found '-'; "
                  "the indentation does not fit the lines above, or text follows a closed quote"),
    ("{a: 1}\nb: 2", "f.yaml:2:1: YAML syntax: expected 'document start', but found 'block mapping start'; "
                     "something stands beside the mapping; all keys of the spec begin in one column"),
    ('a: "\\UFFFFFFFF"', "f.yaml:1:7: YAML syntax: Python int too large to convert to C int"),
    ('a: "\\ud800"', "f.yaml:1:4: a: the text contains half a surrogate pair"),
    ("a: 1\nb: \x00", "f.yaml:2:4: the character '\\x00' is not allowed in YAML"),
    ("a: " + "[" * 200, f"f.yaml:1:{MAX_DEPTH + 4}: nested more than {MAX_DEPTH} levels deep"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), ERRORS, ids=[text[:30] for text, _ in ERRORS])
def test_error(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        read(text, "f.yaml")
    assert str(caught.value) == message


def test_an_alias_bomb_is_cut_short() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))]
    with pytest.raises(SpecError, match=f"more than {MAX_NODES} values with all aliases expanded") as caught:
        read("\n".join(lines), "f.yaml")
    assert caught.value.at is not None
    assert caught.value.at.line == 5  # 9^4 values: the fifth line is the first above the limit


def test_a_file_of_too_many_values() -> None:
    with pytest.raises(SpecError, match=f"more than {MAX_NODES} values"):
        read("a: [" + "x, " * MAX_NODES + "x]", "f.yaml")


@pytest.mark.parametrize(("data", "message"), [
    (b"a: 1\nb: caf\xe9", "f.yaml:2:7: not UTF-8 text (byte 0xe9)"),
    ("a: 1".encode("utf-16-le"), "f.yaml:1:2: the character '\\x00' is not allowed in YAML"),
    ("a: 1\nb: ".encode("utf-16")[:-1], "f.yaml:2:3: not UTF-16 text (byte 0x20)"),
    ("a: é\nb: é".encode() + b"\xc3", "f.yaml:2:5: not UTF-8 text (byte 0xc3)"),
])  # fmt: skip
def test_not_utf_8(data: bytes, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        read_bytes(data, "f.yaml")
    assert str(caught.value) == message


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_text(coding: str) -> None:
    """PowerShell's > writes UTF-16."""
    tree = read_bytes("version: 1\nname: é".encode(coding), "f")
    assert [(key, item.text, str(item.at)) for key, item in tree.items.items()] == [("version", "1", "f:1:10"), ("name", "é", "f:2:7")]


TEXT = """\
# comment
rules:
  - name: a
    "match": {role: "mlp.*", layer: [0, 2]}
    pattern: |
      g = matmul(x)

      h = silu(g)
    folded: >
      one
      two
"""


def at(line: int, column: int) -> Position:
    return Position("s.yaml", line, column)


def scalar(tree: Tree) -> Scalar:
    assert isinstance(tree, Scalar)
    return tree


def test_positions_and_keypaths() -> None:
    top = read(TEXT, "s.yaml")
    rules = top.items["rules"]
    assert isinstance(rules, SeqTree)
    rule = rules.items[0]
    assert isinstance(rule, MapTree)
    match = rule.items["match"]
    assert isinstance(match, MapTree)
    layer = match.items["layer"]
    assert isinstance(layer, SeqTree)
    assert (top.at, top.keypath, top.key_at["rules"]) == (at(2, 1), "", at(2, 1))
    assert (rule.at, rule.keypath, rule.key_at["match"]) == (at(3, 5), "rules[0]", at(4, 5))
    assert (match.at, match.keypath, match.key_at["layer"]) == (at(4, 14), "rules[0].match", at(4, 30))
    assert (layer.items[1].at, layer.items[1].keypath) == (at(4, 41), "rules[0].match.layer[1]")
    role = scalar(match.items["role"])
    assert (role.text, role.plain, role.at, role.place(4)) == ("mlp.*", False, at(4, 21), at(4, 26))


def test_positions_inside_texts() -> None:
    rule = read(TEXT, "s.yaml").items["rules"]
    assert isinstance(rule, SeqTree)
    assert isinstance(rule.items[0], MapTree)
    pattern, folded = scalar(rule.items[0].items["pattern"]), scalar(rule.items[0].items["folded"])
    assert pattern.text == "g = matmul(x)\n\nh = silu(g)\n"
    assert pattern.at == at(5, 14)
    assert pattern.place(pattern.text.index("matmul")) == at(6, 11)
    assert pattern.place(pattern.text.index("silu")) == at(8, 11)
    assert folded.place(5) == folded.at == at(9, 13)  # lines were joined: only the value itself has a place
    assert scalar(read('a: "x\\ty"', "s.yaml").items["a"]).place(2) == at(1, 4)  # an escape: likewise


def test_errors_of_values_and_keys() -> None:
    tree = read("a:\n  b: 1", "s.yaml").items["a"]
    assert isinstance(tree, MapTree)
    assert str(tree.error("wrong", ["more"])) == "s.yaml:2:3: a: wrong\n  more"
    assert str(tree.key_error("b", "unknown key")) == "s.yaml:2:3: a.b: unknown key"


def test_an_alias_stands_under_its_own_keypath() -> None:
    tree = read("a: &x {k: [1]}\nb: *x", "s.yaml").items["b"]
    assert isinstance(tree, MapTree)
    inner = tree.items["k"]
    assert isinstance(inner, SeqTree)
    assert (inner.items[0].keypath, inner.items[0].at) == ("b.k[0]", at(1, 12))


def test_nothing_is_guessed() -> None:
    top = read("{a: yes, b: 010, c: 1e-4, d: 2024-01-01, e: ~, f: '1', on: 1:30}", "s.yaml")
    assert [(key, scalar(item).text, scalar(item).plain) for key, item in top.items.items()] == [
        ("a", "yes", True), ("b", "010", True), ("c", "1e-4", True), ("d", "2024-01-01", True), ("e", "~", True), ("f", "1", False),
        ("on", "1:30", True),
    ]  # fmt: skip


def outcome(call: Callable[[], MapTree]) -> MapTree | Position | None:
    """The tree, or the position of the SpecError."""
    try:
        return call()
    except SpecError as error:
        return error.at


@given(st.text(alphabet=st.sampled_from("ab:-{}[]\"'&*!|>%@#,?\\ \n\t0.1~<"), max_size=40))
def test_any_text_reads_or_is_a_spec_error(text: str) -> None:
    assert isinstance(outcome(lambda: read(text, "f")), MapTree | Position)


@given(st.binary(max_size=30))
def test_any_bytes_read_or_are_a_spec_error(data: bytes) -> None:
    assert isinstance(outcome(lambda: read_bytes(data, "f")), MapTree | Position)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=5), inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(st.text(min_size=1, max_size=5), PLAIN, max_size=4))
def test_a_dict_comes_back(data: dict[str, Any]) -> None:
    assert to_data(from_data(data)) == data


def texts(tree: Tree) -> Any:
    if isinstance(tree, MapTree):
        return {key: texts(item) for key, item in tree.items.items()}
    if isinstance(tree, SeqTree):
        return [texts(item) for item in tree.items]
    return scalar(tree).text


@given(st.dictionaries(st.text(min_size=1, max_size=5).filter(lambda key: key != "<<"), PLAIN, max_size=4))
def test_a_dict_and_its_yaml_are_the_same_tree(data: dict[str, Any]) -> None:
    def numbers(tree: Any) -> Any:  # PyYAML prints 1e-05 as 1.0e-05
        if isinstance(tree, dict):
            return {key: numbers(item) for key, item in tree.items()}
        if isinstance(tree, list):
            return [numbers(item) for item in tree]
        try:
            return float(tree)
        except ValueError:
            return tree

    text = yaml.dump(data, Dumper=yaml.SafeDumper, sort_keys=False)
    assert numbers(texts(read(text, "f"))) == numbers(texts(from_data(data)))


class Bits(enum.IntEnum):
    FOUR = 4


def test_number_types_that_are_subclasses() -> None:
    tree = from_data({"a": Bits.FOUR, "b": np.float64(0.5), "c": (1, 2)})
    assert to_data(tree) == {"a": 4, "b": 0.5, "c": [1, 2]}


CYCLE: list[Any] = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(("data", "message"), [
    ({1: 2}, "a key must be a non-empty str, got 1 (int)"),
    ({"a": {None: 2}}, "a: a key must be a non-empty str, got None (NoneType)"),
    ({"": 2}, "a key must be a non-empty str, got '' (str)"),
    ({"a": [1, {2}]}, "a[1]: expected str, int, float, bool, None, list or dict, got set"),
    ({"a": {"b": np.arange(3)}}, "a.b: expected str, int, float, bool, None, list or dict, got ndarray"),
    ({"a": b"x"}, "a: expected str, int, float, bool, None, list or dict, got bytes"),
    ({"a": "\ud800"}, "a: the text contains half a surrogate pair"),
    ({"a": CYCLE}, f"a{'[0]' * MAX_DEPTH}: nested more than {MAX_DEPTH} levels deep, or more than {MAX_NODES} values"),
])  # fmt: skip
def test_error_in_a_dict(data: Any, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        from_data(data)
    assert str(caught.value) == message
