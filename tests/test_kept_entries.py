"""apply.onnx with pieces of which only the largest gradients take part: torch's SparseAdam and dense formulas as oracles; mutants."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from mutating import Mutant, killer, mutated, real_code, unmutated
from test_optimizers import ALL, LR, NAMES, TOLERANCE, Formula

from matmorph.errors import ExportError
from matmorph.optimizers import SGD, AdamW, AnyOptimizer

SEGMENTS = (40, 25)
PIECES = ((0, 30, 4), (45, 20, 3))
"""(offset, length, count): 30 at the start of the first segment, dense entries behind them, 20 at the end of the second."""
N = sum(SEGMENTS)


class Apply:
    """apply.onnx of some pieces in ONNX Runtime, with its state."""

    def __init__(
        self,
        module: Any,
        optimizer: AnyOptimizer,
        pieces: Sequence[tuple[int, int, int]] = PIECES,
        segments: Sequence[int] = SEGMENTS,
        seed: int = 0,
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns about inputs with defaults
        model = module.optimizer_model(optimizer, segments, [module.Kept(*piece) for piece in pieces])
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.optimizer, self.updates = optimizer, 0
        self.names = ("theta", *optimizer.STATES)
        self.state = {name: np.zeros(sum(segments), np.float32) for name in self.names}
        self.state["theta"] = np.random.default_rng(seed).standard_normal(sum(segments), dtype=np.float32)

    def __call__(self, grad: np.ndarray, **given: Any) -> tuple[float, bool]:
        numbers = {"lr": self.optimizer.lr, "weight_decay": self.optimizer.weight_decay, "grad_scale": 1.0, "max_norm": math.inf}
        feeds = {key: np.asarray(value, np.float32) for key, value in {**numbers, **given}.items()}
        feeds |= {**self.state, "grad": grad, "step": np.asarray(self.updates + 1, np.int64)}
        *vectors, norm, skipped = self.session.run([*(f"{name}_next" for name in self.names), "grad_norm", "skipped"], feeds)
        self.state = dict(zip(self.names, vectors, strict=True))
        self.updates += not skipped
        return float(norm), bool(skipped)


def gradients(steps: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((steps, N)).astype(np.float32)


def chosen(grad: np.ndarray, pieces: Sequence[tuple[int, int, int]] = PIECES, mask: np.ndarray | None = None) -> np.ndarray:
    """bool [n], from the definition: the largest |gradient| of each piece that the mask lets train, and everything between the pieces."""
    on = np.ones(len(grad), bool) if mask is None else mask > 0
    for offset, length, count in pieces:
        scores = np.where(on[offset : offset + length], np.abs(grad[offset : offset + length]), -1)
        best = np.argsort(-scores, kind="stable")[:count]
        on[offset : offset + length] &= np.isin(np.arange(length), best)
    return on


def formulas(module: Any, optimizer: AnyOptimizer, steps: int = 8) -> Apply:
    """Each step is that of the dense formula on the chosen entries, clipped by their norm; all else keeps its bits."""
    apply = Apply(module, optimizer)
    expected = Formula(optimizer, apply.state["theta"])
    factors = np.repeat([0.5, 2.0], SEGMENTS)
    for grad in gradients(steps):
        before, on = apply.state, chosen(grad)
        # The gradient comes with a loss scale of 8 and is clipped to 3 of its norm of about 6.
        norm, skipped = apply(8 * grad, grad_scale=1 / 8, max_norm=3.0, segment_lr=[0.5, 2.0])
        wanted = expected(grad, factors * optimizer.lr, optimizer.weight_decay, 1.0, 3.0, on)
        assert not skipped
        assert norm == pytest.approx(wanted, rel=1e-6)  # a float32 root of a sum of 40 squares
        for name, after in apply.state.items():
            assert np.abs(after - getattr(expected, name)).max() <= TOLERANCE
            assert np.array_equal(after[~on].view(np.int32), before[name][~on].view(np.int32))
        assert (apply.state["theta"] != before["theta"]).sum() <= on.sum() == 7 + N - 50
    return apply


@pytest.mark.parametrize("optimizer", ALL, ids=NAMES)
def test_every_optimizer_follows_its_formula_on_the_chosen_entries(optimizer: AnyOptimizer) -> None:
    assert formulas(real_code(), optimizer).updates == 8


def sparse_adam(module: Any) -> None:
    """torch.optim.SparseAdam on the same sparse gradients. Its eps is not bias-corrected, so both have one that does not count."""
    piece = ((0, N, 9),)
    apply = Apply(module, AdamW(LR, eps=1e-20, weight_decay=0.0), piece, (N,))
    theta = torch.nn.Parameter(torch.from_numpy(apply.state["theta"].copy()))
    peer = torch.optim.SparseAdam([theta], lr=LR, eps=1e-20)
    for grad in gradients(10):
        places = np.flatnonzero(chosen(grad, piece))
        theta.grad = torch.sparse_coo_tensor(places[None], torch.from_numpy(grad[places]), (N,), check_invariants=True)
        peer.step()
        apply(grad)
        assert np.abs(apply.state["theta"] - theta.detach().numpy()).max() <= TOLERANCE


def exact_count(module: Any) -> None:
    """Exactly `count` entries move, in each piece, however many gradients are equal; of equal ones the first."""
    apply = Apply(module, SGD(LR))
    before = apply.state["theta"]
    apply(np.ones(N, np.float32))
    moved = apply.state["theta"] != before
    assert [int(moved[offset : offset + length].sum()) for offset, length, _ in PIECES] == [4, 3]
    assert np.flatnonzero(moved[:30]).tolist() == [0, 1, 2, 3]
    assert bool(moved[30:45].all())


def signs(module: Any) -> None:
    """Magnitudes decide."""
    apply = Apply(module, SGD(LR), ((0, N, 1),), (N,))
    before, grad = apply.state["theta"], np.full(N, 0.5, np.float32)
    grad[13] = -2
    apply(grad)
    assert np.flatnonzero(apply.state["theta"] != before).tolist() == [13]


def masks(module: Any) -> None:
    """What the mask shuts out is not chosen in another's place: the next largest is, and a piece may be shut out whole."""
    grad = gradients(1)[0]
    mask = np.ones(N, np.float32)
    mask[np.argsort(-np.abs(grad[:30]))[:6]] = 0
    mask[45:] = 0
    mask[31] = 0
    apply = Apply(module, AdamW(LR))
    before = apply.state
    norm, _ = apply(grad, mask=mask)
    on = chosen(grad, mask=mask)
    assert int(on[:30].sum()) == 4
    for name, vector in apply.state.items():
        assert np.array_equal(vector[~on], before[name][~on])
    assert np.array_equal(apply.state["theta"] != before["theta"], on)
    assert norm == pytest.approx(float(np.linalg.norm(grad[on].astype(np.float64))), rel=1e-6)


