"""Sites of tiny graphs, one for each form: what is found, what is blocked and why, and that every reading computes what the node does."""

from __future__ import annotations

import math

import pytest
import torch

from matmorph.ir.core import Const, Graph
from matmorph.ir.evaluate import evaluate
from matmorph.ir.site import Application, Site
from matmorph.ir.sites.matmul_forms import pixel_steps, weight_first
from matmorph.ir.sites.matmuls import find_sites
from matmorph.ir.text.printing import parse_graph
from matmorph.ir.tracing.trace import trace

# name: (statements, sites as "path form layout OUTxIN applications [xBATCH]", inputs' sizes are those of the text with batch = 3)
FORMS = {
    "linear": (
        """input %x: float32[batch, 8] "x"
        parameter %fc.weight: float32[4, 8] "fc.weight"
        parameter %fc.bias: float32[4] "fc.bias"
        %y: float32[batch, 4] = aten.linear.default(%x, %fc.weight, %fc.bias)
        output %y "y" """,
        ["fc linear oi 4x8 1"],
    ),
    "x @ W.T": (
        """input %x: float32[batch, 5, 8] "x"
        parameter %fc.weight: float32[4, 8] "fc.weight"
        %t: float32[8, 4] = aten.permute.default(%fc.weight, [1, 0])
        %y: float32[batch, 5, 4] = aten.matmul.default(%x, %t)
        output %y "y" """,
        ["fc mm oi 4x8 1"],
    ),
    "chain of layouts": (
        """input %x: float32[batch, 8] "x"
        parameter %w: float32[2, 2, 8] "w"
        %v: float32[4, 8] = aten.view.default(%w, [4, 8])
        %d: float32[4, 8] = aten.detach.default(%v)
        %u: float32[1, 4, 8] = aten.unsqueeze.default(%d, 0)
        %t: float32[1, 8, 4] = aten.transpose.int(%u, -1, -2)
        %s: float32[8, 4] = aten.squeeze.dim(%t, 0)
        %c: float32[8, 4] = aten.clone.default(%s)
        %y: float32[batch, 4] = aten.mm.default(%x, %c)
        output %y "y" """,
        ["w mm oi 4x8 1"],
    ),
    "W @ x": (
        """input %x: float32[batch, 8, 5] "x"
        parameter %w: float32[4, 8] "w"
        %y: float32[batch, 4, 5] = aten.matmul.default(%w, %x)
        output %y "y" """,
        ["w mm oi 4x8 1"],
    ),
    "bmm with an expanded weight": (
        """input %x: float32[batch, 5, 8] "x"
        parameter %w: float32[8, 4] "w"
        %b: int(batch) = aten.sym_size.int(%x, 0)
        %u: float32[1, 8, 4] = aten.unsqueeze.default(%w, 0)
        %e: float32[batch, 8, 4] = aten.expand.default(%u, [%b, -1, -1])
        %y: float32[batch, 5, 4] = aten.bmm.default(%x, %e)
        output %y "y" """,
        ["w mm io 4x8 1"],
    ),
    "addmm": (
        """input %x: float32[batch, 8] "x"
        parameter %c.weight: float32[8, 4] "c.weight"
        parameter %c.bias: float32[4] "c.bias"
        %y: float32[batch, 4] = aten.addmm.default(%c.bias, %x, %c.weight)
        output %y "y" """,
        ["c addmm io 4x8 1"],
    ),
    "einsum oi": (
        """input %x: float32[batch, 5, 8] "x"
        parameter %w: float32[4, 8] "w"
        %y: float32[batch, 5, 4] = aten.einsum.default("bsi,oi->bso", [%x, %w])
        output %y "y" """,
        ["w einsum oi 4x8 1"],
    ),
    "einsum with several out axes": (
        """input %x: float32[batch, 5, 8] "x"
        parameter %w: float32[8, 2, 3] "w"
        %y: float32[batch, 5, 2, 3] = aten.einsum.default("...i,ihd->...hd", [%x, %w])
        output %y "y" """,
        ["w einsum io 6x8 1"],
    ),
    "einsum over every expert": (
        """input %x: float32[2, batch, 8] "x"
        parameter %w: float32[2, 4, 8] "w"
        %y: float32[2, batch, 4] = aten.einsum.default("ebi,eoi->ebo", [%x, %w])
        output %y "y" """,
        ["w expert oi 4x8 1 x2"],
    ),
    "every expert at once": (
        """input %x: float32[batch, 1, 5, 8] "x"
        parameter %w: float32[2, 4, 8] "w"
        %t: float32[2, 8, 4] = aten.transpose.int(%w, 1, 2)
        %y: float32[batch, 2, 5, 4] = aten.matmul.default(%x, %t)
        output %y "y" """,
        ["w expert oi 4x8 1 x2"],
    ),
    "picked experts": (
        """input %x: float32[batch, 8] "x"
        input %ids: int64[batch] "ids"
        parameter %w: float32[2, 4, 8] "w"
        %p: float32[batch, 4, 8] = aten.index.Tensor(%w, [%ids])
        %c: float32[batch, 8, 1] = aten.unsqueeze.default(%x, -1)
        %y: float32[batch, 4, 1] = aten.bmm.default(%p, %c)
        output %y "y" """,
        ["w expert oi 4x8 1 x2"],
    ),
    "picked experts, [in, out]": (
        """input %x: float32[batch, 1, 8] "x"
        input %ids: int64[batch] "ids"
        parameter %w: float32[2, 8, 4] "w"
        %p: float32[batch, 8, 4] = aten.index_select.default(%w, 0, %ids)
        %y: float32[batch, 1, 4] = aten.bmm.default(%x, %p)
        output %y "y" """,
        ["w expert io 4x8 1 x2"],
    ),
    "one expert at a time": (
        """input %x: float32[batch, 8] "x"
        parameter %w: float32[2, 4, 8] "w"
        %a: float32[4, 8] = aten.select.int(%w, 0, 0)
        %b: float32[4, 8] = aten.select.int(%w, 0, -1)
        %y: float32[batch, 4] = aten.linear.default(%x, %a)
        %z: float32[batch, 4] = aten.linear.default(%x, %b)
        output %y "y"
        output %z "z" """,
        ["w[0:4] linear oi 4x8 1", "w[4:8] linear oi 4x8 1"],
    ),
    "conv1x1": (
        """input %x: float32[batch, 8, 5, 5] "x"
        parameter %c.weight: float32[4, 8, 1, 1] "c.weight"
        parameter %c.bias: float32[4] "c.bias"
        %y: float32[batch, 4, 5, 5] = aten.conv2d.default(%x, %c.weight, %c.bias)
        output %y "y" """,
        ["c conv1x1 oi 4x8 1"],
    ),
    "conv1x1 in one dimension": (
        """input %x: float32[batch, 8, 5] "x"
        parameter %c.weight: float32[4, 8, 1] "c.weight"
        %y: float32[batch, 4, 5] = aten.conv1d.default(%x, %c.weight, None, [1], [0], [1], 1)
        output %y "y" """,
        ["c conv1x1 oi 4x8 1"],
    ),
    "slices": (
        """input %x: float32[batch, 8] "x"
        parameter %p.weight: float32[12, 8] "p.weight"
        parameter %p.bias: float32[12] "p.bias"
        %w.0: float32[4, 8], %w.1: float32[8, 8] = aten.split_with_sizes.default(%p.weight, [4, 8])
        %b.0: float32[4], %b.1: float32[8] = aten.split_with_sizes.default(%p.bias, [4, 8])
        %y: float32[batch, 4] = aten.linear.default(%x, %w.0, %b.0)
        %z: float32[batch, 8] = aten.linear.default(%x, %w.1, %b.1)
        output %y "y"
        output %z "z" """,
        ["p[0:4] linear oi 4x8 1", "p[4:12] linear oi 8x8 1"],
    ),
    "slices of [in, out]": (
        """input %x: float32[batch, 8] "x"
        parameter %p: float32[8, 12] "p"
        %a: float32[8, 4] = aten.slice.Tensor(%p, 1, -4, 9223372036854775807)
        %b.0: float32[8, 6], %b.1: float32[8, 6] = aten.chunk.default(%p, 2, 1)
        %c: float32[8, 2] = aten.narrow.default(%b.1, 1, 0, 2)
        %y: float32[batch, 4] = aten.mm.default(%x, %a)
        %z: float32[batch, 2] = aten.mm.default(%x, %c)
        output %y "y"
        output %z "z" """,
        ["p[8:12] mm io 4x8 1", "p[6:8] mm io 2x8 1"],
    ),
    "one weight applied twice": (
        """input %x: float32[batch, 8] "x"
        parameter %fc.weight: float32[8, 8] "fc.weight"
        %y: float32[batch, 8] = aten.linear.default(%x, %fc.weight)
        %t: float32[8, 8] = aten.t.default(%fc.weight)
        %z: float32[batch, 8] = aten.mm.default(%y, %t)
        output %z "z" """,
        ["fc linear oi 8x8 2"],
    ),
    "a strided and padded 1x1 convolution": (
        """input %x: float32[batch, 8, 5, 7] "x"
        parameter %c.weight: float32[4, 8, 1, 1] "c.weight"
        parameter %c.bias: float32[4] "c.bias"
        %y: float32[batch, 4, 3, 9] = aten.conv2d.default(%x, %c.weight, %c.bias, [2, 1], [0, 1])
        output %y "y" """,
        ["c conv1x1 oi 4x8 1"],
    ),
    "inner": (
        """input %x: float32[batch, 5, 8] "x"
        parameter %w: float32[4, 8] "w"
        %y: float32[batch, 5, 4] = aten.inner.default(%x, %w)
        output %y "y" """,
        ["w mm oi 4x8 1"],
    ),
    "a vector": (
        """input %x: float32[8] "x"
        parameter %w: float32[4, 8] "w"
        parameter %v: float32[3, 4] "v"
        parameter %u: float32[2, 3] "u"
        parameter %b: float32[3] "b"
        %y: float32[4] = aten.mv.default(%w, %x)
        %z: float32[3] = aten.addmv.default(%b, %v, %y)
        %a: float32[2] = aten.matmul.default(%u, %z)
        output %a "a" """,
        ["w mm oi 4x8 1", "v mm oi 3x4 1", "u mm oi 2x3 1"],
    ),
    "baddbmm": (
        """input %x: float32[2, batch, 8] "x"
        parameter %w: float32[2, 8, 4] "w"
        parameter %b: float32[2, 1, 4] "b"
        %y: float32[2, batch, 4] = aten.baddbmm.default(%b, %x, %w)
        output %y "y" """,
        ["w expert io 4x8 1 x2"],
    ),
    "tensordot": (
        """input %x: float32[batch, 5, 8] "x"
        parameter %w: float32[8, 2, 3] "w"
        parameter %v: float32[2, 3, 4] "v"
        %y: float32[batch, 5, 2, 3] = aten.tensordot.default(%x, %w, [2], [0])
        %z: float32[batch, 5, 4] = aten.tensordot.default(%y, %v, [2, 3], [0, 1])
        output %z "z" """,
        ["w mm io 6x8 1", "v mm io 4x6 1"],
    ),
    "a vector as a matrix": (
        """input %x: float32[batch, 8] "x"
        parameter %f: float32[32] "flat"
        %w: float32[4, 8] = aten.view.default(%f, [4, 8])
        %y: float32[batch, 4] = aten.linear.default(%x, %w)
        output %y "y" """,
        ["flat linear oi 4x8 1"],
    ),
    "widths of 1": (
        """input %x: float32[batch, 1] "x"
        parameter %a.weight: float32[4, 1] "a.weight"
        parameter %b: float32[4, 1] "b"
        %y: float32[batch, 4] = aten.linear.default(%x, %a.weight)
        %z: float32[batch, 1] = aten.mm.default(%y, %b)
        output %z "z" """,
        ["a linear oi 4x1 1", "b mm oi 1x4 1"],
    ),
}

