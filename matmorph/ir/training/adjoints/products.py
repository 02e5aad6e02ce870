"""Adjoints of matrix products: `dX = dY W`, and `dW = dY' X` over all rows at once.

The weight of a linear stays what it is, [out, in], in both directions: forwards it is transposed, backwards it is not. Quantised products
have their own transposed operators (`ir.quant_ops`); codes and scales do not train.
"""

from __future__ import annotations

from collections.abc import Mapping

from matmorph.ir.core import Node, Value
from matmorph.ir.training.adjoints.tape import AdjointRule, Cotangents, Tape, TapeStep, argument, composite


def turned(t: Tape, value: Value) -> Value:
    """The last two axes exchanged."""
    return t.b("aten.t.default", value) if len(value.tensor.shape) == 2 else t.b("aten.transpose.int", value, -2, -1)


def product(t: Tape, a: Value, b: Value) -> Value:
    plain = len(a.tensor.shape) == 2 and len(b.tensor.shape) == 2
    return t.b("aten.mm.default" if plain else "aten.matmul.default", a, b)


def linear(t: Tape, node: Node) -> TapeStep:
    """y = x W' + bias; x [.., in], W [out, in], in both directions over rows [n, in]: one product with the bias inside."""
    x, weight = node.args[:2]
    bias = argument(node, 2, "bias")
    if len(weight.tensor.shape) == 1:
        return composite(t, t.call("aten.matmul.default", x, weight))
    rows = t.rows(x)
    flat = t.b("aten.linear.default", rows, weight, *(() if bias is None else (bias,)))
    y = t.reshape(flat, node.output)

    def pull(found: Cotangents) -> None:
        (dy,) = found
        if dy is None:
            return
        dy_rows = t.rows(dy)
        if bias is not None:
            t.give(bias, dy_rows)
        if t.wants(weight):
            t.give(weight, t.b("aten.mm.default", t.b("aten.t.default", dy_rows), rows))
        if t.wants(x):
            t.give_product(x, dy_rows, weight)

    return TapeStep((y,), pull)


def matmul(t: Tape, node: Node) -> TapeStep:
    """y = a b with the broadcasting of `torch.matmul`; vectors through their matrices."""
    a, b = node.args[:2]
    ranks = len(a.tensor.shape), len(b.tensor.shape)
    if 1 in ranks:
        return _vectors(t, node, a, b)
    rows = ranks[0] > 2 and ranks[1] == 2

    def pull(found: Cotangents) -> None:
        (dy,) = found
        if dy is None:
            return
        if t.wants(a):
            t.give(a, product(t, dy, turned(t, b)))
        if t.wants(b):
            left, right = (t.rows(a), t.rows(dy)) if rows else (a, dy)
            t.give(b, product(t, turned(t, left), right))

    return TapeStep(t.keep(node), pull)


def _vectors(t: Tape, node: Node, a: Value, b: Value) -> TapeStep:
    left = t.call("aten.unsqueeze.default", a, 0) if len(a.tensor.shape) == 1 else a
    right = t.call("aten.unsqueeze.default", b, 1) if len(b.tensor.shape) == 1 else b
    y = t.call("aten.matmul.default", left, right)
    if len(b.tensor.shape) == 1:
        y = t.call("aten.squeeze.dim", y, -1)
    if len(a.tensor.shape) == 1:
        y = t.call("aten.squeeze.dim", y, -1 if len(b.tensor.shape) == 1 else -2)
    return composite(t, y)


def addmm(t: Tape, node: Node) -> TapeStep:
    """y = beta bias + alpha a b."""
    bias, a, b = node.args[:3]
    beta, alpha = node.attrs.get("beta", 1), node.attrs.get("alpha", 1)

    def pull(found: Cotangents) -> None:
        (dy,) = found
        if dy is None:
            return
        if t.wants(bias):
            t.give(bias, scaled(t, dy, beta))
        dy = scaled(t, dy, alpha)
        if t.wants(a):
            t.give(a, product(t, dy, turned(t, b)))
        if t.wants(b):
            t.give(b, product(t, turned(t, a), dy))

    return TapeStep(t.keep(node), pull)


def scaled(t: Tape, value: Value, factor: int | float | Value) -> Value:
    return value if factor == 1 else t.b("aten.mul.Tensor", value, factor)


def _quantised(name: str, bias_at: int) -> AdjointRule:
    def rule(t: Tape, node: Node) -> TapeStep:
        x, bias = node.args[0], argument(node, bias_at, "bias")
        weight = node.args[1:bias_at] + node.args[bias_at + 1 :]

        def pull(found: Cotangents) -> None:
            (dy,) = found
            if dy is None:
                return
            if bias is not None:
                t.give(bias, dy)
            if t.wants(x):
                t.give(x, t.b(f"matmorph.{name}_transposed.default", dy, *weight))

        return TapeStep(t.keep(node), pull)

    return rule


def _quantised_transposed(name: str, bias_at: int) -> AdjointRule:
    def rule(t: Tape, node: Node) -> TapeStep:
        weight = node.args[1:]

        def pull(found: Cotangents) -> None:
            (dx,) = found
            if dx is not None and t.wants(node.args[0]):
                t.give(node.args[0], t.b(f"matmorph.{name}.default", dx, *weight[: bias_at - 1], None, *weight[bias_at - 1 :]))

        return TapeStep(t.keep(node), pull)

    return rule


PRODUCTS: Mapping[str, AdjointRule] = {
    "aten.linear.default": linear,
    "aten.matmul.default": matmul,
    "aten.mm.default": matmul,
    "aten.bmm.default": matmul,
    "aten.addmm.default": addmm,
    "matmorph.matmul_nbits.default": _quantised("matmul_nbits", 4),
    "matmorph.matmul_codebook.default": _quantised("matmul_codebook", 3),
    "matmorph.matmul_nbits_transposed.default": _quantised_transposed("matmul_nbits", 4),
    "matmorph.matmul_codebook_transposed.default": _quantised_transposed("matmul_codebook", 3),
}