def not_finite(module: Any, bad: float, at: int) -> Apply:
    """A gradient that is not finite skips the update, wherever it is: the choice could not be trusted."""
    apply = Apply(module, AdamW(LR))
    apply(gradients(1)[0])
    before, grad = apply.state, gradients(2)[1]
    grad[at] = bad
    norm, skipped = apply(grad)
    assert skipped
    assert not math.isfinite(norm)
    for name, vector in apply.state.items():
        assert np.array_equal(vector.view(np.int32), before[name].view(np.int32))
    return apply


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 35, 64])
def test_a_gradient_that_is_not_finite_is_skipped(bad: float, at: int) -> None:
    assert not_finite(real_code(), bad, at).updates == 1


def whole_pieces(module: Any) -> None:
    """Every entry kept is the plain model, byte for byte."""
    plain = module.optimizer_model(AdamW(LR), SEGMENTS)
    assert module.optimizer_model(AdamW(LR), SEGMENTS, [module.Kept(0, 40, 40)]) == plain


def large(module: Any) -> None:
    """More entries than the norm sums in one go."""
    segments, piece = (10_000,), ((1000, 8000, 80),)
    apply = Apply(module, SGD(LR), piece, segments)
    grad = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    before = apply.state["theta"]
    norm, _ = apply(grad)
    on = chosen(grad, piece)
    assert np.array_equal(apply.state["theta"] != before, on)
    assert norm == pytest.approx(float(np.linalg.norm(grad[on].astype(np.float64))), rel=1e-6)


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (((0, 41, 3),), "3 of 41 entries from 0 on"),  # over the end of a segment
        (((60, 10, 3),), "3 of 10 entries from 60 on"),
        (((10, 20, 3), (5, 3, 1)), "1 of 3 entries from 5 on"),
        (((10, 20, 3), (29, 5, 1)), "1 of 5 entries from 29 on"),
        (((10, 20, 0),), "0 of 20 entries from 10 on"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(pieces: Sequence[tuple[int, int, int]], text: str) -> None:
    with pytest.raises(ExportError) as caught:
        Apply(real_code(), AdamW(LR), pieces)
    assert text in str(caught.value)


CHECKS: dict[str, Callable[[Any], object]] = {
    "formulas": lambda module: formulas(module, AdamW(LR, weight_decay=0.1), 3),
    "sparse_adam": sparse_adam,
    "exact_count": exact_count,
    "signs": signs,
    "masks": masks,
    "not_finite": lambda module: not_finite(module, math.nan, 3),
    "whole_pieces": whole_pieces,
    "large": large,
}


@pytest.mark.parametrize("name", CHECKS)
def test_kept_entries(name: str) -> None:
    check = CHECKS[name]
    check(real_code())


Refused = onnxruntime.capi.onnxruntime_pybind11_state.Fail
"""What ONNX Runtime says to a graph that does not fit together."""

MUTANTS = {
    "the largest, not the farthest from zero": Mutant("_places", "b('Abs', 'grad')", "'grad'"),
    "the smallest": Mutant("_places", "largest=1", "largest=0"),
    "one too many": Mutant("_places", "b.ints(piece.count)", "b.ints(piece.count + 1)"),
    "places within the piece": Mutant(
        "_places",
        "b('Add', at, b.constant(np.asarray(piece.offset, np.int64))) if piece.offset else at",
        "b('Add', at, b.constant(np.asarray(piece.offset, np.int64))) if False else at",
    ),
    "masked entries take part": Mutant(
        "_places", "b('GreaterOrEqual', joined[1], b.number(0.0))", "b('GreaterOrEqual', joined[1], b.number(-2.0))"
    ),
    "the mask does not steer the choice": Mutant("_places", "b('Greater', 'mask', b.number(0.0))", "b('Greater', 'mask', b.number(-1.0))"),
    "the norm of everything": Mutant(
        "_of_pieces", "b('Where', finite, norm, whole, out='grad_norm')", "b('Identity', whole, out='grad_norm')"
    ),
    "clipped by the norm of everything": Mutant(
        "_of_pieces", "_sum_of_squares(b, taken, sum(lengths))", "_sum_of_squares(b, 'grad', length)"
    ),
    "the moments of all decay": Mutant("_of_pieces", "('grad', *vectors)", "('grad', 'theta', 'theta')"),
    "dense entries left out": Mutant("_places", "dense(last, length)", "pass"),
    "what is kept whole is chosen from": Mutant("optimizer_model", "piece.count < piece.length", "True"),
    "decay of everything": Mutant("_of_pieces", "some('Where', trains, new, vector)", "some('Where', trains, new, new)"),
}


def test_the_checks_pass_on_the_real_code() -> None:
    assert killer(unmutated(MUTANTS.values()), [passes_all]) is None


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_killed(name: str) -> None:
    refused = pytest.raises((AssertionError, Refused))
    with mutated(MUTANTS[name]) as m, refused:
        passes_all(m)


def passes_all(module: Any) -> None:
    for check in CHECKS.values():
        check(module)
