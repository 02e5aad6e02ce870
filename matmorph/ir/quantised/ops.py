"""Operators on quantised weights: the torch library `matmorph`, registered when this module is first imported.

| operator                                | result                                 |
|-----------------------------------------|----------------------------------------|
| `matmul_nbits`, `matmul_codebook`       | x [.., K] -> x @ W.T + bias, [.., N]   |
| the same with `_transposed` at the end  | y [.., N] -> y @ W, [.., K]            |
| `gather_nbits`                          | indices [..] -> rows of W, [.., D]     |

Layouts of a weight: see `quant_dense`. It is dequantised a few million numbers at a time, in float32 or better, and rounded to the type of
the activations. Gradients exist with respect to the activations and the bias; codes, scales and zero points do not train. Operands that do
not fit raise ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.nn.functional import linear

from matmorph.ir.quantised.dense import (
    Rows,
    check_codebook,
    check_nbits,
    codebook_rows,
    expect,
    nbits_dense,
    nbits_rows,
    short,
    working_type,
)

_LIBRARY = torch.ops.matmorph
NBITS, CODEBOOK = "matmorph.matmul_nbits.default", "matmorph.matmul_codebook.default"

# uniform levels


def _nbits_result(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    block_size: int,
) -> Tensor:
    """Checks the operands; an empty tensor for the result."""
    check_nbits(codes, scales, zero_points, out_features, in_features, bits, block_size)
    _check_bias(bias, out_features)
    return _result(x, in_features, out_features)


def _matmul_nbits(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    block_size: int,
) -> Tensor:
    """x [.., in_features] times the transposed weight, plus bias [out_features]; in the type of x."""
    y = _nbits_result(x, codes, scales, zero_points, bias, in_features, out_features, bits, block_size)
    return _times_transposed(x, nbits_rows(x, codes, scales, zero_points, in_features, bits), bias, y)


def _nbits_result_transposed(
    y: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    block_size: int,
) -> Tensor:
    check_nbits(codes, scales, zero_points, out_features, in_features, bits, block_size)
    return _result(y, out_features, in_features)


def _matmul_nbits_transposed(
    y: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    block_size: int,
) -> Tensor:
    """y [.., out_features] times the weight; in the type of y."""
    x = _nbits_result_transposed(y, codes, scales, zero_points, in_features, out_features, bits, block_size)
    return _times(y, nbits_rows(y, codes, scales, zero_points, in_features, bits), x)


def _rows_result(
    indices: Tensor, codes: Tensor, scales: Tensor, zero_points: Tensor | None, width: int, bits: int, block_size: int
) -> Tensor:
    if indices.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"indices are int64 or int32, not {short(indices.dtype)}")
    check_nbits(codes, scales, zero_points, codes.shape[0], width, bits, block_size, table=True)
    return scales.new_empty((*indices.shape, width))


def _gather_nbits(
    indices: Tensor, codes: Tensor, scales: Tensor, zero_points: Tensor | None, width: int, bits: int, block_size: int
) -> Tensor:
    """Rows [.., width] of a quantised table at `indices` (integers from 0), in the type of the scales."""
    rows = _rows_result(indices, codes, scales, zero_points, width, bits, block_size)
    picked = indices.reshape(-1)
    zeros = None if zero_points is None else zero_points.index_select(0, picked)
    chosen = codes.reshape(len(codes), -1).index_select(0, picked), scales.index_select(0, picked), zeros
    return rows.copy_(nbits_dense(*chosen, width, bits, block_size, working_type(scales)).view(rows.shape))


# codebooks


def _codebook_result(
    x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None, table: str, in_features: int, out_features: int, block_size: int
) -> Tensor:
    check_codebook(codes, absmax, table, out_features * in_features, block_size)
    _check_bias(bias, out_features)
    return _result(x, in_features, out_features)


def _matmul_codebook(
    x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None, table: str, in_features: int, out_features: int, block_size: int
) -> Tensor:
    """x [.., in_features] times the transposed weight, plus bias [out_features]; in the type of x. `table`: a name in `TABLES`."""
    y = _codebook_result(x, codes, absmax, bias, table, in_features, out_features, block_size)
    return _times_transposed(x, codebook_rows(x, codes, absmax, table, out_features, in_features, block_size), bias, y)


def _codebook_result_transposed(
    y: Tensor, codes: Tensor, absmax: Tensor, table: str, in_features: int, out_features: int, block_size: int
) -> Tensor:
    check_codebook(codes, absmax, table, out_features * in_features, block_size)
    return _result(y, out_features, in_features)


def _matmul_codebook_transposed(
    y: Tensor, codes: Tensor, absmax: Tensor, table: str, in_features: int, out_features: int, block_size: int
) -> Tensor:
    """y [.., out_features] times the weight; in the type of y."""
    x = _codebook_result_transposed(y, codes, absmax, table, in_features, out_features, block_size)
    return _times(y, codebook_rows(y, codes, absmax, table, out_features, in_features, block_size), x)


# both


def _times_transposed(x: Tensor, rows: Rows, bias: Tensor | None, out: Tensor) -> Tensor:
    for at, weight in rows:
        out[..., at] = linear(x, weight, None if bias is None else bias[at].to(x.dtype))
    return out


def _times(y: Tensor, rows: Rows, out: Tensor) -> Tensor:
    total = torch.zeros_like(out, dtype=working_type(y))
    for at, weight in rows:
        total += y[..., at] @ weight
    return out.copy_(total)


def _result(x: Tensor, width: int, new: int) -> Tensor:
    if not x.dtype.is_floating_point or x.dim() < 1 or x.shape[-1] != width:
        raise ValueError(f"a floating-point tensor [.., {width}] is needed, not {short(x.dtype)}{list(x.shape)}")
    return x.new_empty((*x.shape[:-1], new))


def _check_bias(bias: Tensor | None, n: int) -> None:
    if bias is not None:
        expect("bias", bias, None, (n,))


# Shapes without data, and gradients: the adjoint again takes the packed weight, so nothing dense is kept for the backward pass.


def _keep_nbits(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, scales, zero_points, *rest = inputs
    ctx.save_for_backward(codes, scales, zero_points)
    ctx.numbers = rest[-4:]


def _nbits_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    _refuse_training(ctx.needs_input_grad[1:4])
    dx = _LIBRARY.matmul_nbits_transposed(dy, *ctx.saved_tensors, *ctx.numbers) if ctx.needs_input_grad[0] else None
    return (dx, None, None, None, _bias_gradient(dy, ctx.needs_input_grad[4]), *(None,) * 4)


def _nbits_gradient_transposed(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
    _refuse_training(ctx.needs_input_grad[1:4])
    codes, scales, zero_points = ctx.saved_tensors
    return (_LIBRARY.matmul_nbits(dx, codes, scales, zero_points, None, *ctx.numbers), *(None,) * 7)


def _keep_codebook(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, absmax, *rest = inputs
    ctx.save_for_backward(codes, absmax)
    ctx.numbers = rest[-4:]


def _codebook_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    _refuse_training(ctx.needs_input_grad[1:3])
    dx = _LIBRARY.matmul_codebook_transposed(dy, *ctx.saved_tensors, *ctx.numbers) if ctx.needs_input_grad[0] else None
    return (dx, None, None, _bias_gradient(dy, ctx.needs_input_grad[3]), *(None,) * 4)


def _codebook_gradient_transposed(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
    _refuse_training(ctx.needs_input_grad[1:3])
    codes, absmax = ctx.saved_tensors
    return (_LIBRARY.matmul_codebook(dx, codes, absmax, None, *ctx.numbers), *(None,) * 6)


def _bias_gradient(dy: Tensor, wanted: bool) -> Tensor | None:
    return dy.reshape(-1, dy.shape[-1]).sum(0) if wanted else None


def _refuse_training(wanted: tuple[bool, ...]) -> None:
    if any(wanted):
        raise RuntimeError("the codes and scales of a quantised weight do not train: set requires_grad of them to False")


_OPERATORS: Mapping[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Callable[..., Any], Callable[..., Any]] | None]] = {
    "matmul_nbits": (_matmul_nbits, _nbits_result, (_nbits_gradient, _keep_nbits)),
    "matmul_nbits_transposed": (_matmul_nbits_transposed, _nbits_result_transposed, (_nbits_gradient_transposed, _keep_nbits)),
    "matmul_codebook": (_matmul_codebook, _codebook_result, (_codebook_gradient, _keep_codebook)),
    "matmul_codebook_transposed": (
        _matmul_codebook_transposed,
        _codebook_result_transposed,
        (_codebook_gradient_transposed, _keep_codebook),
    ),
    "gather_nbits": (_gather_nbits, _rows_result, None),
}
"""Name: (kernel, shape of its result, (gradient, what is kept for it))."""


def _register() -> None:
    """Once per process: replacing an operator would leave those who hold it with a dangling one."""
    for name, (kernel, fake, gradient) in _OPERATORS.items():
        if hasattr(_LIBRARY, name):
            continue
        made = custom_op(f"matmorph::{name}", kernel, mutates_args=())
        made.register_fake(fake)
        if gradient is not None:
            made.register_autograd(gradient[0], setup_context=gradient[1])


_register()
