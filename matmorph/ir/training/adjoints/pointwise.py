"""Adjoints of pointwise operators. Where a result or a part of it appears in the derivative, it is computed once, forwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from matmorph.errors import VerifyError
from matmorph.ir.core import Node, Value
from matmorph.ir.training.adjoints.tape import AdjointRule, Cotangents, Tape, TapeStep, argument, in_float32

Derivative = Callable[[Tape, Value, Node, Value], Value]
"""(tape, cotangent of the result, node, result) -> cotangent of the first operand."""


def _unary(derivative: Derivative) -> AdjointRule:
    def rule(t: Tape, node: Node) -> TapeStep:
        (y,) = t.keep(node)

        def pull(found: Cotangents) -> None:
            (dy,) = found
            if dy is not None and t.wants(node.args[0]):
                t.give(node.args[0], derivative(t, dy, node, y), y.tensor.shape)

        return TapeStep((y,), pull)

    return rule


def _mul(t: Tape, a: Value, b: Any) -> Value:
    return t.b("aten.mul.Tensor", a, b)


def _add(t: Tape, node: Node) -> TapeStep:
    """a + alpha b, and a - alpha b."""
    a, b = node.args[:2]
    alpha = node.attrs.get("alpha", 1) * (-1 if node.op.startswith("aten.sub") else 1)
    (y,) = t.keep(node)

    def pull(found: Cotangents) -> None:
        (dy,) = found
        if dy is None:
            return
        t.give(a, dy, y.tensor.shape)
        if t.wants(b):
            t.give(b, dy if alpha == 1 else t.b("aten.neg.default", dy) if alpha == -1 else _mul(t, dy, alpha), y.tensor.shape)

    return TapeStep((y,), pull)


def _rsub(t: Tape, node: Node) -> TapeStep:
    """b - alpha a."""
    a, b = node.args[:2]
    alpha = argument(node, 2, "alpha", 1)
    (y,) = t.keep(node)

    def pull(found: Cotangents) -> None:
        (dy,) = found
        if dy is None:
            return
        t.give(b, dy, y.tensor.shape)
        if t.wants(a):
            t.give(a, _mul(t, dy, -alpha), y.tensor.shape)

    return TapeStep((y,), pull)


def _multiply(t: Tape, node: Node) -> TapeStep:
    a, b = node.args[:2]
    (y,) = t.keep(node)

    def pull(found: Cotangents) -> None:
        (dy,) = found
        for value, other in ((a, b), (b, a)):
            if dy is not None and t.wants(value):
                t.give(value, _mul(t, dy, other), y.tensor.shape)

    return TapeStep((y,), pull)


def _divide(t: Tape, node: Node) -> TapeStep:
    a, b = node.args[:2]
    (y,) = t.keep(node)

    def pull(found: Cotangents) -> None:
        (dy,) = found
        if dy is None:
            return
        da = t.b("aten.div.Tensor", dy, b)
        t.give(a, da, y.tensor.shape)
        if t.wants(b):
            t.give(b, t.b("aten.neg.default", _mul(t, da, y)), y.tensor.shape)

    return TapeStep((y,), pull)


def _power(t: Tape, dy: Value, node: Node, y: Value) -> Value:
    x, exponent = node.args[:2]
    if exponent == 0:
        return t.b("aten.zeros_like.default", node.args[0])
    if exponent == 2:
        return _mul(t, dy, _mul(t, x, 2.0))
    return _mul(t, dy, _mul(t, t.b("aten.pow.Tensor_Scalar", x, exponent - 1), exponent))


def _rsqrt(t: Tape, dy: Value, node: Node, y: Value) -> Value:
    return _mul(t, dy, _mul(t, t.b("aten.pow.Tensor_Scalar", y, 3), -0.5))


def _sqrt(t: Tape, dy: Value, node: Node, y: Value) -> Value:
    return t.b("aten.div.Tensor", dy, _mul(t, y, 2.0))


def _reciprocal(t: Tape, dy: Value, node: Node, y: Value) -> Value:
    return t.b("aten.neg.default", _mul(t, dy, _mul(t, y, y)))


def _tanh(t: Tape, dy: Value, node: Node, y: Value) -> Value:
    return _mul(t, dy, t.b("aten.rsub.Scalar", _mul(t, y, y), 1.0))


def _sigmoid(t: Tape, dy: Value, node: Node, y: Value) -> Value:
    return _mul(t, dy, _mul(t, y, t.b("aten.rsub.Scalar", y, 1.0)))


def _relu(t: Tape, dy: Value, node: Node, y: Value) -> Value:
    return zero_unless(t, t.b("aten.gt.Scalar", y, 0), dy)


def _clamp(t: Tape, dy: Value, node: Node, y: Value) -> Value:
    x, low, high = node.args[0], argument(node, 1, "min"), argument(node, 2, "max")
    for op, bound in (("aten.ge.Scalar", low), ("aten.le.Scalar", high)):
        if bound is not None:
            dy = zero_unless(t, t.b(op, x, bound), dy)
    return dy


def zero_unless(t: Tape, condition: Value, value: Value) -> Value:
    """`value` where the condition holds, else 0."""
    return t.cast(t.b("aten.where.ScalarOther", condition, value, 0.0), value.tensor.dtype)


def zero_if(t: Tape, condition: Value, value: Value) -> Value:
    return t.cast(t.b("aten.where.ScalarSelf", condition, 0.0, value), value.tensor.dtype)


def _silu(t: Tape, node: Node) -> TapeStep:
    """y = x s(x), y' = s + y (1 - s)."""
    x = node.args[0]
    s = t.b("aten.sigmoid.default", x)
    y = _mul(t, x, s)

    def pull(found: Cotangents) -> None:
        (dy,) = found
        if dy is not None:
            rest = _mul(t, s, t.b("aten.rsub.Scalar", y, 1.0))
            t.give(x, _mul(t, dy, t.b("aten.add.Tensor", rest, y)), y.tensor.shape)

    return TapeStep((y,), pull)


