"""What few calibration rows can carry: errors on rows that were held out, warnings, refusals. Oracle: fresh rows, and torch hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rewriting import graph_of
from torch import nn

import matmorph as mm
from matmorph.errors import SpecError
from matmorph.ir.core import Graph
from matmorph.ir.site import Statistic
from matmorph.ir.sites.matmuls import find_sites
from matmorph.passes.statistics.calibrate import calibrate

WIDTH = 64
HELD = frozenset({Statistic.INPUT_SECOND_MOMENT, Statistic.HELD_OUT_MOMENT})
FC = """graph device=cpu
range batch 1..
input %x: float32[batch, 6] "x"
parameter %w: float32[4, 6] "fc.weight"
%y: float32[batch, 4] = aten.linear.default(%x, %w)
output %y "output"
"""


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))


def batches(rows: int, size: int, seed: int = 1) -> list[tuple[torch.Tensor]]:
    x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)) * torch.logspace(0, -1, WIDTH)
    return [(part,) for part in x.split(size)]


def compiled(data: Any, method: dict[str, Any], **more: Any) -> Any:
    spec = {"version": 1, "rules": [{"match": {"op": "linear"}, "rewrite": method}], **more}
    return mm.compile(mlp(), spec, (torch.randn(4, WIDTH),), ({0: "batch"},), calibration=data)


WHITE = {"low_rank": {"rank": 16, "whiten": True}}


def fresh_error(result: Any) -> float:
    """Of the first matmul on rows that nobody has seen."""
    w, state = mlp()[0].weight.detach().double(), dict(result.module.named_parameters())
    down, up = (next(value for name, value in state.items() if name.startswith("0.") and name.endswith(part)) for part in ("down", "up"))
    approximation = (down.detach().double() @ up.detach().double()).T
    x = torch.cat([part for (part,) in batches(20_000, 20_000, seed=9)]).double()
    return float((x @ (w - approximation).T).norm() / (x @ w.T).norm())


@pytest.mark.parametrize(("rows", "size"), [(16, 16), (16, 1), (64, 16), (64, 4), (1600, 16)])
def test_the_reported_error_is_that_of_rows_it_was_not_fitted_to(rows: int, size: int) -> None:
    result = compiled(batches(rows, size), WHITE, calibration={"samples": 2000})
    row = result.report.sites[0]
    assert row.sample.fitted + row.sample.judged == rows
    assert row.sample.judged == rows // 5
    # the mean of `judged` energies, each of about 40 free directions on both sides of the fraction: four standard deviations of it
    assert row.output_error == pytest.approx(fresh_error(result), rel=4 / (40 * row.sample.judged) ** 0.5)
    assert 1 <= row.sample.effective_rank <= min(row.sample.fitted, WIDTH)
    warned = rows < 4 * WIDTH
    assert any("for 64 features, fewer than 4 x as many" in note for note in row.notes) == warned
    assert any("too little calibration data: 2 of 2" in note for note in result.report.notes) == warned


def test_one_row_gives_no_error() -> None:
    row = compiled(batches(1, 1), WHITE).report.sites[0]
    assert row.output_error is None
    assert row.notes == ("fitted to 1 row (effective rank 1) for 64 features, fewer than 4 x as many; no row could be held out, "
                         "so there is no output error",)  # fmt: skip
    assert row.weight_error is not None


def test_a_fixed_damping_is_kept_and_its_error_is_honest() -> None:
    """What used to be 0.0000 on its own rows."""
    row = compiled(batches(20, 20), {"low_rank": {"rank": 16, "whiten": True, "damping": 1e-6}}).report.sites[0]
    assert row.sample.fitted_error < 0.01
    assert row.output_error > 0.4


@pytest.mark.parametrize(("rows", "method", "refused"), [
    (1, WHITE, "0 has 64 features, and rule rule-1 would fit it to 1 row"),
    (60, WHITE, "0 has 64 features, and rule rule-1 would fit it to 48 rows"),
    (60, {"loftq": {"quantizer": "nf4", "rank": 4, "whiten": True}}, "would fit it to 48 rows"),
    (60, {"any_of": [WHITE, "keep"]}, "would fit it to 48 rows"),
    (600, WHITE, None),
    (60, {"quantize": {"quantizer": "nf4"}}, None),
])  # fmt: skip
def test_a_tolerance_needs_a_sample_that_carries_it(rows: int, method: dict[str, Any], refused: str | None) -> None:
    more: dict[str, Any] = {"tolerance": {"output_error": 0.9}}
    if "any_of" in method:
        more["budget"] = {"parameters": "90%"}
    if refused is None:
        assert compiled(batches(rows, 12), method, **more).report.sites[0].output_error < 0.9
        return
    with pytest.raises(SpecError, match=r"^tolerance\.output_error: a limit on output errors needs more calibration data: 0 has") as caught:
        compiled(batches(rows, 12), method, **more)
    assert caught.value.message.endswith(refused)
    assert caught.value.details == ("give 4 rows or more per feature, 256 here; a fifth of them is held out, to measure errors on",)


# which rows are held out


def graph() -> Graph:
    return graph_of(FC)


def found(data: list[tuple[torch.Tensor]], samples: int = 10**6, **more: Any) -> Any:
    (site,) = find_sites(net := graph())
    return calibrate(net, [(site, HELD)], data, samples, **more)[site]


def split(rows: torch.Tensor, held: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    kept, left = rows[~held].double(), rows[held].double()
    return kept.T @ kept, left.T @ left


X = torch.randn(23, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("spill", [1 << 30, 0])
@pytest.mark.parametrize(("size", "held"), [
    (2, [8, 9, 18, 19]),  # the fifth and the tenth of twelve batches
    (4, [16, 17, 18, 19]),  # the fifth of six
    (6, [4, 10, 16, 22]),  # four batches: the fifth sample of each
    (23, [4, 9, 14, 19]),
])  # fmt: skip
def test_every_fifth_batch_or_sample_is_held_out(size: int, held: list[int], spill: int) -> None:
    stats = found([(part,) for part in X.split(size)], spill_above=spill)
    chosen = torch.zeros(23, dtype=torch.bool)
    chosen[held] = True
    kept, left = split(X, chosen)
    assert (stats.rows, stats.held_rows) == (23 - len(held), len(held))
    # float32 products of at most 23 rows of size 1
    torch.testing.assert_close(stats.second_moment, kept, rtol=0, atol=1e-5)
    torch.testing.assert_close(stats.held_out, left, rtol=0, atol=1e-5)


def test_a_limit_of_samples_counts_the_batches_that_are_read() -> None:
    read: list[int] = []

    def lazy() -> Any:
        for index, part in enumerate(X.split(2)):
            read.append(index)
            yield (part,)

    stats = found(lazy(), samples=8)  # type: ignore[arg-type] # any iterable
    assert read == [0, 1, 2, 3]
    assert (stats.rows, stats.held_rows) == (8, 0)
    assert stats.held_out is None, "two samples of a batch have no fifth"


def test_nothing_is_held_out_where_nothing_is_fitted() -> None:
    """One accumulator and all rows: an error of a plain method needs no rows of its own."""
    row = compiled(batches(40, 4), {"low_rank": {"rank": 16}}).report.sites[0]
    assert (row.sample.fitted, row.sample.judged, row.sample.fitted_error) == (0, 40, None)
