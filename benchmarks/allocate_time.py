"""What does a budget cost beside the decompositions that it chooses from? BERT-base's 72 linears, 8 ranks each.

Candidates: the errors of all ranks of all matmuls, whitened, as compile asks for them. Decompositions: one `torch.linalg.svd` of each
whitened matrix. The choice: the exact allocation at 40, 60 and 80 % of the parameters. Weights are random with falling spectra, and
second moments those of random rows with features of very different size.

    python benchmarks/allocate_time.py [--json] [--threads N]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from _common import finish, parser, tell
from torch import Tensor, nn

from matmorph.ir.site import Choice, Site
from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.tracing.trace import trace
from matmorph.passes.budget.knapsack import Allocation, Candidate, allocate
from matmorph.passes.linalg.parallel import ordered_map
from matmorph.passes.linalg.whiten import whitening_factor
from matmorph.passes.methods.low_rank.method import LowRank, LowRankSpec
from matmorph.passes.methods.protocol import SiteStats
from matmorph.specs.schema import Rank

WIDTH, INNER, LAYERS, RANKS = 768, 3072, 12, 8
SPEC = LowRankSpec(Rank("auto"), whiten=True)


class Layer(nn.Module):
    """The six linears of one encoder layer, in a chain."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        shapes = [(width, width)] * 4 + [(width, inner), (inner, width)]
        self.linears = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in shapes)
        for number, linear in enumerate(self.linears):
            linear.weight = nn.Parameter(falling(*linear.weight.shape, seed=number))

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.linears:
            x = linear(x)
        return x


def falling(out: int, into: int, seed: int) -> Tensor:
    """[out, into] whose singular values fall by about two orders of magnitude."""
    g = torch.Generator().manual_seed(seed)
    inner = min(out, into)
    left, right = torch.randn(out, inner, generator=g), torch.randn(inner, into, generator=g)
    return (left * torch.logspace(0, -2, inner)) @ right / inner**0.5


def moment(width: int, rows: int) -> Tensor:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)) * torch.logspace(0, -2, width)
    return (x.T @ x).double()


def sites_of(width: int, inner: int, layers: int) -> list[Site]:
    module = nn.Sequential(*(Layer(width, inner) for _ in range(layers))).eval()
    return list(find_sites(trace(module, (torch.randn(2, width),), None)))


def choices(site: Site) -> list[Choice]:
    pays = site.in_features * site.out_features // (site.in_features + site.out_features)
    return [Choice(max(pays * step // RANKS, 1)) for step in range(1, RANKS + 1)]


def offers(sites: Sequence[Site], stats: dict[int, SiteStats]) -> list[list[Candidate]]:
    """What every site offers, several sites at a time, as compile does."""

    def offer(site: Site) -> list[Candidate]:
        picked = choices(site)
        errors = LowRank().errors(site, SPEC, picked, stats[site.in_features])
        per_rank = site.in_features + site.out_features
        kept = Candidate("keep", 0.0, site.parameters)
        return [
            *(Candidate(str(c.rank), (e.output_error or 0.0) ** 2, per_rank * (c.rank or 0)) for c, e in zip(picked, errors, strict=True)),
            kept,
        ]

    return list(ordered_map(offer, sites))


def decompose(sites: Sequence[Site], stats: dict[int, SiteStats]) -> None:
    for site in sites:
        found = stats[site.in_features]
        torch.linalg.svd(
            site.weight().detach().double() @ whitening_factor(found.second_moment, found.rows, 1e-4).factor, full_matrices=False
        )


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__).parse_args(arguments)
    torch.set_num_threads(options.threads)
    say = tell(options)
    width, inner, layers, repeats = (24, 48, 2, 1) if options.tiny else (WIDTH, INNER, LAYERS, 3)
    sites = sites_of(width, inner, layers)
    stats = {size: SiteStats(moment(size, 2 * size), 2 * size) for size in (width, inner)}
    found = [(timed(lambda: offers(sites, stats)), timed(lambda: decompose(sites, stats))) for _ in range(repeats)]
    candidates, whole = median(pair[0][0] for pair in found), median(pair[1][0] for pair in found)
    given = found[0][0][1]
    say(f"candidates {candidates:.2f} s, decompositions {whole:.2f} s")
    total = sum(site.parameters for site in sites)
    rows = []
    for share in (40, 60, 80):
        seconds, answer = timed(lambda share=share: allocate(given, {"parameters": share * total // 100}))
        exact = isinstance(answer, Allocation)
        rows.append(
            {
                "budget_%": share,
                "sites": len(sites),
                "candidates": sum(map(len, given)),
                "candidates_s": candidates,
                "solve_s": seconds,
                "svd_s": whole,
                "ratio": (candidates + seconds) / whole,
                "gap": answer.gap if exact else None,
            }
        )
    finish(options, rows, ["ratio: (candidates + solve) / one torch.linalg.svd of every whitened matrix"])


if __name__ == "__main__":
    main()