BLOCKED = {
    "overlapping slices": (
        """input %x: float32[batch, 8] "x"
        parameter %w: float32[12, 8] "w"
        %a: float32[8, 8] = aten.slice.Tensor(%w, 0, 0, 8)
        %b: float32[8, 8] = aten.slice.Tensor(%w, 0, 4, 12)
        %y: float32[batch, 8] = aten.linear.default(%x, %a)
        %z: float32[batch, 8] = aten.linear.default(%y, %b)
        output %z "z" """,
        "w linear oi 12x8 2",
        "its rows 0:8 and 4:12 overlap",
    ),
    "both ways": (
        """input %x: float32[batch, 8] "x"
        parameter %w: float32[4, 8] "w"
        %y: float32[batch, 4] = aten.linear.default(%x, %w)
        %z: float32[batch, 8] = aten.mm.default(%y, %w)
        output %z "z" """,
        "w linear oi 4x8 2",
        "applied in several shapes: 8x4 (io), 4x8 (oi)",
    ),
    "a slice of the in axis": (
        """input %x: float32[batch, 3] "x"
        parameter %w: float32[4, 8] "w"
        %a: float32[4, 3] = aten.slice.Tensor(%w, 1, 0, 3)
        %y: float32[batch, 4] = aten.linear.default(%x, %a)
        output %y "y" """,
        "w linear oi 4x8 1",
        "only a part of its in axis, or every n-th row, is read",
    ),
    "every second row": (
        """input %x: float32[batch, 8] "x"
        parameter %w: float32[4, 8] "w"
        %a: float32[2, 8] = aten.slice.Tensor(%w, 0, 0, 4, 2)
        %y: float32[batch, 2] = aten.linear.default(%x, %a)
        output %y "y" """,
        "w linear oi 4x8 1",
        "only a part of its in axis, or every n-th row, is read",
    ),
    "converted": (
        """input %x: float16[batch, 8] "x"
        parameter %w: float32[4, 8] "w"
        %h: float16[4, 8] = aten._to_copy.default(%w, dtype=torch.float16)
        %y: float16[batch, 4] = aten.linear.default(%x, %h)
        output %y "y" """,
        "w linear oi 4x8 1",
        "it is converted to float16 before it is used",
    ),
    "read by something else too": (
        """input %x: float32[batch, 8] "x"
        parameter %w: float32[4, 8] "w"
        %y: float32[batch, 4] = aten.linear.default(%x, %w)
        %n: float32[] = aten.sum.default(%w)
        output %y "y"
        output %n "n" """,
        "w linear oi 4x8 1",
        "it is also read by aten.sum.default",
    ),
    "returned": (
        """input %x: float32[batch, 8] "x"
        parameter %w: float32[4, 8] "w"
        %y: float32[batch, 4] = aten.linear.default(%x, %w)
        output %y "y"
        output %w "w" """,
        "w linear oi 4x8 1",
        "it is also read by the result of the model",
    ),
    "einsum that permutes": (
        """input %x: float32[batch, 5, 8] "x"
        parameter %w: float32[8, 2, 3] "w"
        %y: float32[batch, 2, 5, 3] = aten.einsum.default("bsi,ihd->bhsd", [%x, %w])
        output %y "y" """,
        "w einsum io 6x8 1",
        "einsum 'bsi,ihd->bhsd' sums over or permutes other axes",
    ),
    "einsum over two axes": (
        """input %x: float32[batch, 2, 3] "x"
        parameter %w: float32[2, 3, 8] "w"
        %y: float32[batch, 8] = aten.einsum.default("bhd,hdo->bo", [%x, %w])
        output %y "y" """,
        "w einsum io 8x6 1",
        "einsum 'bhd,hdo->bo' contracts 2 axes",
    ),
    "scaled addmm": (
        """input %x: float32[batch, 8] "x"
        parameter %w: float32[8, 4] "w"
        parameter %b: float32[4] "b"
        %y: float32[batch, 4] = aten.addmm.default(%b, %x, %w, alpha=2)
        output %y "y" """,
        "w addmm io 4x8 1",
        "its product or bias is scaled by the same node (alpha, beta)",
    ),
    "a slice of a table as head": (
        """input %ids: int64[batch] "ids"
        parameter %e.weight: float32[10, 8] "e.weight"
        %h: float32[batch, 8] = aten.embedding.default(%e.weight, %ids)
        %s: float32[6, 8] = aten.slice.Tensor(%e.weight, 0, 0, 6)
        %y: float32[batch, 6] = aten.linear.default(%h, %s)
        output %y "y" """,
        "e linear oi 10x8 1",
        "it is an embedding table of which a matmul reads only a part, or across",
    ),
}

