"""Operators on quantised weights in torch: values against float64 numpy, gradients against the dense product, types, names, refusals."""

from __future__ import annotations

import importlib
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from exporting import randn
from quantised import ROUNDING, Quantised, Weight, codebook, error, expected, uniform
from torch import Tensor

from matmorph.errors import VerifyError
from matmorph.ir.build import Builder
from matmorph.ir.core import Range
from matmorph.ir.evaluate import evaluate
from matmorph.ir.ops import base_name, normalize, op_name, resolve
from matmorph.ir.quantised import dense as quant_dense
from matmorph.ir.quantised import ops as quant_ops
from matmorph.ir.text.printing import parse_graph, print_graph
from matmorph.ir.to_torch import to_torch
from matmorph.ir.tracing.trace import trace
from matmorph.ir.types import format_dim
from matmorph.ir.verify import verify
from matmorph.passes.linalg.choices import CODEBOOK_BITS
from matmorph.passes.linalg.codebook import normal_float
from matmorph.passes.linalg.packing import byte_table, pack_byte_table, pack_gather, pack_matmul_bnb4, pack_matmul_nbits
from matmorph.passes.linalg.quantize import Quantizer, quantize

OPS = torch.ops.matmorph
# (n, k, block): whole blocks; a short last block and odd n; less than one block; blocks of 8, which no kernel has but torch does.
SIZES = [(6, 64, 32), (13, 40, 16), (5, 10, 64), (7, 24, 8)]


def weights(rng: np.random.Generator, n: int, k: int, block: int) -> dict[str, Weight]:
    found = {f"u{bits}{'z' * zeros}": uniform(rng, n, k, bits, block, zeros) for bits in (2, 4, 8) for zeros in (False, True)}
    found["u4f"] = uniform(rng, n, k, 4, block, "float")
    return found | {table: codebook(rng, n, k, table, block) for table in ("nf4", "nf3", "nf2")}


KINDS = ("u2", "u2z", "u4", "u4z", "u4f", "u8", "u8z", "nf4", "nf3", "nf2")


