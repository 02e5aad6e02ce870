"""apply.onnx: every optimizer against torch or its formula in float64, what it must leave to the bit, and mutants."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from mutating import Mutant, mutated, unmutated

from matmorph.errors import ExportError
from matmorph.exporters.onnx.placement import placement
from matmorph.exporters.training import apply_graph as optimizers
from matmorph.optimizers import SGD, AdamAtan2, AdamW, AnyOptimizer, Lion, optimizer_name
from matmorph.runtime.targets.cuda import CUDA

SEGMENTS = (7, 40, 3, 10)
N = sum(SEGMENTS)
STEPS = 20
LR = 1e-2
ALL: tuple[AnyOptimizer, ...] = (
    AdamW(LR, weight_decay=0.1),
    AdamW(LR, betas=(0.3, 0.0), eps=1e-3),  # other side of the interpolation, an eps that shows
    SGD(LR, momentum=0.9, weight_decay=0.1),
    SGD(LR, momentum=0.8, nesterov=True),
    SGD(LR),
    AdamAtan2(LR, weight_decay=0.1),
    AdamAtan2(LR, a=1.0, b=2.0),
    Lion(LR, weight_decay=0.1),
    Lion(LR, betas=(0.95, 0.4)),
)
NAMES = [f"{optimizer_name(one)}-{k}" for k, one in enumerate(ALL)]
TOLERANCE = 2e-6
"""20 float32 updates of values of size 1 by steps of 1e-2: a few roundings of 6e-8 each, and as many in the moments."""


class Apply:
    """apply.onnx in ONNX Runtime, with the state that goes through it."""

    def __init__(self, optimizer: AnyOptimizer, segments: Sequence[int] = SEGMENTS, module: Any = optimizers) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it warns about inputs with defaults
        model = module.optimizer_model(optimizer, segments)
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.optimizer = optimizer
        self.names = ("theta", *optimizer.STATES)
        self.state = {name: np.zeros(sum(segments), np.float32) for name in self.names}
        self.updates = 0

    def __call__(self, grad: np.ndarray, **given: Any) -> tuple[float, bool]:
        """Takes one step; (grad_norm, skipped)."""
        numbers = {"lr": self.optimizer.lr, "weight_decay": self.optimizer.weight_decay, "grad_scale": 1.0, "max_norm": math.inf}
        feeds = {key: np.asarray(value, np.float32) for key, value in {**numbers, **given}.items()}
        feeds |= {**self.state, "grad": grad, "step": np.asarray(self.updates + 1, np.int64)}
        *vectors, norm, skipped = self.session.run([*(f"{name}_next" for name in self.names), "grad_norm", "skipped"], feeds)
        self.state = dict(zip(self.names, vectors, strict=True))
        self.updates += not skipped
        return float(norm), bool(skipped)


class Formula:
    """The same in float64, element by element as the papers have it."""

    def __init__(self, optimizer: AnyOptimizer, theta: np.ndarray) -> None:
        self.optimizer, self.t = optimizer, 0
        self.theta, self.m, self.v = theta.astype(np.float64), np.zeros(theta.size), np.zeros(theta.size)

    def __call__(self, grad: np.ndarray, lr: Any, decay: Any, scale: float = 1.0, max_norm: float = math.inf, on: Any = True) -> float:
        o, g = self.optimizer, np.where(on, grad.astype(np.float64) * scale, 0)
        norm = math.sqrt((g**2).sum())
        g = g * min(1.0, max_norm / (norm + 1e-6))
        self.t += 1
        step, m, v = {"adamw": self.adam, "adam_atan2": self.adam, "sgd": self.sgd, "lion": self.lion}[optimizer_name(o)](g)
        self.theta = np.where(on, self.theta - lr * decay * self.theta - lr * step, self.theta)
        self.m, self.v = np.where(on, m, self.m), np.where(on, v, self.v)
        return norm

    def adam(self, g: np.ndarray) -> tuple[np.ndarray, ...]:
        o = self.optimizer
        m, v = o.betas[0] * self.m + (1 - o.betas[0]) * g, o.betas[1] * self.v + (1 - o.betas[1]) * g * g
        mean, root = m / (1 - o.betas[0] ** self.t), np.sqrt(v / (1 - o.betas[1] ** self.t))
        return (mean / (root + o.eps) if isinstance(o, AdamW) else o.a * np.arctan2(mean, o.b * root)), m, v

    def sgd(self, g: np.ndarray) -> tuple[np.ndarray, ...]:
        m = self.optimizer.momentum * self.m + g
        return (g + self.optimizer.momentum * m if self.optimizer.nesterov else m), m, self.v

    def lion(self, g: np.ndarray) -> tuple[np.ndarray, ...]:
        first, second = self.optimizer.betas
        return np.sign(first * self.m + (1 - first) * g), second * self.m + (1 - second) * g, self.v


def gradients(seed: int = 1, sizes: tuple[float, float] = (-3, 0)) -> list[np.ndarray]:
    """One per step, each element of its own size between 10**sizes[0] and 10**sizes[1]; some are always 0."""
    rng = np.random.default_rng(seed)
    size = 10 ** rng.uniform(*sizes, N) * (rng.random(N) > 0.1)
    return [(rng.standard_normal(N) * size).astype(np.float32) for _ in range(STEPS)]


def start() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(N).astype(np.float32)


def spread(values: Sequence[float]) -> np.ndarray:
    return np.repeat(np.asarray(values, np.float64), SEGMENTS)


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return bool(np.array_equal(left.view(np.uint32), right.view(np.uint32)))


def follow(optimizer: AnyOptimizer, module: Any = optimizers, formula: AnyOptimizer | None = None, **how: Any) -> float:
    """20 steps beside the formula; the largest difference of theta and the states, relative to each vector's size."""
    apply = Apply(optimizer, module=module)
    apply.state["theta"] = start()
    oracle = Formula(formula or optimizer, apply.state["theta"])
    mask, lr_of, decay_of = how.get("mask"), how.get("segment_lr", [1.0] * len(SEGMENTS)), how.get("segment_decay", [1.0] * len(SEGMENTS))
    scale, max_norm = how.get("grad_scale", 1.0), how.get("max_norm", math.inf)
    for grad in gradients(sizes=how.get("sizes", (-3, 0))):
        given = {key: value for key, value in how.items() if key != "sizes"}
        norm, skipped = apply(grad, **given)
        on = True if mask is None else np.asarray(mask) > 0
        expected = oracle(grad, optimizer.lr * spread(lr_of), optimizer.weight_decay * spread(decay_of), scale, max_norm, on)
        assert not skipped
        assert norm == pytest.approx(expected, rel=1e-6)  # a float32 sum of 60 squares
    pairs = [(apply.state[name], getattr(oracle, name)) for name in apply.names]
    return max(float(np.abs(ours - theirs).max() / np.abs(theirs).max()) for ours, theirs in pairs)


HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"grad_scale": 1 / 64},
    "clipped": {"max_norm": 0.5, "grad_scale": 4.0},
    "mask": {"mask": (np.arange(N) % 3 > 0).astype(np.float32)},
    "segments": {"segment_lr": [1.0, 0.5, 0.0, 3.0], "segment_decay": [0.0, 1.0, 2.0, 1.0]},
    "segments alike": {"segment_lr": [0.5] * 4, "segment_decay": [2.0] * 4},
    "all at once": {
        "max_norm": 0.5,
        "grad_scale": 3.0,
        "mask": (np.arange(N) % 2).astype(np.float32),
        "segment_lr": [1.0, 0.5, 0.0, 3.0],
        "segment_decay": [0.0, 1.0, 2.0, 1.0],
    },
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("optimizer", ALL, ids=NAMES)
def test_follows_its_formula(optimizer: AnyOptimizer, how: str) -> None:
    # The sign of Lion is 0 or 1 off where float32 and float64 disagree about a sum that is almost 0; these gradients have no such sum.
    assert follow(optimizer, **HOW[how]) <= TOLERANCE


TORCH: dict[str, tuple[AnyOptimizer, Callable[[list[torch.Tensor]], torch.optim.Optimizer]]] = {
    "adamw": (AdamW(LR, weight_decay=0.1), lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.1)),
    "adamw other settings": (
        AdamW(LR, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.0),
        lambda p: torch.optim.AdamW(p, lr=LR, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.0),
    ),
    "sgd": (SGD(LR, momentum=0.9), lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9)),
    "sgd nesterov": (SGD(LR, momentum=0.9, nesterov=True), lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, nesterov=True)),
    "sgd without momentum": (SGD(LR), lambda p: torch.optim.SGD(p, lr=LR)),
}
MOMENTS = {"m": ("exp_avg", "momentum_buffer"), "v": ("exp_avg_sq",)}