COMPUTED = {
    "a masked weight": (
        """input %x: float32[batch, 8] "x"
        parameter %w: float32[4, 8] "fc.weight_orig"
        buffer %m: float32[4, 8] "fc.weight_mask"
        %p: float32[4, 8] = aten.mul.Tensor(%w, %m)
        %y: float32[batch, 4] = aten.linear.default(%x, %p)
        output %y "y" """,
        ["fc linear oi 4x8 1 = fc.weight_orig fc.weight_mask"],
    ),
    "a product of two weights": (
        """input %x: float32[batch, 8] "x"
        parameter %a: float32[4, 2] "a"
        parameter %b: float32[2, 8] "b"
        %w: float32[4, 8] = aten.mm.default(%a, %b)
        %y: float32[batch, 4] = aten.linear.default(%x, %w)
        output %y "y" """,
        ["b linear oi 4x8 1 = a b"],
    ),
    "a weight made by a linear": (
        """input %x: float32[batch, 8] "x"
        parameter %z: float32[1, 6] "code"
        parameter %h: float32[32, 6] "maker.weight"
        %f: float32[1, 32] = aten.linear.default(%z, %h)
        %w: float32[4, 8] = aten.view.default(%f, [4, 8])
        %y: float32[batch, 4] = aten.linear.default(%x, %w)
        output %y "y" """,
        ["maker linear oi 4x8 1 = code maker.weight"],
    ),
    "computed again for each application": (
        """input %x: float32[batch, 8] "x"
        parameter %w: float32[8, 8] "w"
        %a: float32[8, 8] = aten.mul.Scalar(%w, 0.5)
        %y: float32[batch, 8] = aten.linear.default(%x, %a)
        %b: float32[8, 8] = aten.mul.Scalar(%w, 0.5)
        %t: float32[8, 8] = aten.t.default(%b)
        %z: float32[batch, 8] = aten.mm.default(%y, %t)
        output %z "z" """,
        ["w linear oi 8x8 2 = w"],
    ),
    "slices of a computed weight": (
        """input %x: float32[batch, 8] "x"
        parameter %w: float32[12, 8] "in_proj_weight"
        %m: float32[12, 8] = aten.tanh.default(%w)
        %a: float32[4, 8], %b: float32[8, 8] = aten.split_with_sizes.default(%m, [4, 8])
        %y: float32[batch, 4] = aten.linear.default(%x, %a)
        %z: float32[batch, 8] = aten.linear.default(%x, %b)
        output %y "y"
        output %z "z" """,
        ["in_proj_weight[0:4] linear oi 4x8 1 = in_proj_weight", "in_proj_weight[4:12] linear oi 8x8 1 = in_proj_weight"],
    ),
    "rows in another order, and a vector beside": (
        """input %x: float32[batch, 8] "x"
        parameter %w: float32[4, 8] "fc.parametrizations.weight.original"
        parameter %g: float32[4] "fc.parametrizations.weight.0.g"
        constant %i: int64[4] "order"
        %p: float32[4, 8] = aten.index.Tensor(%w, [%i])
        %u: float32[4, 1] = aten.unsqueeze.default(%g, 1)
        %s: float32[4, 8] = aten.mul.Tensor(%p, %u)
        %y: float32[batch, 4] = aten.linear.default(%x, %s)
        output %y "y" """,
        ["fc linear oi 4x8 1 = fc.parametrizations.weight.original fc.parametrizations.weight.0.g order"],
    ),
}

