"""Mutants of generation: each loses a place, a mask, a cache or a draw, and answers all the same."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from mutating import Mutant, killer, mutated, unmutated
from tiny_decoder import EOS, PAD, greedy, write_decoder

ROWS = [[20, 14, 13, 8], [4, 9, 5, 20, 3, 11, 15], [12]]
MUTANTS = {
    "pads on the other side": Mutant("padded", "padding == 'right'", "padding != 'right'"),
    "pads count as tokens": Mutant("padded", "(row, 1)", "(row, 0)"),
    "places count pads": Mutant("Prompts.positions", "positions_of(self.mask)", "positions_of(np.ones_like(self.mask))"),
    "the last column for all": Mutant("_Steps.prompt", "self._engine.decoder.cache.padding == 'right'", "False"),
    "a place too late": Mutant("_Steps.token", "prompts.lengths + number - 1", "prompts.lengths + number"),
    "a place of the longest": Mutant(
        "_Steps.token", "prompts.lengths + number - 1", "0 * prompts.lengths + prompts.ids.shape[1] + number - 1"
    ),
    "the past stays": Mutant("Growing.after", "Growing(self.slots, self.device, outputs)", "self"),
    "ended rows go on": Mutant("Engine.tokens", "np.where(ended, plan.pad, token)", "token"),
    "the first end ends all": Mutant("Engine.tokens", "ended.all()", "ended.any()"),
    "one end token": Mutant("Engine.tokens", "np.isin(token, plan.stops)", "token == plan.stops[0]"),
    "what differs is kept": Mutant("_common", "int(differs[0]) if differs.size else most", "most"),
    "the whole prompt is known": Mutant("_Steps._reused", "plan.prompts.ids[0, :-1]", "plan.prompts.ids[0]"),
    "a cut cache keeps all": Mutant("_cropped", "slice(length)", "slice(None)"),
    "a wider buffer is empty": Mutant("Shared._widen", "buffer.numpy()", "0"),
    "another adapter's cache": Mutant("PromptCache.belongs", "self._adapter is not adapter", "False"),
    "one draw for all rows": Mutant("Sampler.__init__", "(sampling.seed, row)", "(sampling.seed, 0)"),
    "ties are left out": Mutant("probabilities", "scores < smallest", "scores <= smallest"),
    "the most likely are left out": Mutant(
        "probabilities", "np.cumsum(shares[order]) <= 1 - sampling.top_p", "np.cumsum(shares[order]) <= sampling.top_p"
    ),
    "a draw of nothing": Mutant("draw", "side='right'", "side='left'"),
}


def made(m: Any, **how: Any) -> Any:
    with TemporaryDirectory() as place:
        return m.Generator(write_decoder(Path(place) / "d", **how), ["cpu"], threads=1, verify=False)


def check_rows(m: Any) -> None:
    for shared in (False, True):
        found = made(m, shared=shared).generate(ROWS, max_new_tokens=14, eos=[5, EOS], pad=PAD).tolist()
        for row, tokens in zip(ROWS, found, strict=True):
            wanted = greedy(row, 14, (5, EOS))
            assert tokens[: len(wanted)] == wanted
            assert set(tokens[len(wanted) :]) <= {PAD}


def check_cache(m: Any) -> None:
    for shared in (False, True):
        generator, cache = made(m, shared=shared), m.PromptCache()
        for row in ([20, 14, 13], [20, 14, 13], [20, 14, 17, 6, 5, 9], [20, 14, 17, 6, 5, 9, 3, 4, 8]):
            assert generator.generate([row], max_new_tokens=6, eos=EOS, cache=cache)[0].tolist() == greedy(row, 6)


def check_adapters(m: Any) -> None:
    generator = made(m, adapter=True)
    rng = np.random.default_rng(1)
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in (("down", (16, 2)), ("up", (2, 16)))}
    bias = values["down"].astype(np.float64) @ values["up"]
    ort = pytest.importorskip("onnxruntime")
    version = int("ab" * 4, 16) >> 1
    adapter = m.LoadedAdapter(Path("a"), {}, version, None, {n: ort.OrtValue.ortvalue_from_numpy(a) for n, a in values.items()})
    for row in ROWS[:2]:
        how, cache = {"max_new_tokens": 6, "eos": EOS}, m.PromptCache()
        for given, wanted in ((None, greedy(row, 6)), (adapter, greedy(row, 6, bias=bias)), (None, greedy(row, 6))):
            assert generator.generate([row], cache=cache, adapter=given, **how)[0].tolist() == wanted


def check_draws(m: Any) -> None:
    shares = m.probabilities(np.array([0.0, 1.0, 1.0, 2.0]), m.Sampling(1.0, 3))
    assert (shares > 0).tolist() == [False, True, True, True]
    shares = m.probabilities(np.log([0.1, 0.2, 0.3, 0.4]), m.Sampling(1.0, None, 0.65))
    np.testing.assert_allclose(shares, [0, 0, 3 / 7, 4 / 7], rtol=1e-12)  # float64
    two = np.tile(np.zeros(50), (2, 1))
    sampler = m.Sampler(m.Sampling(1.0, seed=3), 2)
    assert len({tuple(sampler.next(two).tolist()) for _ in range(5)} - {(k, k) for k in range(50)}) > 0

    class Zero:
        def random(self) -> float:
            return 0.0

    assert m.draw(np.array([0.0, 0.5, 0.5]), Zero()) == 1


CHECKS = (check_draws, check_rows, check_cache, check_adapters)


def test_the_checks_pass_on_the_code_as_it_is() -> None:
    assert killer(unmutated(MUTANTS.values()), CHECKS) is None


@pytest.mark.full
@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_mistake_is_seen(mutant: Mutant) -> None:
    assert killer(mutated(mutant), CHECKS), "no check noticed"