def _gelu(t: Tape, node: Node) -> TapeStep:
    """y = x c(x) with the normal distribution c = (1 + erf(x / sqrt 2)) / 2, or its tanh approximation (Hendrycks and Gimpel, 2016)."""
    x = node.args[0]
    if argument(node, 1, "approximate", "none") == "tanh":
        return _gelu_tanh(t, x)
    u = _mul(t, x, math.sqrt(0.5))
    c = t.b("aten.add.Tensor", _mul(t, t.b("aten.erf.default", u), 0.5), 0.5)
    y = _mul(t, x, c)

    def pull(found: Cotangents) -> None:
        (dy,) = found
        if dy is not None:
            # x times the density, exp(-x^2 / 2) / sqrt(2 pi), is u exp(-u^2) / sqrt(pi); the factor goes into the exponent.
            density = t.b("aten.exp.default", t.b("aten.rsub.Scalar", _mul(t, u, u), -0.5 * math.log(math.pi)))
            t.give(x, _mul(t, dy, t.b("aten.add.Tensor", _mul(t, u, density), c)), y.tensor.shape)

    return TapeStep((y,), pull)


def _gelu_tanh(t: Tape, x: Value) -> TapeStep:
    """c = (1 + tanh(k (x + 0.044715 x^3))) / 2 with k = sqrt(2 / pi); c' = 2 k (1 + 3 * 0.044715 x^2) c (1 - c)."""
    k, cubic = math.sqrt(2 / math.pi), 0.044715
    square = _mul(t, x, x)
    inner = _mul(t, x, t.b("aten.add.Tensor", _mul(t, square, k * cubic), k))
    c = t.b("aten.add.Tensor", _mul(t, t.b("aten.tanh.default", inner), 0.5), 0.5)
    y = _mul(t, x, c)

    def pull(found: Cotangents) -> None:
        (dy,) = found
        if dy is not None:
            slope = t.b("aten.add.Tensor", _mul(t, square, 6 * k * cubic), 2 * k)
            rest = _mul(t, _mul(t, y, slope), t.b("aten.rsub.Scalar", c, 1.0))
            t.give(x, _mul(t, dy, t.b("aten.add.Tensor", rest, c)), y.tensor.shape)

    return TapeStep((y,), pull)