@pytest.mark.parametrize("clip", [math.inf, 0.3])
@pytest.mark.parametrize("which", TORCH)
def test_follows_torch(which: str, clip: float) -> None:
    optimizer, make = TORCH[which]
    apply = Apply(optimizer)
    apply.state["theta"] = start()
    pieces = [torch.nn.Parameter(piece.clone()) for piece in torch.from_numpy(start()).split(SEGMENTS)]
    peer = make(pieces)
    for grad in gradients():
        for parameter, piece in zip(pieces, torch.from_numpy(grad).split(SEGMENTS), strict=True):
            parameter.grad = piece.clone()
        expected = torch.nn.utils.clip_grad_norm_(pieces, clip)
        peer.step()
        assert apply(grad, max_norm=clip)[0] == pytest.approx(float(expected), rel=1e-6)  # float32 sums of 60 squares
    np.testing.assert_allclose(apply.state["theta"], torch.cat(pieces).detach().numpy(), rtol=0, atol=TOLERANCE)
    for name in apply.names[1:]:
        found = [next(peer.state[p][key] for key in MOMENTS[name] if peer.state[p].get(key) is not None) for p in pieces if peer.state[p]]
        if found and isinstance(found[0], torch.Tensor):
            np.testing.assert_allclose(apply.state[name], torch.cat(found).numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])  # the square of the last is no float32
@pytest.mark.parametrize("optimizer", ALL, ids=NAMES)
@pytest.mark.parametrize("masked", [False, True])
def test_a_gradient_that_is_not_finite_leaves_every_bit(optimizer: AnyOptimizer, bad: float, masked: bool) -> None:
    apply = Apply(optimizer)
    apply.state["theta"] = start()
    apply(gradients()[0])
    for vector in apply.state.values():
        vector[5], vector[6] = -0.0, 1e-45  # what arithmetic would not bring back: a negative zero, the smallest denormal
    before = apply.state
    grad = gradients()[1].copy()
    grad[11] = bad
    norm, skipped = apply(grad, **({"mask": np.arange(N) % 2} if masked else {}))
    assert skipped
    assert not math.isfinite(norm)
    assert all(same_bits(before[name], apply.state[name]) for name in before)
    assert not apply(gradients()[2])[1]
    assert all(np.isfinite(vector).all() for vector in apply.state.values())


@pytest.mark.parametrize("optimizer", ALL, ids=NAMES)
def test_mask_0_leaves_every_bit(optimizer: AnyOptimizer) -> None:
    apply = Apply(optimizer)
    apply.state["theta"] = start()
    apply(gradients()[0])
    for vector in apply.state.values():
        vector[5], vector[6] = -0.0, 1e-45
    before, mask = apply.state, (np.arange(N) % 3 == 1).astype(np.float32)
    off = mask == 0
    grad = gradients()[1].copy()
    grad[8], grad[9] = math.nan, math.inf  # of parameters that do not train: they count nowhere
    norm, skipped = apply(grad, mask=mask, max_norm=0.1)
    assert off[[5, 6, 8, 9]].all()
    assert not skipped
    assert norm == pytest.approx(float(np.linalg.norm(grad[mask > 0].astype(np.float64))), rel=1e-6)  # float32 sum of 20 squares
    assert all(same_bits(before[name][off], apply.state[name][off]) for name in before)
    moves = (mask > 0) & (grad != 0)
    assert (apply.state["theta"][moves] != before["theta"][moves]).all()


def test_mask_of_one_element() -> None:
    apply, whole = Apply(ALL[0]), Apply(ALL[0])
    for one in (apply, whole):
        one.state["theta"] = start()
    apply(gradients()[0], mask=[1.0])
    whole(gradients()[0])
    assert same_bits(apply.state["theta"], whole.state["theta"])
    before = apply.state
    apply(gradients()[1], mask=[0.0])
    assert all(same_bits(before[name], apply.state[name]) for name in before)