SHARED = {
    "two weights of one parameter": (
        """input %x: float32[batch, 8] "x"
        parameter %w: float32[8, 8] "w"
        %a: float32[8, 8] = aten.mul.Scalar(%w, 0.5)
        %y: float32[batch, 8] = aten.linear.default(%x, %a)
        %b: float32[8, 8] = aten.mul.Scalar(%w, 2.0)
        %z: float32[batch, 8] = aten.linear.default(%y, %b)
        output %z "z" """,
        [("w", "it is computed from w, which mul reads too"), ("w_1", "it is computed from w, which mul reads too")],
    ),
    "beside the parameter itself": (
        """input %x: float32[batch, 8] "x"
        parameter %w: float32[8, 8] "w"
        %y: float32[batch, 8] = aten.linear.default(%x, %w)
        %b: float32[8, 8] = aten.mul.Scalar(%w, 2.0)
        %z: float32[batch, 8] = aten.linear.default(%y, %b)
        output %z "z" """,
        [("w", "it is also read by aten.mul.Scalar"), ("w_1", "it is computed from w, which linear reads too")],
    ),
    "returned": (
        """input %x: float32[batch, 8] "x"
        parameter %w: float32[4, 8] "w"
        %b: float32[4, 8] = aten.tanh.default(%w)
        %y: float32[batch, 4] = aten.linear.default(%x, %b)
        output %y "y"
        output %w "w" """,
        [("w", "it is computed from w, which the result of the model reads too")],
    ),
    "a vector of two matrices": (
        """input %x: float32[batch, 8] "x"
        parameter %f: float32[44] "flat"
        %a: float32[32] = aten.slice.Tensor(%f, 0, 0, 32)
        %b: float32[12] = aten.slice.Tensor(%f, 0, 32, 44)
        %v: float32[4, 8] = aten.view.default(%a, [4, 8])
        %w: float32[3, 4] = aten.view.default(%b, [3, 4])
        %y: float32[batch, 4] = aten.linear.default(%x, %v)
        %z: float32[batch, 3] = aten.linear.default(%y, %w)
        output %z "z" """,
        [("flat", "it is a part of a vector that holds more than one matrix")],
    ),
}

