"""Second-order rounding: held to an elimination written from the GPTQ paper in float64, and to nearest rounding on the identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mutating import Check, Mutant, killer, mutated, unmutated
from torch import Tensor

from matmorph.passes.linalg import second_order
from matmorph.passes.linalg.quantize import Quantizer, quantize
from matmorph.passes.linalg.second_order import compensated, curvature, rounding_of

U4 = Quantizer("uniform", 4, 32, zero_point=True, scale="search")
U3 = Quantizer("uniform", 3, 16, zero_point=True)
U2 = Quantizer("uniform", 2, 16)
NF3 = Quantizer("nf3", block_size=32)
LEVELS = {"nf3": np.array([-1, -0.4786292016, -0.2171417922, 0, 0.1609302014, 0.3379152417, 0.5626170039, 1])}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(rows: int, features: int, *, tails: bool = False, seed: int = 5) -> Tensor:
    """Correlated features of very different sizes; with `tails` one row in fifty is a hundred times larger."""
    x = normal(rows, features, seed=seed) @ (normal(features, features, seed=seed + 1) / features**0.5 + torch.eye(features))
    x *= torch.linspace(-1.5, 1.5, features, dtype=torch.float64)[
        torch.randperm(features, generator=torch.Generator().manual_seed(3))
    ].exp()
    if tails:
        x[::50] *= 100
    return x


# The oracle: Optimal Brain Quantization with a shared order, by elimination in the inverse itself (equations 2 and 3 of the paper).


def eliminated(w: np.ndarray, h: np.ndarray, rounded: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
    """float64 [out, in] on the levels of `rounded(column, j)`, for a damped moment `h`."""
    rest, inverse, result = w.copy(), np.linalg.inv(h), np.zeros_like(w)
    for j in np.argsort(-h.diagonal(), kind="stable"):
        result[:, j] = rounded(rest[:, j], j)
        error = (rest[:, j] - result[:, j]) / inverse[j, j]
        rest -= np.outer(error, inverse[j])
        inverse = inverse - np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return result


def levels_of(q: Any, shape: tuple[int, int]) -> Callable[[np.ndarray, int], np.ndarray]:
    """The nearest of all the numbers that the entry may become, by trying each."""
    scales, block, (out, features) = q.scales.double().numpy(), q.quantizer.block_size, shape
    rows = np.arange(out)

    def rounded(column: np.ndarray, j: int) -> np.ndarray:
        if q.quantizer.name in LEVELS:
            every = LEVELS[q.quantizer.name] * scales[(rows * features + j) // block][:, None]
        else:
            top = 2**q.quantizer.width
            zero = np.full(out, top // 2) if q.zero_points is None else q.zero_points[:, j // block].numpy().astype(int)
            every = (np.arange(top)[None] - zero[:, None]) * scales[:, j // block][:, None]
        return every[rows, np.abs(every - column[:, None]).argmin(1)]

    return rounded


CASES = {
    "heavy tails": (U4, (24, 96), inputs(2000, 96, tails=True)),
    "fewer rows than features": (U4, (24, 96), inputs(40, 96)),
    "odd shape, more than one lazy batch": (U2, (7, 203), inputs(1000, 203)),
    "a table as its head reads it": (U3, (151, 64), inputs(600, 64)),
    "levels of a table, blocks over two rows": (NF3, (9, 48), inputs(600, 48)),
}


def damped(x: Tensor) -> np.ndarray:
    """H / rows with its damping; of too few rows oracle approximating shrinkage, from its formula (eq. 23)."""
    rows, n = x.shape
    s = (x.T @ x / rows).numpy()
    trace, square = np.trace(s), np.square(s).sum()
    rho = min(1.0, ((1 - 2 / n) * square + trace**2) / ((rows + 1 - 2 / n) * (square - trace**2 / n)))
    share = 0.01 if rows >= n else max(0.01, rho / (1 - rho))
    return s + share * trace / n * np.eye(n)


def check_oracle(m: Any, case: str) -> None:
    quantizer, shape, x = CASES[case]
    w = (normal(*shape, seed=9) * normal(*shape, seed=10).abs()).float()
    grid = quantize(w, quantizer)
    found = m.compensated(w, grid, m.curvature(x.T @ x, len(x))).dequantize().double().numpy()
    exact = w.double().numpy()
    wanted = eliminated(exact, damped(x), levels_of(grid, shape))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)  # of levels that lie 0.01 apart and more: the codes are the same
    errors = [np.linalg.norm((exact - q) @ x.numpy().T) for q in (found, grid.dequantize().double().numpy())]
    assert errors[0] < 0.9 * errors[1]  # what it is for


@pytest.mark.parametrize("case", CASES)
def test_codes_are_those_of_the_elimination_of_the_paper(case: str) -> None:
    check_oracle(second_order, case)


@pytest.mark.parametrize("quantizer", [U4, U3, U2, NF3, Quantizer("uniform", 8, 64)], ids=str)
def test_on_the_identity_it_is_nearest_rounding_to_the_bit(quantizer: Quantizer) -> None:
    w = normal(37, 100, seed=2).float()
    grid = quantize(w, quantizer, torch.ones(100))
    found = compensated(w, grid, curvature(1000 * torch.eye(100), 1000))
    plain = quantize(w, quantizer)
    assert torch.equal(found.codes, plain.codes)
    assert torch.equal(found.scales, plain.scales)
    assert (found.zero_points is None) == (plain.zero_points is None)
    assert found.zero_points is None or plain.zero_points is None or torch.equal(found.zero_points, plain.zero_points)


def test_too_few_rows_are_damped_more_and_it_is_said() -> None:
    x = inputs(40, 96)
    notes = curvature(x.T @ x, 40).notes
    assert len(notes) == 1
    assert notes[0].startswith("damping raised from 0.01 to ")
    assert notes[0].endswith(": 40 rows do not determine 96 features")
    enough = inputs(4000, 96)
    assert curvature(enough.T @ enough, 4000).notes == ()


def test_without_data_it_rounds_to_nearest_and_says_so() -> None:
    w = normal(5, 32).float()
    curved = curvature(torch.zeros(32, 32), 0)
    assert curved.notes == ("no calibration data reached this input: rounded to nearest",)
    assert torch.equal(compensated(w, quantize(w, U4), curved).codes, quantize(w, U4).codes)


def test_bad_moments_and_quantizers_without_blocks() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        curvature(torch.full((4, 4), torch.nan), 9)
    with pytest.raises(ValueError, match="one scale for the whole tensor"):
        rounding_of(quantize(normal(4, 8), Quantizer("uniform_clipped", 4)))


def test_a_weighted_search_is_the_best_of_its_grid_under_the_weights() -> None:
    """Weighted squared error of a block, from the definition, against that of the plain search: smaller in sum, and much where one feature
    counts a thousand times more."""
    w = normal(64, 128, seed=4).float()
    importance = torch.ones(128, dtype=torch.float64)
    importance[::16] = 1000
    plain, found = (quantize(w, U4, one).dequantize().double() for one in (None, importance))
    blocks = [((w - q).square() * importance).view(64, 4, 32).sum(2) for q in (plain, found)]
    assert float(blocks[1].sum()) < 0.7 * float(blocks[0].sum())
    assert float((blocks[1] <= blocks[0] * (1 + 1e-6)).double().mean()) > 0.95  # local refits: not each of them


MUTANTS = {
    "order of the features forgotten": Mutant("curvature", "power.argsort(descending=True, stable=True)", "torch.arange(n)"),
    "ascending order": Mutant("curvature", "power.argsort(descending=True, stable=True)", "power.argsort(descending=False, stable=True)"),
    "damping forgotten": Mutant("DAMPING", "0.01", "1e-06"),
    "few rows not damped more": Mutant("second_order._damping", "rows >= len(moment)", "True"),
    "block by the order of rounding": Mutant("compensated", "rounding(order[at], rest[at])", "rounding(at, rest[at])"),
    "block boundary off by one": Mutant("rounding_of", "divisor[here]", "divisor[max(j - 1, 0) // block]"),
    "error not propagated": Mutant("compensated", "rest[at + 1 : stop].addr_(row[1:], error, alpha=-1)", "pass"),
    "error not propagated to later batches": Mutant(
        "compensated", "rest[stop:].addmm_(factor[start:stop, stop:].T, errors[: stop - start], alpha=-1)", "pass"
    ),
    "error added": Mutant(
        "compensated", "rest[at + 1 : stop].addr_(row[1:], error, alpha=-1)", "rest[at + 1 : stop].addr_(row[1:], error, alpha=1)"
    ),
    "error not divided": Mutant(
        "compensated",
        "torch.sub(rest[at], level, out=errors[at - start]).div_(row[0])",
        "torch.sub(rest[at], level, out=errors[at - start])",
    ),
    "codes in the order of rounding": Mutant("compensated", "codes[order[at]] = found", "codes[at] = found"),
    "moment instead of its inverse": Mutant(
        "curvature",
        "torch.linalg.solve_triangular(found.factor.flip(0, 1), torch.eye(n, dtype=torch.float64), upper=True)",
        "found.factor.flip(0, 1)",
    ),
}


def checks() -> tuple[Check, ...]:
    def check(case: str) -> Check:
        def held(m: Any) -> None:
            check_oracle(m, case)

        return held

    return tuple(map(check, CASES))


def test_the_checks_pass_on_the_real_code() -> None:
    assert killer(unmutated(MUTANTS.values()), checks()) is None


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_killed(name: str) -> None:
    assert killer(mutated(MUTANTS[name]), checks()), "no check noticed"
