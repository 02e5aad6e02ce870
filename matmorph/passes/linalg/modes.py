"""Mode sizes of tensor trains: how `out` and `in` features split into factors.

A TT-matrix of W [out, in] with d cores has d output modes and d input modes; core k holds `out_k * in_k` of them (Novikov et al., arXiv
1509.06569). A TT-vector has one `shape` for all of W, input modes first: the TT-LoRA papers (arXiv 2408.01008, 2504.21190).

Factors are as equal as they can be, because the parameters of a train grow with their sum. A size "fits" d modes where its largest factor
is at most `SPREAD` times the d-th root of the size: 4099 is a prime, and 1 x 1 x 4099 would be a train in name only. Sizes that do not fit
are refused with the nearest that do, or padded up to one (`padded_modes`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from math import inf, isqrt, prod
from operator import mul

SPREAD = 4.0
"""Largest factor over the d-th root of the size that still counts as balanced."""


@dataclass(frozen=True, slots=True)
class Modes:
    """Output modes and input modes of a TT-matrix, one pair per core. Raises ValueError for unequal counts, none, or a mode below 1."""

    out: tuple[int, ...]
    in_: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.out) != len(self.in_) or not self.out:
            raise ValueError(f"as many output modes as input modes are needed, not {list(self.out)} and {list(self.in_)}")
        if min(*self.out, *self.in_) < 1:
            raise ValueError(f"modes are at least 1, not {list(self.out)} and {list(self.in_)}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """out_k * in_k of each core."""
        return tuple(map(mul, self.out, self.in_))

    @property
    def out_features(self) -> int:
        return prod(self.out)

    @property
    def in_features(self) -> int:
        return prod(self.in_)

    def __len__(self) -> int:
        return len(self.out)


def factors(size: int, d: int, *, ones: bool = True) -> tuple[int, ...] | None:
    """`size` as a product of d factors with the smallest sum, descending, or None where it does not fit (see the module's docstring).

    `ones`: a factor of 1 may stand where `size` has fewer than d prime factors (6 = 3 * 2 * 1). ValueError for a size or d below 1."""
    if size < 1 or d < 1:
        raise ValueError(f"a size of at least 1 and at least one mode are needed, not {size} and {d}")
    limit = max(SPREAD * size ** (1 / d), 2)
    primes = _primes(size, int(limit))
    if primes is None or (d > len(primes) and not ones):
        return None
    # With as many modes as prime factors or more there is one way: two factors have no smaller a sum together than their primes.
    found = (*primes, *(1,) * (d - len(primes))) if d >= max(len(primes), 1) else _balanced(size, d, 1 if ones else 2)
    return found if found and found[0] <= limit else None


def _primes(size: int, limit: int) -> tuple[int, ...] | None:
    """The prime factors, descending; None where one is above `limit`."""
    found: list[int] = []
    rest, prime = size, 2
    while prime * prime <= rest and prime <= limit:
        while rest % prime == 0:
            found.append(prime)
            rest //= prime
        prime += 1
    if rest > 1:
        found.append(rest)
    return tuple(reversed(found)) if not found or found[-1] <= limit else None


def nearest_sizes(size: int, d: int, *, ones: bool = True) -> tuple[int, ...]:
    """The largest size below and the smallest above `size` that fit d modes; only the latter where none below does."""
    below = next((n for n in range(size - 1, 0, -1) if factors(n, d, ones=ones)), None)
    return (*(() if below is None else (below,)), _at_least(size + 1, d, ones))


def balanced_modes(out: int, in_: int, d: int, *, ones: bool = True) -> Modes:
    """d balanced pairs for W [out, in]: large output modes beside small input modes, the largest cores at the ends.

    Raises ValueError, naming the nearest sizes that fit, where `out` or `in_` does not."""
    refused = [text for name, size in (("out", out), ("in", in_)) if (text := size_problem(name, size, d, ones=ones))]
    if refused:
        raise ValueError("; ".join(refused))
    return _paired(_known(out, d, ones), _known(in_, d, ones))


def padded_modes(out: int, in_: int, d: int, *, ones: bool = True) -> Modes:
    """`balanced_modes` of the smallest sizes from `out` and `in_` upwards that fit: W is a corner of a zero matrix of that size."""
    return _paired(*(_known(_at_least(size, d, ones), d, ones) for size in (out, in_)))


def balanced_shape(out: int, in_: int, d_out: int, d_in: int, *, ones: bool = True) -> tuple[int, ...]:
    """A TT-vector shape: d_in input modes descending, d_out output modes ascending, as the papers write theirs. ValueError as above."""
    refused = [text for name, size, d in (("out", out, d_out), ("in", in_, d_in)) if (text := size_problem(name, size, d, ones=ones))]
    if refused:
        raise ValueError("; ".join(refused))
    return (*_known(in_, d_in, ones), *reversed(_known(out, d_out, ones)))


def size_problem(name: str, size: int, d: int, *, ones: bool = True) -> str | None:
    """Why `size` features on the side `name` ("out" or "in") do not fit d modes, with the nearest sizes that do; None if they do."""
    if factors(size, d, ones=ones):
        return None
    near = " and ".join(f"{n} ({_times(_known(n, d, ones))})" for n in nearest_sizes(size, d, ones=ones))
    return f"{name}_features = {size} has no {d} balanced factors; the nearest sizes that have: {near}"


def modes_problem(out_modes: Sequence[int], in_modes: Sequence[int], out: int, in_: int) -> str | None:
    """Why modes written by hand do not fit W [out, in], with modes or sizes that would; None if they do."""
    if not out_modes or len(out_modes) != len(in_modes):
        return f"as many output modes as input modes are needed, not {len(out_modes)} and {len(in_modes)}"
    sides = (("out", out_modes, out), ("in", in_modes, in_))
    return next((text for name, modes, size in sides if (text := _product_problem(name, modes, size))), None)


def shape_problem(shape: Sequence[int], out: int, in_: int) -> str | None:
    """Why a TT-vector shape written by hand does not fit W [out, in]; None if it does."""
    if any(mode < 1 for mode in shape):
        return f"modes are at least 1, not {list(shape)}"
    if prod(shape) != out * in_:
        fitting = _fitting_shape(out, in_, len(shape))
        return f"shape {list(shape)} multiplies to {prod(shape)}, not to in * out = {in_} * {out} = {out * in_}{fitting}"
    if in_ not in _prefixes(shape):
        return _no_boundary(shape, in_) + _fitting_shape(out, in_, len(shape))
    return None


def boundary(shape: Sequence[int], in_features: int) -> int:
    """How many first modes of a TT-vector shape are input modes: the shortest prefix whose product is `in_features`.

    Raises ValueError where there is none; `shape_problem` says more."""
    products = _prefixes(shape)
    if in_features not in products:
        raise ValueError(_no_boundary(shape, in_features))
    return products.index(in_features) + 1


def _no_boundary(shape: Sequence[int], in_features: int) -> str:
    products = ", ".join(map(str, _prefixes(shape)))
    return f"no first modes of shape {list(shape)} multiply to in_features = {in_features} (they give {products})"


def _prefixes(shape: Sequence[int]) -> list[int]:
    return list(accumulate(shape, mul))


def _product_problem(name: str, modes: Sequence[int], size: int) -> str | None:
    if any(mode < 1 for mode in modes):
        return f"modes are at least 1, not {list(modes)}"
    if prod(modes) == size:
        return None
    found = factors(size, len(modes))
    advice = f"{list(found)} would fit" if found else size_problem(name, size, len(modes))
    return f"{name} modes {list(modes)} multiply to {prod(modes)}, not to {name}_features = {size}; {advice}"


def _fitting_shape(out: int, in_: int, d: int) -> str:
    if d < 2:
        return "; at least one input mode and one output mode are needed"
    try:
        return f"; {list(balanced_shape(out, in_, d // 2, d - d // 2))} would fit"
    except ValueError as error:
        return f"; {error}"


def _paired(out: Sequence[int], in_: Sequence[int]) -> Modes:
    pairs = sorted(zip(sorted(out), sorted(in_, reverse=True), strict=True), key=lambda pair: (-prod(pair), pair))
    ordered = [*pairs[0::2], *reversed(pairs[1::2])]
    return Modes(tuple(first for first, _ in ordered), tuple(second for _, second in ordered))


def _known(size: int, d: int, ones: bool) -> tuple[int, ...]:
    found = factors(size, d, ones=ones)
    if found is None:
        raise ValueError(f"{size} has no {d} balanced factors")
    return found


def _at_least(size: int, d: int, ones: bool) -> int:
    return next(n for n in count(size) if factors(n, d, ones=ones))


def _balanced(size: int, d: int, least: int) -> tuple[int, ...] | None:
    """Branch and bound: factors ascending, each tried from the d-th root of what is left downwards; AM-GM bounds the rest of the sum."""
    best: tuple[int, ...] | None = None
    smallest: float = inf

    def extend(rest: int, left: int, chosen: tuple[int, ...]) -> None:
        nonlocal best, smallest
        if left == 1:
            if rest >= (chosen[-1] if chosen else least) and sum(chosen) + rest < smallest:
                best, smallest = (*chosen, rest), sum(chosen) + rest
            return
        if sum(chosen) + left * rest ** (1 / left) >= smallest + 1e-9:
            return
        for factor in _divisors_down(rest, left, chosen[-1] if chosen else least):
            extend(rest // factor, left - 1, (*chosen, factor))

    extend(size, d, ())
    return None if best is None else tuple(reversed(best))


def _divisors_down(rest: int, left: int, least: int) -> Iterator[int]:
    """Divisors f of `rest` with least <= f and f^left <= rest, descending."""
    start = isqrt(rest) if left == 2 else int(rest ** (1 / left)) + 1
    return (f for f in range(start, least - 1, -1) if rest % f == 0 and f**left <= rest)


def _times(modes: Sequence[int]) -> str:
    return " x ".join(map(str, modes))


def nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of `size` that is nearest to a number, the smaller of two."""
    return min((k for k in range(1, size + 1) if size % k == 0), key=lambda k: (abs(k - wanted), k))