KERNEL = "a kernel of 3 pixels is multiplied at every place that it slides to"
LISTED = {
    "a convolution of 3 pixels": (
        """input %x: float32[batch, 8, 5] "x"
        parameter %c.weight: float32[4, 8, 3] "c.weight"
        %y: float32[batch, 4, 3] = aten.conv1d.default(%x, %c.weight)
        output %y "y" """,
        [("c", "conv", KERNEL)],
    ),
    "a computed kernel": (
        """input %x: float32[batch, 8, 5] "x"
        parameter %g: float32[4, 1, 1] "c.weight_g"
        parameter %v: float32[4, 8, 3] "c.weight_v"
        %w: float32[4, 8, 3] = aten._weight_norm.default(%v, %g)
        %y: float32[batch, 4, 3] = aten.conv1d.default(%x, %w)
        output %y "y" """,
        [("c.weight_g", "conv", KERNEL), ("c.weight_v", "conv", KERNEL)],
    ),
    "a grouped 1x1 convolution": (
        """input %x: float32[batch, 8, 5] "x"
        parameter %c.weight: float32[4, 4, 1] "c.weight"
        %y: float32[batch, 4, 5] = aten.conv1d.default(%x, %c.weight, None, [1], [0], [1], 2)
        output %y "y" """,
        [("c", "conv", "a convolution in 2 groups multiplies each group of channels by a part of its kernel (1 pixels)")],
    ),
    "a transposed convolution": (
        """input %x: float32[batch, 8, 5] "x"
        parameter %c.weight: float32[8, 4, 2] "c.weight"
        %y: float32[batch, 4, 10] = aten.conv_transpose1d.default(%x, %c.weight, None, [2])
        output %y "y" """,
        [("c", "conv", "the kernel of a transposed convolution (2 pixels) spreads its input")],
    ),
    "an outer product": (
        """input %x: float32[batch] "x"
        parameter %w: float32[4, 8] "w"
        %y: float32[batch, 4, 8] = aten.einsum.default("b,oi->boi", [%x, %w])
        output %y "y" """,
        [("w", "product", "einsum multiplies it in a form that is not read as rows times a matrix")],
    ),
    "learned queries": (
        """input %k: float32[batch, 2, 5, 8] "k"
        parameter %q: float32[1, 2, 3, 8] "queries"
        %b: int(batch) = aten.sym_size.int(%k, 0)
        %e: float32[batch, 2, 3, 8] = aten.expand.default(%q, [%b, -1, -1, -1])
        %y: float32[batch, 2, 3, 8] = aten.scaled_dot_product_attention.default(%e, %k, %k)
        output %y "y" """,
        [("queries", "product", "it is an operand of an attention, not the weight of a matmul")],
    ),
    "what another weight multiplies": (
        """parameter %w: float32[4, 8] "fc.weight"
        parameter %q: float32[3, 8] "queries"
        input %x: float32[3, 4] "x"
        %l: float32[3, 8] = aten.layer_norm.default(%q, [8])
        %y: float32[3, 4] = aten.linear.default(%l, %w)
        %z: float32[3, 4] = aten.add.Tensor(%y, %x)
        output %z "z" """,
        [("fc", "linear", None), ("queries", "product", "it is what another weight multiplies, not a weight itself")],
    ),
}

