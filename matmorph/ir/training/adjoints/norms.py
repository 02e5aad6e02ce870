"""Adjoints of softmax, log-softmax, layer normalisation and attention, in the forms with the fewest passes over the large tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from matmorph.errors import ExportError
from matmorph.ir.core import Node, Value
from matmorph.ir.training.adjoints.products import product, scaled, turned
from matmorph.ir.training.adjoints.tape import AdjointRule, Cotangents, Tape, TapeStep, argument, composite, in_float32


def _mul(t: Tape, a: Value, b: Value | float) -> Value:
    return t.b("aten.mul.Tensor", a, b)


def _total(t: Tape, value: Value, axes: list[int]) -> Value:
    return t.b("aten.sum.dim_IntList", value, axes, True)


def _softmax(t: Tape, node: Node) -> TapeStep:
    """y = softmax(x); dx = y (dy - sum(dy y))."""
    x, axis = node.args[:2]
    (y,) = t.keep(node)

    def pull(found: Cotangents) -> None:
        (dy,) = found
        if dy is not None:
            t.give(x, t.b("aten._softmax_backward_data.default", dy, y, axis, y.tensor.torch_dtype))

    return TapeStep((y,), pull)


def _log_softmax(t: Tape, node: Node) -> TapeStep:
    """y = log softmax(x); dx = dy - exp(y) sum(dy)."""
    x, axis = node.args[:2]
    (y,) = t.keep(node)

    def pull(found: Cotangents) -> None:
        (dy,) = found
        if dy is not None:
            t.give(x, t.b("aten._log_softmax_backward_data.default", dy, y, axis, y.tensor.torch_dtype))

    return TapeStep((y,), pull)


def _layer_norm(t: Tape, node: Node) -> TapeStep:
    """y = n w + b with n = (x - mean) r, r = 1 / sqrt(variance + eps);
    dx = r (g - mean(g) - n mean(g n)) with g = dy w (Ba, Kiros and Hinton, 2016)."""
    x, shape = node.args[:2]
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    eps = argument(node, 4, "eps", 1e-5)
    y, mean, r = t.b.many("aten.native_layer_norm.default", x, shape, weight, bias, eps)
    axes = list(range(-len(shape), 0))

    def pull(found: Cotangents) -> None:
        (dy,) = found
        if dy is None:
            return
        if bias is not None:
            t.give(bias, dy)
        if not (t.wants(x) or t.wants(weight)):
            return
        n = _mul(t, t.b("aten.sub.Tensor", x, mean), r)
        if t.wants(weight):
            t.give(weight, _mul(t, dy, n))
        if t.wants(x):
            g = dy if weight is None else _mul(t, dy, weight)
            centred = t.b("aten.sub.Tensor", g, t.b("aten.mean.dim", g, axes, True))
            along = _mul(t, n, t.b("aten.mean.dim", _mul(t, g, n), axes, True))
            t.give(x, _mul(t, t.b("aten.sub.Tensor", centred, along), r))

    return TapeStep((y,), pull)


def _batch_norm(t: Tape, node: Node) -> TapeStep:
    """In eval mode: y = (x - mean) r w + b with r = 1 / sqrt(variance + eps), all per channel, mean and variance constants."""
    x, weight, bias, mean, variance = node.args[:5]
    eps = node.args[6]
    outputs = t.keep(node)
    column = [-1, *(1 for _ in x.tensor.shape[2:])]

    def pull(found: Cotangents) -> None:
        dy = found[0]
        if dy is None:
            return
        r = t.b("aten.rsqrt.default", t.b("aten.add.Tensor", variance, eps))
        rest = [axis for axis in range(len(x.tensor.shape)) if axis != 1]
        if t.wants(bias):
            t.give(bias, t.b("aten.sum.dim_IntList", dy, rest))
        if t.wants(weight):
            normal = _mul(t, t.b("aten.sub.Tensor", x, _column(t, mean, column)), _column(t, r, column))
            t.give(weight, t.b("aten.sum.dim_IntList", _mul(t, dy, normal), rest))
        if t.wants(x):
            t.give(x, _mul(t, dy, _column(t, r if weight is None else _mul(t, r, weight), column)))

    return TapeStep(outputs, pull)


def _group_norm(t: Tape, node: Node) -> TapeStep:
    """Each group of channels of an example gets mean 0 and variance 1, then weight and bias per channel."""
    x, groups = node.args[:2]
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    eps = argument(node, 4, "eps", 1e-5)
    flat = t.call("aten.reshape.default", x, [t.axes(x)[0], groups, -1])
    centred = t.call("aten.sub.Tensor", flat, t.call("aten.mean.dim", flat, [-1], True))
    variance = t.call("aten.mean.dim", t.call("aten.mul.Tensor", centred, centred), [-1], True)
    normal = t.call("aten.mul.Tensor", centred, t.call("aten.rsqrt.default", t.call("aten.add.Tensor", variance, eps)))
    y = t.call("aten.reshape.default", normal, t.axes(x))
    column = [-1, *(1 for _ in x.tensor.shape[2:])]
    for op, channels in (("aten.mul.Tensor", weight), ("aten.add.Tensor", bias)):
        if channels is not None:
            y = t.call(op, y, t.call("aten.reshape.default", channels, column))
    return composite(t, y)


def _column(t: Tape, channels: Value, column: list[int]) -> Value:
    return t.b("aten.reshape.default", channels, column)


def _attention(t: Tape, node: Node) -> TapeStep:
    """o = p v with p = softmax(s q k' + mask), scaled once, on q.

    ds = p (dp - d) with d = sum(dp p) = sum(do o) over a row (Dao et al., 2022, FlashAttention, appendix B.2): the second form is a sum
    over the width of a head instead of one over the sequence. Rows that see nothing give 0, as in torch, and so do their gradients.
    """
    q, k, v = node.args[:3]
    mask, dropout, causal = (argument(node, at, name, default) for at, name, default in _ATTENTION)
    if dropout:
        raise ExportError(
            f"attention with dropout {dropout} cannot be trained", [f"in {node.origin.path}: set dropout to 0 and trace again"]
        )
    if mask is not None and causal:
        rest = {name: arg for name, arg in node.attrs.items() if name != "is_causal"}
        return composite(t, t.call(node.op, q, k, v, _below(t, mask, q, k), **rest))
    width = q.tensor.shape[-1]
    factor = node.attrs.get("scale") or 1.0 / math.sqrt(int(width))
    if node.attrs.get("enable_gqa") and k.tensor.shape[-3] != q.tensor.shape[-3]:
        return _grouped(t, node)
    half = q.tensor.dtype if q.tensor.dtype in ("float16", "bfloat16") else None
    working = "float32" if half else q.tensor.dtype
    scores_of = scaled(t, q, factor)
    scores = t.cast(product(t, scores_of, turned(t, k)), working)
    alive: Value | None = None
    if causal:
        scores = t.b("aten.add.Tensor", scores, _bias(t, _triangle(t, q, k), working))
    elif mask is not None:
        scores = t.b("aten.add.Tensor", scores, _bias(t, mask, working))
        alive = _alive(t, mask, v.tensor.dtype)
    p = t.b("aten.softmax.int", scores, -1)
    low = t.cast(p, v.tensor.dtype)
    o = product(t, low, v)
    o = o if alive is None else _mul(t, o, alive)

    def pull(found: Cotangents) -> None:
        (do,) = found
        if do is None:
            return
        do = do if alive is None else _mul(t, do, alive)
        if t.wants(v):
            t.give(v, product(t, turned(t, low), do))
        if not (t.wants(q) or t.wants(k) or t.wants(mask)):
            return
        dp = t.cast(product(t, do, turned(t, v)), working)
        d = _total(t, t.cast(_mul(t, do, o), working), [-1])
        ds = _mul(t, p, t.b("aten.sub.Tensor", dp, d))
        t.give(mask, ds)
        ds = t.cast(ds, q.tensor.dtype)
        if t.wants(q):
            t.give(q, scaled(t, product(t, ds, k), factor))
        if t.wants(k):
            t.give(k, product(t, turned(t, ds), scores_of))

    return TapeStep((o,), pull)


_ATTENTION = ((3, "attn_mask", None), (4, "dropout_p", 0.0), (5, "is_causal", False))


def _bias(t: Tape, mask: Value, dtype: str) -> Value:
    """What is added to the scores. The lowest finite number stands for -inf and where the mask forbids: as far from all others, and a row
    without anything allowed stays free of NaN."""

    def make() -> Value:
        if mask.tensor.dtype == "bool":
            return t.cast(t.b("aten.where.Scalar", mask, 0.0, torch.finfo(torch.float32).min), dtype)
        return t.b("aten.clamp_min.default", mask, torch.finfo(mask.tensor.torch_dtype).min)

    return t.once(("bias", mask, dtype), make)


def _below(t: Tape, mask: Value, q: Value, k: Value) -> Value:
    """A mask that allows nothing behind a row's own place either."""
    triangle = _triangle(t, q, k)
    if mask.tensor.dtype == "bool":
        return t.b("aten.logical_and.default", mask, triangle)
    return t.call("aten.add.Tensor", mask, t.cast(t.b("aten.where.Scalar", triangle, 0.0, -math.inf), mask.tensor.dtype))


def _alive(t: Tape, mask: Value, dtype: str) -> Value:
    """1 for rows with something allowed, else 0: [.., rows, 1]."""

    def make() -> Value:
        allowed = mask if mask.tensor.dtype == "bool" else t.b("aten.gt.Scalar", mask, -math.inf)
        return t.b("aten.amax.default", t.b("aten._to_copy.default", allowed, dtype=getattr(torch, dtype)), [-1], True)

    return t.once(("alive", mask, dtype), make)


def _triangle(t: Tape, q: Value, k: Value) -> Value:
    """Row i sees columns 0 to i."""
    rows, columns = q.tensor.shape[-2], k.tensor.shape[-2]

    def make() -> Value:
        down = t.b("aten.arange.default", t.axes(q)[-2], device=t.device)
        across = t.b("aten.arange.default", t.axes(k)[-2], device=t.device)
        return t.b("aten.ge.Tensor", t.b("aten.unsqueeze.default", down, 1), across)

    return t.once(("triangle", rows, columns), make)


def _grouped(t: Tape, node: Node) -> TapeStep:
    """Several heads of queries per head of keys and values: those are repeated, and their gradients summed, head by head."""
    q = node.args[0]
    repeated = []
    for value in node.args[1:3]:
        batch, heads, length, width = t.axes(value)
        times = int(q.tensor.shape[1]) // int(value.tensor.shape[1])
        wide = t.call("aten.expand.default", t.call("aten.unsqueeze.default", value, 2), [batch, heads, times, length, width])
        repeated.append(t.call("aten.reshape.default", wide, [batch, int(q.tensor.shape[1]), length, width]))
    rest = {name: arg for name, arg in node.attrs.items() if name != "enable_gqa"}
    return composite(t, t.call(node.op, q, *repeated, *node.args[3:], **rest))


NORMS: Mapping[str, AdjointRule] = {
    "aten.softmax.int": in_float32(_softmax),
    "aten._softmax.default": in_float32(_softmax),
    "aten.log_softmax.int": in_float32(_log_softmax),
    "aten._log_softmax.default": in_float32(_log_softmax),
    "aten._native_batch_norm_legit_no_training.default": _batch_norm,
    "aten.group_norm.default": in_float32(_group_norm),
    "aten.layer_norm.default": in_float32(_layer_norm),
    "aten.scaled_dot_product_attention.default": _attention,
}
