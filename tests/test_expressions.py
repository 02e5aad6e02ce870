"""Regular expressions matched by sets of places. Oracle: `re`, on random expressions and names; and time, where `re` has none."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matmorph.specs.expressions import Expression, ExpressionError

ATOMS = st.sampled_from(
    ["a", "b", r"\.", ".", "[ab]", "[^a.]", r"\d", r"\w", r"\D", "[a-c0-2]", r"\s", r"\b", "^", "$", "(?=a)", "(?!b)", "(?<=a)", "(?<!b)"]
)


def nested(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    group = parts.map(lambda inner: f"(?:{inner})")
    return st.one_of(
        st.tuples(parts, parts).map("".join),
        st.tuples(group, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{,2}", "*?", "+?"])).map("".join),
        st.tuples(parts, parts).map(lambda two: f"({two[0]}|{two[1]})"),
    )


EXPRESSIONS = st.recursive(ATOMS, nested, max_leaves=6)


@settings(max_examples=400, deadline=None)
@given(pattern=EXPRESSIONS, name=st.text("abAc.01_ ", max_size=7), folded=st.booleans())
def test_it_matches_what_re_matches(pattern: str, name: str, folded: bool) -> None:
    whole = f"(?i){pattern}" if folded else pattern
    assert Expression(whole).matches(name) == (re.fullmatch(whole, name) is not None)


SLOW = ["(a+)+$", "(a|aa)+", "(.*)*b", "(a*)*(a*)*(a*)*b", ".*.*.*.*.*.*.*.*b", "(?:a?){200}a{200}", "((a{1,50}){1,50}){1,50}b"]


@pytest.mark.parametrize("pattern", SLOW)
def test_its_time_is_bounded(pattern: str) -> None:
    """`re` takes 2^n steps on these, or n^8."""
    began = time.perf_counter()
    Expression(pattern).matches("a" * 80 + "!")
    assert time.perf_counter() - began < 5  # milliseconds each; the margin is for a busy machine


@pytest.mark.parametrize(("pattern", "message"), [
    ("(", "missing ), unterminated subpattern"),
    (r"(a)\1", "a back-reference is not possible here, as its time has no bound"),
    ("(?>a)b", "an atomic group is not possible here"),
    ("a++", "a possessive repeat is not possible here"),
    ("(a)?(?(1)b|c)", "a condition on a group is not possible here"),
    ("(?i:a)b", "flags of a part are not possible here"),
    ("(" * 5000 + ")" * 5000, "nested too deep, or repeated too often"),
    ("a{99999999999999}", "nested too deep, or repeated too often"),
])  # fmt: skip
def test_refused(pattern: str, message: str) -> None:
    with pytest.raises(ExpressionError, match=re.escape(message)):
        Expression(pattern)