NO_SITES = {
    "a buffer": """input %x: float32[batch, 8] "x"
        buffer %f: float32[8, 4] "f"
        %y: float32[batch, 4] = aten.matmul.default(%x, %f)
        output %y "y" """,
    "a computed buffer": """input %x: float32[batch, 8] "x"
        buffer %f: float32[8, 4] "f"
        %g: float32[8, 4] = aten.cos.default(%f)
        %y: float32[batch, 4] = aten.matmul.default(%x, %g)
        output %y "y" """,
    "a product of activations": """input %x: float32[batch, 8, 8] "x"
        %y: float32[batch, 8, 8] = aten.bmm.default(%x, %x)
        output %y "y" """,
    "a vector": """input %x: float32[batch, 8] "x"
        parameter %v: float32[8] "v"
        %e: float32[8] = aten.exp.default(%v)
        %y: float32[batch] = aten.mv.default(%x, %e)
        output %y "y" """,
}


def graph_of(body: str) -> tuple[Graph, dict[str, torch.Tensor]]:
    """The graph, and random weights for every constant in it."""
    text = f"graph device=cpu\nrange batch 1..\n{body}"
    generator = torch.Generator().manual_seed(0)
    shapes = {const.path: (const.tensor.shape, const.tensor.torch_dtype) for const in parse_graph(text).state}
    weights = {path: torch.randn(shape, generator=generator).to(dtype) for path, (shape, dtype) in shapes.items()}
    return parse_graph(text, weights), weights


