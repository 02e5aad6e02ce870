"""Dims survive their text form, and mean the same numbers in it."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._sympy.functions import FloorDiv, IntTrueDiv, Max, Min, Mod, ToFloat

from matmorph.ir.types import (
    ScalarType,
    TensorType,
    as_dim,
    dim_symbols,
    dtype_name,
    element_size,
    format_dim,
    parse_dim,
    symbol,
)

BATCH, SEQ = symbol("batch"), symbol("seq")
LEAVES = st.one_of(st.integers(1, 9), st.sampled_from([BATCH, SEQ]))


def _combine(children: st.SearchStrategy) -> st.SearchStrategy:
    divisors = st.integers(2, 7)
    return st.one_of(
        st.tuples(children, children).map(lambda pair: pair[0] + pair[1]),
        st.tuples(children, children).map(lambda pair: pair[0] * pair[1]),
        st.tuples(children, divisors).map(lambda pair: FloorDiv(pair[0], pair[1])),
        st.tuples(children, divisors).map(lambda pair: Mod(pair[0], pair[1])),
        st.tuples(children, children).map(lambda pair: Max(*pair)),
        st.tuples(children, children).map(lambda pair: Min(*pair)),
    )


DIMS = st.recursive(LEAVES, _combine, max_leaves=6).map(as_dim)


@given(DIMS)
def test_a_dim_is_read_back_as_it_was_printed(dim: object) -> None:
    assert parse_dim(format_dim(dim)) == dim


@given(DIMS, st.integers(1, 20), st.integers(1, 20))
def test_the_printed_dim_means_the_same_number(dim: object, batch: int, seq: int) -> None:
    printed = eval(format_dim(dim), {"Max": max, "Min": min, "Mod": lambda a, b: a % b, "batch": batch, "seq": seq})
    expected = dim if isinstance(dim, int) else int(dim.subs({BATCH: batch, SEQ: seq}))
    assert printed == expected


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("16*seq", "16*seq"),
        ("seq*batch", "batch*seq"),
        ("(seq + 3)//4", "((seq + 3)//4)"),
        ("2*(seq + 1)", "2*seq + 2"),
        ("Max(seq, 5)", "Max(5, seq)"),
        ("-(-seq)", "seq"),
        ("7", "7"),
    ],
)
def test_dims_have_one_form(text: str, shown: str) -> None:
    assert format_dim(parse_dim(text)) == shown


def test_a_number_is_a_plain_int() -> None:
    assert type(as_dim(sympy.Integer(4))) is int
    assert type(parse_dim("2*3")) is int


def test_floor_division_is_torchs_own() -> None:
    assert parse_dim("seq//4") == FloorDiv(SEQ, 4)
    assert parse_dim("Mod(seq, 4)") == Mod(SEQ, 4)


@pytest.mark.parametrize("number", [1 / 3, 0.1, 1e-30, 2.0**60])
def test_factors_of_a_float_keep_every_digit(number: float) -> None:
    dim = as_dim(number * ToFloat(SEQ))
    assert parse_dim(format_dim(dim)) == dim
    assert parse_dim(format_dim(as_dim(IntTrueDiv(SEQ, 4)))) == IntTrueDiv(SEQ, 4)


@pytest.mark.parametrize("text", ["", "seq +", "open('x')", "seq.real", "[1]", "'a'", "seq if seq else 1", "lambda: 1"])
def test_anything_but_arithmetic_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a dimension"):
        parse_dim(text)


def test_types_print_and_know_their_size() -> None:
    kind = TensorType("bfloat16", (BATCH, 4 * SEQ, 8))
    assert str(kind) == "bfloat16[batch, 4*seq, 8]"
    assert kind.torch_dtype is torch.bfloat16
    assert (element_size("bfloat16"), element_size("int64"), dtype_name(torch.int8)) == (2, 8, "int8")
    assert dim_symbols(kind.shape) == {"batch", "seq"}
    assert (str(ScalarType("int", SEQ)), str(ScalarType("bool"))) == ("int(seq)", "bool")
    with pytest.raises(ValueError, match="not a torch dtype"):
        TensorType("nn", ()).torch_dtype  # noqa: B018
