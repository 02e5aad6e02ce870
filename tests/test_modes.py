"""Mode sizes of tensor trains: held to brute force over all factorisations, and to the texts a user gets."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matmorph.passes.linalg.modes import (
    SPREAD,
    Modes,
    balanced_modes,
    balanced_shape,
    boundary,
    factors,
    modes_problem,
    nearest_sizes,
    padded_modes,
    shape_problem,
    size_problem,
)


def factorisations(size: int, d: int) -> Iterator[tuple[int, ...]]:
    """All ordered ones, straight from the definition."""
    if d == 1:
        yield (size,)
        return
    for first in range(1, size + 1):
        if size % first == 0:
            yield from ((first, *rest) for rest in factorisations(size // first, d - 1))


@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 400), d=st.integers(1, 4), ones=st.booleans())
def test_factors_have_the_smallest_sum_or_do_not_fit(size: int, d: int, ones: bool) -> None:
    allowed = [modes for modes in factorisations(size, d) if ones or min(modes) > 1]
    found = factors(size, d, ones=ones)
    if found is None:
        assert all(max(modes) > max(SPREAD * size ** (1 / d), 2) for modes in allowed if sum(modes) == min(map(sum, allowed)))
        return
    assert prod(found) == size
    assert len(found) == d
    assert list(found) == sorted(found, reverse=True)
    assert sum(found) == min(map(sum, allowed))
    assert ones or min(found) > 1
    assert max(found) <= max(SPREAD * size ** (1 / d), 2)


@settings(max_examples=80, deadline=None)
@given(size=st.integers(2, 200_000), d=st.integers(1, 6), ones=st.booleans())
def test_the_nearest_sizes_fit_and_none_lies_between(size: int, d: int, ones: bool) -> None:
    near = nearest_sizes(size, d, ones=ones)
    assert all(factors(n, d, ones=ones) for n in near)
    below = near[0] if len(near) == 2 else 0
    assert below < size < near[-1]
    assert not any(factors(n, d, ones=ones) for n in range(below + 1, near[-1]) if n != size)


@settings(max_examples=100, deadline=None)
@given(out=st.integers(1, 6000), in_=st.integers(1, 6000), d=st.integers(1, 5))
def test_automatic_modes_multiply_to_the_sizes_or_name_others(out: int, in_: int, d: int) -> None:
    padded = padded_modes(out, in_, d)
    assert padded.out_features >= out
    assert padded.in_features >= in_
    assert len(padded) == d
    names = [name for name, size in (("out", out), ("in", in_)) if factors(size, d) is None]
    if names:
        with pytest.raises(ValueError, match="balanced factors") as caught:
            balanced_modes(out, in_, d)
        for name, size in (("out", out), ("in", in_)):
            assert (f"{name}_features = {size} " in str(caught.value)) == (name in names)
            assert name not in names or all(str(near) in str(caught.value) for near in nearest_sizes(size, d))
        assert (padded.out_features, padded.in_features) != (out, in_)
        return
    modes = balanced_modes(out, in_, d)
    assert padded == modes
    assert (modes.out_features, modes.in_features) == (out, in_)
    assert modes.sizes == tuple(a * b for a, b in zip(modes.out, modes.in_, strict=True))
    assert modes_problem(modes.out, modes.in_, out, in_) is None
    middle = modes.sizes[1:-1]
    assert not middle or max(middle) <= min(modes.sizes[0], modes.sizes[-1]), "the largest cores have one rank only"


@pytest.mark.parametrize(
    ("out", "in_", "d", "expected"),
    [
        (4096, 4096, 3, Modes((16, 16, 16), (16, 16, 16))),
        (1024, 1024, 3, Modes((8, 8, 16), (16, 8, 8))),
        (768, 3072, 3, Modes((12, 8, 8), (12, 16, 16))),
        (11008, 4096, 3, Modes((43, 16, 16), (16, 16, 16))),
        (2, 768, 3, Modes((2, 1, 1), (8, 8, 12))),  # a head of two classes: modes of 1
        (7, 5, 2, Modes((7, 1), (1, 5))),  # primes small enough
        (30, 30, 1, Modes((30,), (30,))),
    ],
)
def test_balanced_modes_of_sizes_that_occur(out: int, in_: int, d: int, expected: Modes) -> None:
    assert balanced_modes(out, in_, d) == expected


def test_a_large_prime_is_refused_with_the_nearest_sizes_or_padded() -> None:
    with pytest.raises(ValueError, match=r"^out_features = 4099 has no 3 balanced factors; the nearest sizes that have: ") as caught:
        balanced_modes(4099, 4096, 3)
    assert str(caught.value).endswith("4096 (16 x 16 x 16) and 4100 (41 x 10 x 10)")
    assert padded_modes(4099, 4096, 3).out_features == 4100
    assert padded_modes(4099, 4096, 3).in_features == 4096
    assert factors(4099, 1) == (4099,)
    assert nearest_sizes(2, 2, ones=False) == (4,), "no product of two factors of 2 or more is smaller"
    assert size_problem("in", 2, 2, ones=False) == "in_features = 2 has no 2 balanced factors; the nearest sizes that have: 4 (2 x 2)"


def test_automatic_shapes_put_the_input_first_and_small_modes_in_the_middle() -> None:
    assert balanced_shape(4096, 4096, 4, 4) == (8,) * 8
    assert balanced_shape(512, 2048, 3, 4) == (8, 8, 8, 4, 8, 8, 8)
    assert balanced_shape(768, 768, 3, 3) == (12, 8, 8, 8, 8, 12)
    assert shape_problem(balanced_shape(512, 2048, 3, 4), 512, 2048) is None
    with pytest.raises(ValueError, match=r"in_features = 4099 has no 2 balanced factors; the nearest"):
        balanced_shape(64, 4099, 2, 2)


def test_modes_by_hand_are_checked_side_by_side() -> None:
    assert modes_problem([16, 16, 16], [8, 8, 12], 4096, 768) is None
    assert modes_problem([1, 4099], [4, 4], 4099, 16) is None, "by hand anything that multiplies goes"
    assert (
        modes_problem([16, 16, 15], [16] * 3, 4096, 4096)
        == "out modes [16, 16, 15] multiply to 3840, not to out_features = 4096; [16, 16, 16] would fit"
    )
    wrong = modes_problem([16, 16], [8, 8], 256, 4099)
    assert wrong == f"in modes [8, 8] multiply to 64, not to in_features = 4099; {size_problem('in', 4099, 2)}"
    assert modes_problem([4, 4], [4], 16, 4) == "as many output modes as input modes are needed, not 2 and 1"
    assert modes_problem([], [], 1, 1) == "as many output modes as input modes are needed, not 0 and 0"
    assert modes_problem([0, 4], [4, 1], 0, 4) == "modes are at least 1, not [0, 4]"


def test_shapes_by_hand_need_a_boundary() -> None:
    papers = [16, 8, 8, 4, 4, 8, 8, 16]
    assert shape_problem(papers, 4096, 4096) is None
    assert boundary(papers, 4096) == 4
    assert boundary([16, 16, 4, 2, 2, 16, 16], 2048) == 4
    assert boundary([4, 1, 3], 4) == 1, "the shortest prefix"
    assert (
        shape_problem([16, 8, 8, 4, 4, 8, 8, 15], 4096, 4096)
        == "shape [16, 8, 8, 4, 4, 8, 8, 15] multiplies to 15728640, not to in * out = 4096 * 4096 = 16777216; "
        "[8, 8, 8, 8, 8, 8, 8, 8] would fit"
    )
    no_prefix = "no first modes of shape [6, 4, 6] multiply to in_features = 12 (they give 6, 24, 144)"
    assert shape_problem([6, 4, 6], 12, 12) == f"{no_prefix}; [4, 3, 12] would fit"
    with pytest.raises(ValueError, match=r"no first modes of shape \[6, 4, 6\] multiply to in_features = 12"):
        boundary([6, 4, 6], 12)
    assert shape_problem([5, 0], 5, 5) == "modes are at least 1, not [5, 0]"
    assert shape_problem([20], 5, 5) == (
        "shape [20] multiplies to 20, not to in * out = 5 * 5 = 25; at least one input mode and one output mode are needed"
    )
    assert "in_features = 4099 has no 2 balanced factors" in (shape_problem([8, 8, 8, 8], 64, 4099) or "")


def test_wrong_arguments_are_said() -> None:
    for out, in_ in (((4, 4), (4,)), ((), ())):
        with pytest.raises(ValueError, match="as many output modes as input modes"):
            Modes(out, in_)
    with pytest.raises(ValueError, match="modes are at least 1"):
        Modes((4, 0), (4, 4))
    for size, d in ((0, 2), (4, 0)):
        with pytest.raises(ValueError, match="a size of at least 1 and at least one mode"):
            factors(size, d)


def test_a_size_with_many_divisors_is_quick() -> None:
    """720720 has 240 divisors and hundreds of thousands of factorisations; branch and bound looks at few. A hang would fail the suite."""
    assert prod(factors(720720, 8) or ()) == 720720
