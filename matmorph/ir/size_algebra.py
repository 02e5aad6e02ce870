"""The normal form of a size: what two ways of writing one number have in common.

A size is a polynomial with integer coefficients over atoms: named axes, which are positive, and what is no polynomial (a floor division
that leaves a remainder, a modulo, a maximum). A quotient p // q is brought to lowest terms and divided:

    floor(p / q) = a + floor(r / q)    where p = a q + r    (a an integer polynomial, r without a term that the leading one of q divides)

so `s**2 // s` is `s`, `(b*s*h) // (b*h)` is `s`, and `(3*s + 1) // 2` is `s + (s + 1) // 2`. For one q the pair (a, r) is unique: the
remainders of two of them differ by a multiple of q whose leading coefficient is smaller than that of q, so by nothing. `p mod q` goes the
same way. What is beyond this, `agree` finds by evaluation.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import sympy
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Mod, ModularIndexing, PythonMod

Bounds = Mapping[str, tuple[int, int | None]]
"""Lowest and highest value of a symbol by name; None: without a limit."""

_TRIALS = 40
"""Two polynomials of degree d in ranges of N values agree in one trial by chance in at most d of N cases (Schwartz 1980, Zippel 1979)."""

_WIDTH = 10_007
"""Values tried of an axis without a limit: a prime, so that their remainders are even for every small divisor."""


@cache
def normal_form(expression: sympy.Expr) -> sympy.Expr:
    """The normal form of an expression over positive integer symbols; it has the same value at every point where it has one."""
    if not expression.args or not expression.has(FloorDiv, Mod, PythonMod, ModularIndexing):
        return sympy.expand(expression)
    args = [normal_form(arg) if isinstance(arg, sympy.Expr) else arg for arg in expression.args]
    rule = _RULES.get(expression.func)
    return sympy.expand(rule(*args) if rule is not None else expression.func(*args))


def agree(left: sympy.Expr, right: sympy.Expr, bounds: Bounds) -> bool:
    """Whether two expressions have one value at every point that is tried: points within `bounds`, the same in every run.

    Expressions that are equal always agree. Such that differ agree with a chance that no test meets (`_TRIALS`).
    """
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    draw = random.Random(0)
    tried = 0
    for trial in range(_TRIALS):
        point = {one: _value(bounds.get(str(one), (1, None)), trial, draw) for one in symbols}
        values = _at(left, point), _at(right, point)
        if None in values:
            continue
        if values[0] != values[1]:
            return False
        tried += 1
    return tried > _TRIALS // 2


def _value(limits: tuple[int, int | None], trial: int, draw: random.Random) -> sympy.Integer:
    """The lowest values one after the other, where a special case would be; then any."""
    low, high = limits
    top = low + _WIDTH if high is None else max(low, high)
    return sympy.Integer(min(low + trial, top) if trial < 3 else draw.randint(low, top))


def _at(expression: sympy.Expr, point: Mapping[Any, sympy.Integer]) -> sympy.Expr | None:
    """The number at a point; None where it is not defined there."""
    try:
        value = expression.xreplace(dict(point))
        value = value.doit() if not value.is_number else value
    except (ZeroDivisionError, ValueError, AssertionError):
        return None
    return value if value.is_number and value.is_finite else None


def _floor(p: sympy.Expr, q: sympy.Expr) -> sympy.Expr:
    """floor(p / q)."""
    parts = _divided(p, q)
    if parts is None:
        return FloorDiv(p, q)
    whole, rest, divisor, _ = parts
    settled = _settled(rest, divisor)
    if settled is not None:
        return whole + settled
    inner = _inner_quotient(rest)
    if inner is None or not divisor.is_positive:
        return whole + FloorDiv(rest, divisor)
    # floor((floor(a / b) + n) / c) = floor((a + n b) / (b c)) for positive integers b, c.
    quotient, beside = inner
    a, b = quotient.args
    return whole + _floor(sympy.expand(a + beside * b), sympy.expand(b * divisor))


def _settled(rest: sympy.Expr, divisor: sympy.Expr) -> int | None:
    """floor(rest / divisor) where the signs of sums of axes say it, also where an axis is empty."""
    if rest == 0 or (_never_negative(rest) and _never_negative(divisor - rest - 1)):
        return 0
    return -1 if _never_negative(-rest - 1) and _never_negative(divisor + rest) else None


def _never_negative(size: sympy.Expr) -> bool:
    empty = {axis: sympy.Dummy(integer=True, nonnegative=True) for axis in size.free_symbols}
    return bool(size.xreplace(empty).is_nonnegative)


def _inner_quotient(rest: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr] | None:
    """(floor(a / b), n) of a remainder floor(a / b) + n with b positive and n a polynomial of the axes alone."""
    found = [term for term in sympy.Add.make_args(rest) if isinstance(term, FloorDiv)]
    if len(found) != 1 or not found[0].args[1].is_positive:
        return None
    beside = rest - found[0]
    return None if beside.has(sympy.Function) else (found[0], beside)


def _modulo(p: sympy.Expr, q: sympy.Expr) -> sympy.Expr:
    """p mod q, in the sign of q: g (r mod q / g) with g the common factor."""
    parts = _divided(p, q)
    if parts is None:
        return PythonMod(p, q)
    _, rest, divisor, common = parts
    settled = _settled(rest, divisor)
    if settled is not None:
        return sympy.expand(common * (rest - settled * divisor))
    return common * (Mod if rest.is_nonnegative else PythonMod)(rest, divisor)


def _indexed(p: sympy.Expr, q: sympy.Expr, modulus: sympy.Expr) -> sympy.Expr:
    return _modulo(_floor(p, q), modulus)


_RULES: Mapping[Any, Callable[..., sympy.Expr]] = {
    FloorDiv: _floor,
    CleanDiv: _floor,
    Mod: _modulo,
    PythonMod: _modulo,
    ModularIndexing: _indexed,
}


Terms = dict[tuple[int, ...], int]
"""A polynomial: coefficient by exponents."""


def _divided(p: sympy.Expr, q: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr, sympy.Expr, sympy.Expr] | None:
    """(a, r, q / g, g) with p / g = a q / g + r, where g is the greatest common factor, in the sign that makes the leading coefficient of
    q / g positive; None where these are no polynomials with integer coefficients."""
    atoms = sorted({part for one in (p, q) for part in _parts(one)}, key=str)
    names = {atom: sympy.Dummy(f"x{k}") for k, atom in enumerate(atoms)}
    axes = tuple(names.values()) or (sympy.Dummy("x"),)  # sympy has no polynomials without a variable
    try:
        top, bottom = (sympy.Poly(one.xreplace(names), *axes, domain=sympy.ZZ) for one in (p, q))
    except (sympy.PolynomialError, sympy.CoercionFailed):
        return None
    if bottom.is_zero:
        return None
    common = sympy.gcd(top, bottom)
    common = common if int(bottom.coeff_monomial(_leading(bottom.monoms()))) > 0 else -common
    divisor = dict(bottom.quo(common).terms())
    whole, rest = _quotient(dict(top.quo(common).terms()), divisor)
    back = {name: atom for atom, name in names.items()}
    a, r, d = (sympy.Poly(terms or {(0,) * len(axes): 0}, *axes).as_expr().xreplace(back) for terms in (whole, rest, divisor))
    return a, r, d, common.as_expr().xreplace(back)


def _parts(expression: sympy.Expr) -> Iterator[sympy.Expr]:
    """The atoms of a polynomial: what is neither a sum, a product, a power with an integer exponent nor a number."""
    if expression.is_Add or expression.is_Mul:
        for arg in expression.args:
            yield from _parts(arg)
    elif expression.is_Pow and expression.exp.is_Integer:
        yield from _parts(expression.base)
    elif not expression.is_Number:
        yield expression


def _leading(exponents: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """The exponents of the highest total degree; of several, the first in the order of the atoms."""
    return max(exponents, key=lambda one: (sum(one), one))


def _quotient(top: Terms, bottom: Terms) -> tuple[Terms, Terms]:
    """(a, r) of two polynomials, the leading coefficient of the second positive."""
    lead = _leading(bottom)
    whole: Terms = {}
    rest: Terms = {}
    left = {one: int(c) for one, c in top.items() if c}
    while left:
        exponents = _leading(left)
        coefficient = left.pop(exponents)
        shift = tuple(a - b for a, b in zip(exponents, lead, strict=True))
        times, remains = divmod(coefficient, int(bottom[lead])) if min(shift) >= 0 else (0, coefficient)
        if remains:
            rest[exponents] = remains
        if not times:
            continue
        whole[shift] = times
        for one, c in bottom.items():
            if one != lead:
                place = tuple(a + b for a, b in zip(one, shift, strict=True))
                left[place] = left.get(place, 0) - times * int(c)
                if not left[place]:
                    del left[place]
    return whole, rest
