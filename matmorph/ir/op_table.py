"""What kind each ATen operator is and where its operands are. Passes take from it the operators that they treat alike.

The names are base names (`ops.base_name`): all overloads of an operator are of one kind. Where a pass cannot treat an operator as the
others of its kind, a field of `Operator` says what is different about it; no operator is left out of a pass by not being listed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

OpKind = Literal[
    "elementwise",  # each element from those at its own place in the operands, which broadcast
    "same",  # its operand, copied or converted
    "reshape",  # the elements of its operand in row-major order, in another shape
    "permute",  # its operand with its axes in another order
    "expand",  # its operand with axes of size 1 repeated
    "part",  # one or several parts of an axis
    "pick",  # elements of its first operand, at places that the others say
    "lookup",  # rows of a table, at places that another operand says
    "join",  # a list of tensors one after the other
    "glu",  # one half of an axis times the sigmoid of the other
    "dropout",  # in inference its operand
    "reduction",  # one number from all of an axis, or several axes
    "softmax",
    "log_softmax",
    "norm",
    "matmul",  # two matrices, or stacks of them, as they come
    "linear",  # an activation times a weight
    "einsum",
    "convolution",
    "attention",  # scaled dot products, their softmax, and the sum it weights
    "contraction",  # a product of tensors in any other form
    "recurrent",  # a sequence step by step, with the weights of every step
]


@dataclass(frozen=True, slots=True)
class Operator:
    """`operands`: positions of the tensors whose elements the results are made of (a norm's scale and a table's indices are none).
    `axes`: position of the argument that names the axes it computes over, or, for a norm, their sizes; None where it names none.

    `activation`: it bends, as between two matmuls of an MLP. `random`: it draws numbers, so that a part of the result is not the result
    of a part. `aligned`: its operands broadcast from their last axes. `like`: its shape is that of its second operand. `casts`: the type
    of the result may be another. `transposed`: a convolution that spreads its input. `half`: under the half precisions it reads its weights
    in half precision, which an operator that stays in float32 does not.
    """

    kind: OpKind
    operands: tuple[int, ...] = (0,)
    axes: int | None = None
    activation: bool = False
    random: bool = False
    aligned: bool = True
    like: bool = False
    casts: bool = False
    transposed: bool = False
    half: bool = True


_UNARY = Operator("elementwise")
_BINARY = Operator("elementwise", (0, 1))
_TERNARY = Operator("elementwise", (0, 1, 2))
_BENT = Operator("elementwise", activation=True)

# fmt: off
_FAMILIES: Sequence[tuple[str, Operator]] = (
    ("neg abs sign sgn square sqrt rsqrt reciprocal exp exp2 expm1 log log2 log10 log1p erfc sin cos tan asin acos atan sinh cosh asinh "
     "acosh atanh floor ceil round trunc frac logical_not bitwise_not isnan isinf isfinite nan_to_num", _UNARY),
    ("relu relu6 leaky_relu gelu silu elu selu celu hardtanh hardswish hardsigmoid mish softplus log_sigmoid threshold tanh sigmoid erf",
     _BENT),
    ("rrelu", replace(_BENT, random=True)),
    # A slope per channel, which lies along axis 1.
    ("prelu", replace(_BENT, operands=(0, 1), aligned=False)),
    ("add sub rsub mul div floor_divide pow fmod remainder atan2 minimum maximum clamp_min clamp_max eq ne lt le gt ge logical_and "
     "logical_or logical_xor bitwise_and bitwise_or bitwise_xor __and__ __or__ __xor__", _BINARY),
    ("where masked_fill clamp lerp addcmul addcdiv", _TERNARY),
    ("alias detach clone contiguous lift_fresh_copy", Operator("same")),
    ("to _to_copy type_as", Operator("same", casts=True)),
    ("view _unsafe_view reshape flatten unflatten squeeze unsqueeze", Operator("reshape")),
    ("view_as reshape_as", Operator("reshape", like=True)),
    # The last two conjugate complex numbers, which no weight is made of.
    ("t transpose permute movedim swapaxes swapdims numpy_T mT mH adjoint", Operator("permute")),
    ("expand broadcast_to", Operator("expand")),
    ("expand_as", Operator("expand", like=True)),
    ("slice narrow select split split_with_sizes chunk unsafe_split unsafe_chunk tensor_split unbind", Operator("part")),
    ("index index_select gather take_along_dim _unsafe_index", Operator("pick")),
    ("embedding gather_nbits", Operator("lookup")),
    ("embedding_bag _embedding_bag", Operator("lookup", half=False)),  # which sum their rows
    ("cat stack", Operator("join")),
    ("glu", Operator("glu", activation=True)),
    ("dropout native_dropout", Operator("dropout", random=True)),
    ("sum mean amax amin prod var std any all", Operator("reduction", axes=1)),
    ("softmax _softmax _safe_softmax", Operator("softmax", axes=1, activation=True)),
    ("log_softmax _log_softmax", Operator("log_softmax", axes=1, activation=True)),
    ("layer_norm rms_norm native_layer_norm _fused_rms_norm", Operator("norm", axes=1)),
    # Over groups of channels and all that follows: no whole axes.
    ("group_norm", Operator("norm")),
    ("mm bmm matmul", Operator("matmul", (0, 1))),
    ("baddbmm", Operator("matmul", (1, 2))),
    ("linear matmul_nbits matmul_codebook", Operator("linear", (0, 1))),
    ("addmm", Operator("linear", (1, 2))),
    ("einsum", Operator("einsum", (1,), half=False)),
    ("conv1d conv2d conv3d convolution", Operator("convolution", (0, 1))),
    ("conv_transpose1d conv_transpose2d conv_transpose3d", Operator("convolution", (0, 1), transposed=True)),
    ("inner mv dot vdot tensordot outer ger kron chain_matmul linalg_multi_dot", Operator("contraction", (0, 1), half=False)),
    ("addmv addbmm addr bilinear _trilinear", Operator("contraction", (1, 2), half=False)),
    ("lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell", Operator("recurrent", half=False)),
    ("scaled_dot_product_attention _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
     "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_cudnn_attention cached_attention compact_attention",
     Operator("attention", (0, 1, 2))),
)
# fmt: on
OPERATORS: Mapping[str, Operator] = {name: operator for names, operator in _FAMILIES for name in names.split()}


def of_kind(*kinds: OpKind) -> frozenset[str]:
    """Base names of all operators of these kinds."""
    return frozenset(name for name, operator in OPERATORS.items() if operator.kind in kinds)


def having(names: frozenset[str], **fields: Any) -> frozenset[str]:
    """Those of the operators that have these values in their fields."""
    return frozenset(name for name in names if all(getattr(OPERATORS[name], field) == value for field, value in fields.items()))


LAYOUT_OPS = of_kind("same", "reshape", "permute", "expand")
"""Operators that move elements or change their type but compute nothing: patterns and roles look through them."""

BROADCASTING = having(of_kind("elementwise"), aligned=True)
"""Operators that treat every element alone and broadcast their operands from the last axes."""

PRODUCTS: Mapping[str, tuple[int, ...]] = {name: operator.operands for name, operator in OPERATORS.items() if operator.kind == "matmul"}
"""Matrix products of two operands as they come, with the positions of these."""

BARE_PRODUCTS = frozenset(name for name, places in PRODUCTS.items() if places == (0, 1))
"""Those to which nothing is added."""