def test_norm_of_a_long_vector() -> None:
    """A running float32 sum of a million equal squares is 1e-3 off; sums of rows are not."""
    length = 1_000_003
    apply = Apply(SGD(0.0 + LR), [length])
    norm, _ = apply(np.full(length, 0.1, np.float32))
    assert norm == pytest.approx(0.1 * math.sqrt(length), rel=1e-5)  # rows of 1024, 977 of them, each summed in float32
    assert apply(np.full(length, 0.1, np.float32), mask=np.arange(length) < 4)[0] == pytest.approx(0.2, rel=1e-6)


def test_arc_tangent_over_the_whole_range() -> None:
    """theta = -atan2(m, sqrt(v)) for moments given directly: lr 1, a 1, b 1, betas so that moments stay."""
    angles = np.concatenate([np.linspace(-math.pi / 2, math.pi / 2, 997), [1e-6, -1e-6]])
    apply = Apply(AdamAtan2(1.0, betas=(0.5, 0.5), a=1.0, weight_decay=0.0), [angles.size])
    size = 10 ** np.random.default_rng(3).uniform(-8, 8, angles.size)
    # Gradient 0 and the first step: m and v are halved, and the corrections double both again.
    apply.state["m"], apply.state["v"] = (np.sin(angles) * size).astype(np.float32), ((np.cos(angles) * size) ** 2).astype(np.float32)
    expected = -np.arctan2(apply.state["m"].astype(np.float64), np.sqrt(apply.state["v"].astype(np.float64)))
    apply(np.zeros(angles.size, np.float32))
    np.testing.assert_allclose(apply.state["theta"], expected, rtol=1e-6, atol=1e-9)  # ten float32 operations


@pytest.mark.parametrize(("m", "v", "expected"), [(0, 0, 0), (1e-30, 0, math.pi / 2), (-1e-30, 0, -math.pi / 2), (0, 1, 0)])
def test_arc_tangent_at_its_ends(m: float, v: float, expected: float) -> None:
    apply = Apply(AdamAtan2(1.0, betas=(0.5, 0.5), a=1.0, weight_decay=0.0), [1])
    apply.state["m"], apply.state["v"] = np.array([m], np.float32), np.array([v], np.float32)
    apply(np.zeros(1, np.float32))
    assert apply.state["theta"][0] == pytest.approx(-expected, rel=1e-6)  # float32


def test_corrections_are_double() -> None:
    """At step 1 with beta2 = 1 - 1e-7 a float32 correction would be 20 % off: Adam's first step is lr for every gradient."""
    apply = Apply(AdamW(LR, betas=(0.9, 1 - 1e-7), eps=1e-30, weight_decay=0.0))
    apply(np.full(N, 1e-3, np.float32))
    np.testing.assert_allclose(apply.state["theta"], -LR, rtol=1e-6)  # float32


@pytest.mark.parametrize("segments", [[], [3, 0]])
def test_segments_that_hold_nothing(segments: list[int]) -> None:
    with pytest.raises(ExportError, match="must hold one parameter or more each"):
        optimizers.optimizer_model(AdamW(LR), segments)


def test_one_file_for_the_same_settings() -> None:
    first, second = (optimizers.optimizer_model(AdamW(LR), SEGMENTS).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
    assert len(first) < 12_000


@pytest.mark.parametrize("optimizer", ALL, ids=NAMES)
def test_operators_have_cuda_kernels(optimizer: AnyOptimizer) -> None:
    model = optimizers.optimizer_model(optimizer, [5000, 5000])
    found = placement(model, CUDA, "apply.onnx")
    assert (found.handed, found.sizes, found.unknown) == ((), 0, ())
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 21)}


