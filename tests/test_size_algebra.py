"""The normal form of sizes against plain integer arithmetic and sympy: the same number everywhere, one form for one number."""

from __future__ import annotations

from fractions import Fraction
from math import floor, prod
from typing import Any

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from mutating import Mutant, killer, mutated, unmutated
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Max, Mod, ModularIndexing, PythonMod

from matmorph.ir.core import Range
from matmorph.ir.infer import Inference
from matmorph.ir.size_algebra import agree, normal_form
from matmorph.ir.types import TensorType, format_dim, parse_dim, symbol

B, S, H = AXES = tuple(symbol(name) for name in "bsh")
POINTS = [(1, 1, 1), (1, 2, 3), (2, 1, 5), (3, 7, 2), (4, 4, 4), (5, 6, 12), (9, 16, 25), (31, 8, 3)]
EXACT: dict[Any, Any] = {
    sympy.Add: lambda *terms: sum(terms),
    sympy.Mul: lambda *factors: prod(factors),
    sympy.Pow: pow,
    FloorDiv: lambda p, q: floor(Fraction(p, q)),
    Mod: lambda p, q: p - q * floor(Fraction(p, q)),
    PythonMod: lambda p, q: p - q * floor(Fraction(p, q)),
    Max: max,
}
"""The definitions, on integers."""


def value(expression: Any, point: tuple[int, int, int]) -> int:
    """By the definitions, without any of sympy's own simplification."""
    if expression in AXES:
        return point[AXES.index(expression)]
    if expression.is_Integer:
        return int(expression)
    return EXACT[expression.func](*(value(arg, point) for arg in expression.args))


LEAVES = st.one_of(st.integers(1, 6).map(sympy.Integer), st.sampled_from(AXES))


def _combined(parts: st.SearchStrategy) -> st.SearchStrategy:
    pairs = st.tuples(parts, parts)
    return st.one_of(
        pairs.map(lambda pair: sympy.Add(*pair)),
        pairs.map(lambda pair: sympy.Add(sympy.Mul(pair[0], pair[1]), -1)),
        pairs.map(lambda pair: sympy.Mul(*pair)),
        pairs.map(lambda pair: _quotient(FloorDiv, *pair)),
        pairs.map(lambda pair: _quotient(PythonMod, *pair)),
    )


def _quotient(kind: Any, p: Any, q: Any) -> Any:
    """p // q or p mod q where q is surely positive."""
    return kind(p, q) if q.is_positive else p


SIZES = st.recursive(LEAVES, _combined, max_leaves=7)
POLYNOMIALS = st.recursive(
    LEAVES, lambda parts: st.tuples(parts, parts).flatmap(lambda p: st.sampled_from([p[0] + p[1], p[0] * p[1]])), max_leaves=4
)


@settings(max_examples=80, deadline=None)
@given(SIZES)
def test_the_normal_form_is_the_same_number(size: Any) -> None:
    found = normal_form(size)
    assert [value(found, point) for point in POINTS] == [value(size, point) for point in POINTS]


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_it_is_its_own_normal_form_and_is_read_back(size: Any) -> None:
    found = normal_form(size)
    assert normal_form(found) == found
    assert parse_dim(format_dim(found)) == found


@settings(max_examples=15, deadline=None)
@given(POLYNOMIALS, POLYNOMIALS, POLYNOMIALS)
def test_exact_division(p: Any, q: Any, r: Any) -> None:
    """(p q) // q is p, (p q + r) // q is p + r // q, and a common factor makes no difference: whatever their form."""
    assert normal_form(FloorDiv(sympy.expand(p * q), q)) == sympy.expand(p)
    assert normal_form(FloorDiv(sympy.expand(p * q + r), q)) == normal_form(p + FloorDiv(r, q))
    assert normal_form(FloorDiv(sympy.expand(p * r), sympy.expand(q * r))) == normal_form(FloorDiv(p, q))
    assert normal_form(PythonMod(sympy.expand(p * q + r), q)) == normal_form(PythonMod(r, q))