@pytest.mark.parametrize(("n", "k", "block"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_product_is_that_of_numpy(rng: np.random.Generator, kind: str, n: int, k: int, block: int) -> None:
    weight = weights(rng, n, k, block)[kind]
    assert weight(randn(0, k), randn(n)).shape == (0, n)
    for shape in ((k,), (3, k), (2, 3, k)):
        for bias in (None, randn(n)):
            x = randn(*shape)
            assert error(weight(x, bias), expected(weight, x, bias)) <= ROUNDING


@pytest.mark.parametrize("kind", KINDS)
def test_weight_is_exact(rng: np.random.Generator, kind: str) -> None:
    """In float64 a code times a float32 scale has no rounding, and a product with the identity has none either."""
    weight = weights(rng, 13, 40, 16)[kind]
    assert np.array_equal(weight(torch.eye(40, dtype=torch.float64)).numpy().T, weight.dense)
    adjoint = getattr(OPS, f"{weight.op.__name__}_transposed")
    assert np.array_equal(adjoint(torch.eye(13, dtype=torch.float64), *weight.parts, *weight.numbers).numpy(), weight.dense)


@pytest.mark.parametrize("kind", ["u4z", "nf4", "nf2"])
def test_parts_of_a_weight_join(rng: np.random.Generator, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 numbers of 13 rows never begin a block of 16 but every second row: the codebook must wait for those."""
    weight, chunk = weights(rng, 13, 40, 16)[kind], 90
    monkeypatch.setattr(quant_dense, "_CHUNK", chunk)
    x, y = randn(3, 40), randn(3, 13)
    assert error(weight(x), expected(weight, x)) <= ROUNDING
    adjoint = getattr(OPS, f"{weight.op.__name__}_transposed")
    assert error(adjoint(y, *weight.parts, *weight.numbers), y.double().numpy() @ weight.dense) <= ROUNDING
    codes, scales, *rest = weight.parts
    rows = quant_dense.nbits_rows(x, codes, scales, *rest, 40, 4) if rest else None
    parts = list(rows if rows is not None else quant_dense.codebook_rows(x, codes, scales, kind, 13, 40, 16))
    assert len(parts) == 7
    assert max(part.numel() for _, part in parts) <= chunk


def test_half_precision_rounds_the_weight_once(rng: np.random.Generator) -> None:
    weight = uniform(rng, 6, 64, 4, 32)
    x = randn(3, 64).half()
    found = weight(x)
    assert found.dtype is torch.float16
    dense = torch.from_numpy(weight.dense.astype(np.float32)).half()
    assert torch.equal(found, torch.nn.functional.linear(x, dense))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_gather_is_that_of_numpy(rng: np.random.Generator, bits: int, zeros: bool) -> None:
    table = uniform(rng, 11, 40, bits, 16, zeros)
    codes, scales, zero_points = table.parts
    rows = codes.reshape(11, -1)
    for layout in (codes, rows, rows[:, : 40 * bits // 8]):  # the codes of a matmul, as rows, and without the rest of the last block
        for indices in (torch.tensor([[0, 10, 3], [3, 3, 7]]), torch.tensor(5, dtype=torch.int32), torch.empty(0, 2, dtype=torch.int64)):
            found = OPS.gather_nbits(indices, layout, scales, zero_points, 40, bits, 16)
            assert np.array_equal(found.numpy(), table.dense[indices.numpy()].astype(np.float32))
    half = OPS.gather_nbits(torch.tensor([1]), codes, scales.half(), zero_points, 40, bits, 16)
    assert half.dtype is torch.float16


def test_gather_refuses_rows_that_are_not_there(rng: np.random.Generator) -> None:
    codes, scales, _ = uniform(rng, 4, 16, 4, 16).parts
    for index in (-1, 4):
        with pytest.raises((IndexError, RuntimeError), match="index"):
            OPS.gather_nbits(torch.tensor([index]), codes, scales, None, 16, 4, 16)


def test_layouts_are_those_of_packing() -> None:
    w, x = randn(12, 48), torch.eye(48)
    for bits in (2, 4, 8):
        q = quantize(w, Quantizer("uniform", bits, 32, zero_point=True))
        p = pack_matmul_nbits(q)
        assert torch.equal(OPS.matmul_nbits(x, p.codes, p.scales, p.zero_points, None, 48, 12, bits, 32).T, q.dequantize())
        p = pack_gather(q)
        assert torch.equal(OPS.gather_nbits(torch.arange(12), p.codes, p.scales, p.zero_points, 48, bits, 32), q.dequantize())
    for name, pack in (("nf4", pack_matmul_bnb4), ("nf3", pack_byte_table), ("nf2", pack_byte_table)):
        q = quantize(w, Quantizer(name, block_size=32))
        p = pack(q)
        assert torch.equal(OPS.matmul_codebook(x, p.codes, p.scales, None, name, 48, 12, 32).T, q.dequantize())


def test_tables_are_those_of_quantize() -> None:
    for name, bits in CODEBOOK_BITS.items():
        assert torch.equal(torch.tensor(quant_dense.TABLES[name]), normal_float(bits))
        levels, width = torch.tensor(quant_dense.TABLES[name]), quant_dense.stored_bits(name)
        assert torch.equal(quant_dense.byte_levels(levels, width), byte_table(Quantizer(name)))


# gradients


@pytest.mark.parametrize("kind", ["u2z", "u4", "u8z", "nf4", "nf3"])
def test_gradients_are_those_of_the_dense_product(rng: np.random.Generator, kind: str) -> None:
    weight = weights(rng, 5, 24, 16)[kind]
    x, bias = randn(2, 3, 24).double().requires_grad_(), randn(5).double().requires_grad_()
    dy = randn(2, 3, 5).double()
    found = torch.autograd.grad(weight(x, bias), (x, bias), dy)
    dense = torch.nn.functional.linear(x, torch.from_numpy(weight.dense), bias)
    for actual, reference in zip(found, torch.autograd.grad(dense, (x, bias), dy), strict=True):
        assert error(actual, reference.numpy()) <= 1e-14  # float64, 24 terms
    (alone,) = torch.autograd.grad(weight(x, bias), bias, dy)
    assert torch.equal(alone, found[1])


@pytest.mark.parametrize("kind", ["u4z", "nf4"])
def test_gradients_of_gradients(rng: np.random.Generator, kind: str) -> None:
    weight = weights(rng, 3, 16, 16)[kind]
    x = randn(2, 16).double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: weight(x) ** 2, (x,))


@pytest.mark.parametrize("kind", ["u4z", "nf4"])
def test_nothing_dense_is_kept_for_the_backward_pass(rng: np.random.Generator, kind: str) -> None:
    weight = weights(rng, 64, 64, 32)[kind]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        weight(randn(1, 64).requires_grad_()).sum()
    assert sum(tensor.nbytes for tensor in kept) <= sum(part.nbytes for part in weight.parts if part is not None)


def test_scales_do_not_train(rng: np.random.Generator) -> None:
    codes, scales, _ = uniform(rng, 4, 16, 4, 16).parts
    y = OPS.matmul_nbits(randn(2, 16), codes, scales.requires_grad_(), None, None, 16, 4, 4, 16)
    with pytest.raises(RuntimeError, match="do not train"):
        y.sum().backward()
    weight = codebook(rng, 4, 16, "nf4", 16)
    y = OPS.matmul_codebook(randn(2, 16), weight.parts[0], weight.parts[1].requires_grad_(), None, "nf4", 16, 4, 16)
    with pytest.raises(RuntimeError, match="do not train"):
        y.sum().backward()


@pytest.mark.parametrize("kind", ["u4z", "nf4"])
def test_torch_accepts_the_operators(rng: np.random.Generator, kind: str) -> None:
    """torch's own check of schema, fake rule, gradient and symbolic shapes."""
    weight = weights(rng, 6, 32, 16)[kind]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    args = (randn(3, 32).requires_grad_(), *weight.parts, randn(6).requires_grad_(), *weight.numbers)
    torch.library.opcheck(weight.op.default, args, test_utils=checks)
    adjoint = getattr(OPS, f"{weight.op.__name__}_transposed").default
    torch.library.opcheck(adjoint, (randn(3, 6).requires_grad_(), *weight.parts, *weight.numbers), test_utils=checks)
    codes, scales, zeros = uniform(rng, 6, 32, 4, 16, True).parts
    torch.library.opcheck(OPS.gather_nbits.default, (torch.tensor([1, 5]), codes, scales, zeros, 32, 4, 16), test_utils=checks)


# in the IR


def test_names_resolve() -> None:
    for name in ("matmul_nbits", "matmul_nbits_transposed", "matmul_codebook", "matmul_codebook_transposed", "gather_nbits"):
        op = f"matmorph.{name}.default"
        assert op_name(resolve(op)) == op
        assert base_name(op) == name
    assert normalize("matmorph.gather_nbits.default", (1, 2, 3, None), {"bits": 4, "width": 8}) == ((1, 2, 3, None, 8, 4), {})
    with pytest.raises(VerifyError, match=r"unknown operator 'matmorph\.matmul_nbit\.default'"):
        resolve("matmorph.matmul_nbit.default")


def test_importing_twice_is_safe(rng: np.random.Generator) -> None:
    weight, x, before = uniform(rng, 4, 16, 4, 16), randn(2, 16), resolve("matmorph.matmul_nbits.default")
    y = weight(x)
    importlib.reload(quant_ops)
    assert torch.equal(weight(x), y)
    assert torch.equal(before(x, *weight.parts, None, *weight.numbers), y)  # what the IR has resolved before


def test_types_with_symbolic_axes(rng: np.random.Generator) -> None:
    b = Builder({"batch": Range(), "seq": Range(2, 512)})
    table, ids = uniform(rng, 11, 16, 4, 16, True), b.const("ids", torch.zeros(3, 2, dtype=torch.int64))
    codes, scales, zeros = (b.const(name, part) for name, part in zip(("codes", "scales", "zeros"), table.parts, strict=True))
    rows = b("matmorph.gather_nbits.default", ids, codes, scales, zeros, 16, 4, 16)
    assert str(rows.type) == "float32[3, 2, 16]"
    y = b("matmorph.matmul_nbits.default", rows, codes, scales, zeros, None, 16, 11, 4, 16)
    assert str(y.type) == "float32[3, 2, 11]"
    module = Quantised(table)
    graph = trace(module, {"x": randn(2, 3, 16)}, {"x": {0: "batch", 1: "seq"}})
    assert [format_dim(dim) for dim in graph.nodes[-1].output.tensor.shape] == ["batch", "seq", "11"]


@pytest.mark.parametrize("kind", ["u4z", "u2", "nf4", "nf3"])
def test_traced_printed_run_and_pickled(rng: np.random.Generator, kind: str) -> None:
    weight, bias, x = weights(rng, 7, 24, 16)[kind], randn(7), randn(3, 24)
    graph = trace(Quantised(weight, bias), {"x": x}, {"x": {0: "batch"}})
    verify(graph)
    text = print_graph(graph)
    again = parse_graph(text, {const.path: const.load() for const in graph.state})
    assert print_graph(again) == text
    reference = expected(weight, x, bias)
    assert error(evaluate(again, [x])[0], reference) <= ROUNDING
    module = pickle.loads(pickle.dumps(to_torch(graph)))
    assert error(module(x=x), reference) <= ROUNDING
    module(x=x).sum().backward()
    assert torch.equal(module.bias.grad, torch.full((7,), 3.0))


def changed(weight: Weight, **new: Any) -> tuple[Any, ...]:
    names = ("x", "codes", "scales", "zero_points", "bias", "in_features", "out_features", "bits", "block_size")
    return tuple((dict(zip(names, (randn(2, 24), *weight.parts, None, *weight.numbers), strict=True)) | new).values())


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ({"bits": 3}, "codes have 2, 4, 8 bits, not 3"),
        ({"block_size": 12}, "block size 12: a positive multiple of 8 is needed"),
        ({"block_size": 32}, r"codes must be uint8\[7, 1, 16\], not uint8\[7, 2, 8\]"),
        ({"codes": torch.zeros(7, 2, 8)}, "codes must be uint8"),
        ({"scales": torch.zeros(7, 2, dtype=torch.int32)}, r"scales must be float\[7, 2\], not int32"),
        ({"zero_points": torch.zeros(7, 1)}, "zero_points must be"),
        ({"bias": torch.zeros(6)}, r"bias must be float\[7\], not float32\[6\]"),
        ({"x": torch.zeros(2, 23)}, r"\[\.\., 24\] is needed, not float32\[2, 23\]"),
        ({"x": torch.zeros(2, 24, dtype=torch.int64)}, "a floating-point tensor"),
    ],
)
def test_operands_that_do_not_fit(rng: np.random.Generator, new: dict[str, Any], message: str) -> None:
    args = changed(uniform(rng, 7, 24, 4, 16, True), **new)
    with pytest.raises(ValueError, match=message):
        OPS.matmul_nbits(*args)
    b = Builder({})
    placed = [b.const(f"c{k}", arg) if isinstance(arg, Tensor) else arg for k, arg in enumerate(args)]
    with pytest.raises(VerifyError, match=message):
        b("matmorph.matmul_nbits.default", *placed)


def test_codebook_operands_that_do_not_fit(rng: np.random.Generator) -> None:
    codes, absmax = codebook(rng, 4, 16, "nf4", 16).parts
    for table, given, message in (
        ("fp4", codes, "unknown codebook 'fp4': one of nf4, nf3, nf2"),
        ("nf4", codes[:-1], r"codes must be uint8\[32\], not uint8\[31\]"),
        ("nf2", codes, r"codes must be uint8\[4, 4\], not uint8\[32\]"),
    ):
        with pytest.raises(ValueError, match=message):
            OPS.matmul_codebook(randn(2, 16), given, absmax, None, table, 16, 4, 16)
    with pytest.raises(ValueError, match="indices are int64 or int32, not float32"):
        OPS.gather_nbits(randn(2), *uniform(rng, 4, 16, 4, 16).parts, 16, 4, 16)