MUTANTS = {
    "eps dropped": Mutant("AdamW.rule", "b('Add', b('Sqrt', made['v']), eps)", "b('Sqrt', made['v'])"),
    "eps not corrected": Mutant("AdamW.rule", "b('Mul', b.number(self.eps, double=True), root)", "b.number(self.eps, double=True)"),
    "beta1 for both": Mutant("rule.moments", "betas[1]", "betas[0]"),
    "betas exchanged": Mutant("rule.moments", "mixed(b, 'm', gradient, betas[0])", "mixed(b, 'm', gradient, betas[1])"),
    "second correction not rooted": Mutant("rule.corrections", "b('Sqrt', second)", "second"),
    "no first correction": Mutant("AdamW.rule", "b('Div', root, first)", "b('Identity', root)"),
    "clip upside down": Mutant(
        "optimizer_model", "b('Div', 'max_norm', b('Add', norm, b.number(_CLIP_EPS)))", "b('Div', norm, 'max_norm')"
    ),
    "clip only upwards": Mutant("optimizer_model", "'Min'", "'Max'"),
    "norm not scaled": Mutant(
        "optimizer_model",
        "b('Mul', b('Sqrt', _squares(b, everything, length)), 'grad_scale', out='grad_norm')",
        "b('Mul', b('Sqrt', _squares(b, everything, length)), b.number(1.0), out='grad_norm')",
    ),
    "decay not scaled by lr": Mutant(
        "apply_graph._rates",
        "b('Mul', b('Mul', 'segment_decay', 'weight_decay'), rate)",
        "b('Mul', b('Mul', 'segment_decay', 'weight_decay'), b.number(1.0))",
    ),
    "decay added": Mutant("_updated", "'Add'", "'Sub'"),
    "segments exchanged": Mutant("apply_graph._rates", "(0, 1)", "(1, 0)"),
    "first segment for all": Mutant("apply_graph._rates", "'And'", "'Or'"),
    "moments trained under a mask": Mutant("apply_graph._choose", "kept('Where', trains, new, old)", "kept('Where', finite, new, old)"),
    "old value second": Mutant(
        "apply_graph._choose",
        "kept('Where', trains, new, old)",
        "kept('Where', kept('Xor', trains, kept.constant(np.ones((), bool))), old, new)",
    ),
    "norm counts all": Mutant(
        "_squares", "masked('Greater', 'mask', masked.number(0.0))", "masked('Greater', 'mask', masked.number(-1.0))"
    ),
    "only NaN is not finite": Mutant("optimizer_model", "np.finfo(np.float32).max", "np.inf"),
    "momentum of lion": Mutant("Lion.rule", "self.betas[1]", "self.betas[0]"),
    "nesterov ignored": Mutant("SGD.rule", "self.nesterov", "False"),
    "rest of the rows forgotten": Mutant("_sum_of_squares", "whole == length", "True"),
    "arc tangent once": Mutant("AdamAtan2.rule", "z = b('Mul', t, t)", "z = b('Mul', b('Mul', t, t), b.number(0.0))"),
}


def digest(m: Any) -> bool:
    """A short form of the tests above: whether the code passes."""

    def passes(optimizer: AnyOptimizer, **how: Any) -> bool:
        own = m[type(optimizer).__name__](**asdict(optimizer))
        return follow(own, m, optimizer, **how) <= TOLERANCE

    for optimizer in (ALL[0], ALL[3], ALL[5], ALL[7]):
        if not all(passes(optimizer, **how) for how in ({}, HOW["all at once"])):
            return False
    if not passes(ALL[0], sizes=(-9, -5)):  # sqrt(v) near eps
        return False
    own = m.AdamW(**asdict(ALL[0]))
    apply = Apply(own, [5000, 2001], m)
    norm, _ = apply(np.full(7001, 0.5, np.float32))
    if abs(norm - 0.5 * math.sqrt(7001)) > 1e-3:
        return False
    test = Apply(own, module=m)
    test.state["theta"][:] = -0.0
    before, grad = test.state, gradients()[0].copy()
    grad[0] = math.inf
    return test(grad)[1] and all(same_bits(before[name], test.state[name]) for name in before)


def test_the_digest_passes() -> None:
    with unmutated(MUTANTS.values()) as m:
        assert digest(m)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(name: str) -> None:
    with mutated(MUTANTS[name]) as m:
        try:
            passed = digest(m)
        except (AssertionError, onnxruntime.capi.onnxruntime_pybind11_state.Fail):
            passed = False
    assert not passed


def test_a_wrong_setting_is_noticed() -> None:
    """What the tolerance can tell apart: eps, each beta, and the decay."""
    right = AdamW(LR, weight_decay=0.1)
    for wrong in (replace(right, eps=1.1e-8), replace(right, betas=(0.9001, 0.999)), replace(right, betas=(0.9, 0.9991))):
        assert follow(right, formula=wrong, sizes=(-9, -5)) > TOLERANCE