@settings(max_examples=30, deadline=None)
@given(POLYNOMIALS, POLYNOMIALS)
def test_quotients_of_polynomials_are_those_of_sympy(p: Any, q: Any) -> None:
    """Where sympy's `cancel` finds a polynomial, so do we."""
    ratio = sympy.cancel(p / q)
    if ratio.is_polynomial() and all(c.is_Integer for c in sympy.Poly(ratio, *AXES).coeffs()):
        assert normal_form(FloorDiv(p, q)) == sympy.expand(ratio)


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (FloorDiv(S**2, S), "s"),
        (FloorDiv(B * S * H, B), "h*s"),
        (FloorDiv(4 * B * S * S, 4 * B * S), "s"),
        (FloorDiv(S**2 + S, S + 1), "s"),
        (FloorDiv(S**2 - 1, S + 1), "s - 1"),
        (FloorDiv(3 * S + 1, 2), "s + (((s + 1)//2))"),
        (FloorDiv(FloorDiv(S, 2) + 1, 3), "((s + 2)//6)"),
        (FloorDiv(S - 1, 2) + 1, "((s + 1)//2)"),
        (FloorDiv(S, S + 2), "0"),
        (FloorDiv(2, S + 2), "(2//(s + 2))"),  # 1 where s is empty
        (FloorDiv(S**2 + 3 * S, S + 2), "s"),
        (PythonMod(S**2 + 3 * S, S + 2), "s"),
        (Mod(4 * S + 2, 4), "2"),
        (Mod(6 * S, 4), "2*(Mod(s, 2))"),
        (CleanDiv(B * S, S), "b"),
        (ModularIndexing(S * B * H, S, H), "0"),
        (FloorDiv(2 * Max(S, H), Max(H, S)), "2"),
    ],
)
def test_forms(size: Any, shown: str) -> None:
    assert format_dim(normal_form(size)) == shown


def test_what_has_no_common_form_agrees_by_its_values() -> None:
    modulo, written = PythonMod(S, 4), S - 4 * FloorDiv(S, 4)
    assert normal_form(modulo) != normal_form(written)
    assert agree(modulo, written, {})
    assert agree(Max(S, 4), S, {"s": (4, None)})
    assert not agree(Max(S, 4), S, {})
    assert not agree(S, S + FloorDiv(S, 9_000), {})
    assert not agree(FloorDiv(S, B), FloorDiv(S + 1, B), {})


def test_two_ways_of_writing_one_size_are_one_type() -> None:
    inference = Inference({"b": Range(), "s": Range(2, 512)})

    def row(text: str) -> TensorType:
        return TensorType("float32", (parse_dim(text),))

    assert inference.equal(row("s - 4*(s//4)"), row("PythonMod(s, 4)"))
    assert inference.equal(row("(b*s**2)//(b*s)"), row("s"))
    assert not inference.equal(row("s//2"), row("(s + 1)//2"))


def test_results_are_in_normal_form_for_what_reads_them() -> None:
    """torch's own rules leave (s**2)//s as the size that view finds for -1."""
    inference = Inference({"b": Range(), "s": Range()})
    scores = inference.fake(TensorType("float32", (4 * B, S, S)))
    size_b, size_s = inference.fake(TensorType("int64", (B, S))).shape
    (viewed,) = inference.run("aten.reshape.default", [scores, [size_b, 4, size_s, -1]])
    assert inference.type_of(viewed) == TensorType("float32", (B, 4, S, S))
    assert viewed.shape[3].node.expr == viewed.shape[2].node.expr


MUTANTS = {
    "rounds towards zero": Mutant(
        "size_algebra._quotient", "divmod(coefficient, int(bottom[lead]))", "(int(coefficient / bottom[lead]), 0)"
    ),
    "drops the remainder": Mutant("size_algebra._floor", "whole + FloorDiv(rest, divisor)", "whole"),
    "forgets the common factor of a modulo": Mutant(
        "size_algebra._modulo", "common * (Mod if rest.is_nonnegative else PythonMod)(rest, divisor)", "PythonMod(rest, divisor)"
    ),
    "nests without the divisor": Mutant("size_algebra._floor", "a + beside * b", "a + beside"),
    "subtracts the leading term alone": Mutant("size_algebra._quotient", "one != lead", "False"),
    "agrees after one trial": Mutant("size_algebra.agree", "values[0] != values[1]", "False"),
}
SOLID = (FloorDiv(3 * S - 7, 2), FloorDiv(FloorDiv(S, 2) + 1, 3), Mod(6 * S + 2, 4), FloorDiv(B * S + H, 1 - S), FloorDiv(S * B, B + 1))


def check_values(m: Any) -> None:
    for size in SOLID:
        found = m.normal_form(size)
        points = [point for point in POINTS if point[1] != 1]
        assert [value(found, point) for point in points] == [value(size, point) for point in points]


def check_agreement(m: Any) -> None:
    assert not m["size_algebra.agree"](FloorDiv(S, 2), FloorDiv(S + 1, 2), {})


CHECKS = (check_values, check_agreement)


def test_the_checks_pass_on_the_code_as_it_is() -> None:
    assert killer(unmutated(MUTANTS.values()), CHECKS) is None


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_mistake_is_seen(mutant: Mutant) -> None:
    assert killer(mutated(mutant), CHECKS) is not None