def _where(t: Tape, node: Node) -> TapeStep:
    """Of the two branches each gets its own places. Either may be a number."""
    condition, a, b = node.args[:3]
    (y,) = t.keep(node)

    def pull(found: Cotangents) -> None:
        (dy,) = found
        if dy is not None and t.wants(a):
            t.give(a, zero_unless(t, condition, dy), y.tensor.shape)
        if dy is not None and t.wants(b):
            t.give(b, zero_if(t, condition, dy), y.tensor.shape)

    return TapeStep((y,), pull)


def _masked_fill(t: Tape, node: Node) -> TapeStep:
    x, mask = node.args[:2]
    if t.wants(node.args[2]):
        raise VerifyError("masked_fill with a trained value")
    (y,) = t.keep(node)

    def pull(found: Cotangents) -> None:
        (dy,) = found
        if dy is not None and t.wants(x):
            t.give(x, zero_if(t, mask, dy), y.tensor.shape)

    return TapeStep((y,), pull)


def _nothing(t: Tape, node: Node) -> TapeStep:
    """Constant wherever it has a derivative."""
    return TapeStep(t.keep(node), lambda found: None)


_UNARY: Mapping[str, Derivative] = {
    "aten.neg.default": lambda t, dy, node, y: t.b("aten.neg.default", dy),
    "aten.pow.Tensor_Scalar": _power,
    "aten.rsqrt.default": _rsqrt,
    "aten.sqrt.default": _sqrt,
    "aten.reciprocal.default": _reciprocal,
    "aten.exp.default": lambda t, dy, node, y: _mul(t, dy, y),
    "aten.log.default": lambda t, dy, node, y: t.b("aten.div.Tensor", dy, node.args[0]),
    "aten.sin.default": lambda t, dy, node, y: _mul(t, dy, t.b("aten.cos.default", node.args[0])),
    "aten.cos.default": lambda t, dy, node, y: t.b("aten.neg.default", _mul(t, dy, t.b("aten.sin.default", node.args[0]))),
    "aten.abs.default": lambda t, dy, node, y: _mul(t, dy, t.b("aten.sign.default", node.args[0])),
    "aten.tanh.default": _tanh,
    "aten.sigmoid.default": _sigmoid,
    "aten.relu.default": _relu,
    "aten.clamp.default": _clamp,
    "aten._to_copy.default": lambda t, dy, node, y: dy,
    "aten.clone.default": lambda t, dy, node, y: dy,
    "aten.alias.default": lambda t, dy, node, y: dy,
}

_FLAT = "sign floor ceil round trunc detach zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty"

POINTWISE: Mapping[str, AdjointRule] = {
    **{op: _unary(derivative) for op, derivative in _UNARY.items()},
    **dict.fromkeys(("aten.add.Tensor", "aten.add.Scalar", "aten.sub.Tensor", "aten.sub.Scalar"), _add),
    **dict.fromkeys(("aten.rsub.Scalar", "aten.rsub.Tensor"), _rsub),
    **dict.fromkeys(("aten.mul.Tensor", "aten.mul.Scalar"), _multiply),
    **dict.fromkeys(("aten.div.Tensor", "aten.div.Scalar"), _divide),
    **dict.fromkeys(("aten.where.self", "aten.where.ScalarOther", "aten.where.ScalarSelf"), _where),
    **dict.fromkeys(("aten.masked_fill.Scalar", "aten.masked_fill.Tensor"), _masked_fill),
    **dict.fromkeys([f"aten.{name}.default" for name in _FLAT.split()], _nothing),
    "aten.silu.default": in_float32(_silu),
    "aten.gelu.default": in_float32(_gelu),
}