def describe(site: Site) -> str:
    stack = f" x{site.batch}" if site.batch else ""
    return f"{site.path} {site.form} {site.layout} {site.out_features}x{site.in_features} {len(site.applications)}{stack}"


@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str) -> None:
    body, expected = FORMS[name]
    graph, _ = graph_of(body)
    sites = find_sites(graph)
    assert [describe(site) for site in sites] == expected
    assert [site.blocked for site in sites] == [None] * len(sites)
    assert {site.rows is None for site in sites} == {"[" not in entry for entry in expected}
    check_numbers(graph, sites)


def check_numbers(graph: Graph, sites: tuple[Site, ...]) -> None:
    """Every application's output is rows(x) times the site's matrix, plus its bias, in float64."""
    generator = torch.Generator().manual_seed(1)
    inputs = []
    for value in graph.inputs:
        shape = [3 if not isinstance(d, int) else d for d in value.tensor.shape]
        whole = value.tensor.dtype == "int64"
        inputs.append(torch.randint(0, 2, shape, generator=generator) if whole else torch.randn(shape, generator=generator))
    seen: dict[object, torch.Tensor] = {}
    watched = {v for s in sites for a in s.applications for v in (a.x, a.output, a.bias, a.select) if v is not None}
    evaluate(graph, inputs, {value: lambda t, value=value: seen.__setitem__(value, t) for value in watched})
    for site in sites:
        matrix = site.weight()
        assert tuple(matrix.shape) == ((site.batch,) if site.batch else ()) + (site.out_features, site.in_features)
        for application in site.applications:
            product = multiplied(site, application, seen[application.x], matrix, seen)
            torch.testing.assert_close(product.float(), seen[application.output], rtol=1e-5, atol=1e-5)  # float32 sums of 8 products


def multiplied(
    site: Site, application: Application, x: torch.Tensor, matrix: torch.Tensor, seen: dict[object, torch.Tensor]
) -> torch.Tensor:
    """What `matmul_forms` says of each form, done with einsum in float64."""
    x, matrix = x.double(), matrix.double()
    bias: torch.Tensor | float = 0.0
    if application.bias is not None:
        bias = (application.bias.load() if isinstance(application.bias, Const) else seen[application.bias]).double()
    if application.select is not None:
        matrix = matrix[seen[application.select]]
    if site.form == "conv1x1":
        stride, padding = pixel_steps(application.node)
        x = torch.nn.functional.pad(x, [n for pair in padding[::-1] for n in (pair, pair)])
        x = x[(slice(None), slice(None), *(slice(None, None, step) for step in stride))]
        product = torch.einsum("ni...,oi->n...o", x, matrix) + bias
        return product.movedim(-1, 1)
    if weight_first(application):
        return matrix @ x
    if application.node.op == "aten.tensordot.default":
        x = x.flatten(-len(application.node.args[2]))
    product = x @ matrix.mT + bias
    return product.reshape(seen[application.output].shape)


@pytest.mark.parametrize("name", BLOCKED)
def test_blocked(name: str) -> None:
    body, expected, reason = BLOCKED[name]
    graph, weights = graph_of(body)
    (site,) = find_sites(graph)
    assert (describe(site), site.blocked) == (expected, reason)
    assert math.prod(site.weight().shape) == weights[site.const.path].numel()


@pytest.mark.parametrize("name", COMPUTED)
def test_computed(name: str) -> None:
    """A weight behind something: its numbers are to the bit what the graph makes of its parts."""
    body, expected = COMPUTED[name]
    graph, _ = graph_of(body)
    sites = find_sites(graph)
    assert [f"{describe(site)} = {' '.join(part.path for part in site.parts)}" for site in sites] == expected
    assert [site.blocked for site in sites] == [None] * len(sites)
    check_numbers(graph, sites)
    seen: dict[object, torch.Tensor] = {}
    inputs = [torch.zeros([3 if not isinstance(d, int) else d for d in value.tensor.shape]) for value in graph.inputs]
    evaluate(graph, inputs, {root: lambda t, root=root: seen.__setitem__(root, t) for site in sites for root in site.roots})
    for site in sites:
        assert site.const not in graph.state
        assert all(torch.equal(site.const.load(), seen[root]) for root in site.roots)


@pytest.mark.parametrize("name", SHARED)
def test_computed_from_what_else_is_read(name: str) -> None:
    body, expected = SHARED[name]
    assert [(site.path, site.blocked) for site in find_sites(graph_of(body)[0])] == expected


@pytest.mark.parametrize("name", LISTED)
def test_listed(name: str) -> None:
    """What no method takes is there all the same, with the reason."""
    body, expected = LISTED[name]
    graph, weights = graph_of(body)
    sites = find_sites(graph)
    assert [(site.path, site.form, site.blocked) for site in sites] == expected
    for site in sites:
        assert math.prod(site.weight().shape) == weights[site.const.path].numel()


def test_random_numbers_are_no_weight() -> None:
    graph, _ = graph_of("""input %x: float32[batch, 8] "x"
        parameter %w: float32[4, 8] "w"
        %r: float32[4, 8] = aten.rand_like.default(%w)
        %n: float32[4, 8] = aten.add.Tensor(%w, %r)
        %y: float32[batch, 4] = aten.linear.default(%x, %n)
        output %y "y" """)
    assert find_sites(graph) == ()


@pytest.mark.parametrize("name", NO_SITES)
def test_no_sites(name: str) -> None:
    assert find_sites(graph_of(NO_SITES[name])[0]) == ()


def test_bias_is_the_nodes_own() -> None:
    graph, _ = graph_of(FORMS["linear"][0])
    (site,) = find_sites(graph)
    assert site.bias is not None
    assert site.bias.path == "fc.bias"
    slices = find_sites(graph_of(FORMS["slices"][0])[0])
    assert [site.applications[0].bias.name for site in slices] == ["b.0", "b.1"]
    assert [site.bias for site in slices] == [None, None]  # a part of a constant is none


def test_table_alone() -> None:
    graph, weights = graph_of("""input %ids: int64[batch, 5] "ids"
        parameter %e.weight: float32[10, 8] "e.weight"
        %h: float32[batch, 5, 8] = aten.embedding.default(%e.weight, %ids, 0)
        output %h "h" """)
    (site,) = find_sites(graph)
    assert (describe(site), site.role, site.blocked) == ("e embedding oi 10x8 0", "embedding", None)
    assert site.gathers == graph.nodes
    assert torch.equal(site.weight(), weights["e.weight"])


def test_tied_head_is_one_site() -> None:
    graph, _ = graph_of("""input %ids: int64[batch] "ids"
        parameter %e.weight: float32[10, 8] "e.weight" "head.weight"
        parameter %fc.weight: float32[8, 8] "fc.weight"
        %h: float32[batch, 8] = aten.embedding.default(%e.weight, %ids)
        %g: float32[batch, 8] = aten.linear.default(%h, %fc.weight)
        %y: float32[batch, 10] = aten.linear.default(%g, %e.weight)
        output %y "y" """)
    fc, head = find_sites(graph)
    assert (describe(fc), fc.role) == ("fc linear oi 8x8 1", "other")
    assert (describe(head), head.role, head.gathers) == ("e linear oi 10x8 1", "head", (graph.nodes[0],))


def test_order_and_layers() -> None:
    """Sites come in order of first application; a weight applied in several layers has none."""
    graph, _ = graph_of("""input %x: float32[batch, 8] "x"
        parameter %a: float32[8, 8] "a"
        parameter %b: float32[8, 8] "b"
        %p: float32[batch, 8] = aten.linear.default(%x, %b) @":Net/h.0:L" layer=0
        %q: float32[batch, 8] = aten.linear.default(%p, %a) @":Net/h.1:L" layer=1
        %r: float32[batch, 8] = aten.linear.default(%q, %b) @":Net/h.1:L" layer=1
        output %r "r" """)
    assert [(site.path, site.layer, len(site.applications)) for site in find_sites(graph)] == [("b", None, 2), ("a", 1, 1)]


def test_weights_are_not_read() -> None:
    """Finding sites loads nothing: a graph without weights will do."""
    for body, expected in FORMS.values():
        sites = find_sites(parse_graph(f"graph device=cpu\nrange batch 1..\n{body}"))
        assert [describe(site) for site in sites] == expected


def test_learned_queries_go_through_their_projection() -> None:
    """A parameter may be what is multiplied; `linear` says which operand is the weight."""

    class Latents(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.latents = torch.nn.Parameter(torch.randn(5, 8))
            self.fc = torch.nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.latents).sum(0) + x

    site, latents = find_sites(trace(Latents(), (torch.randn(3, 4),)))
    assert (describe(site), site.blocked) == ("fc linear oi 4x8 1", None)
    assert (latents.path, latents.form, latents.blocked) == (
        "latents",
        "product",
        "it is what another weight multiplies, not a weight itself",
    )
