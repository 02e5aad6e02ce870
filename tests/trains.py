"""What the tests of tt and tt_lora share: the matrix that cores stand for, in numpy and float64, straight from the papers' formulas."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from quantizing import parts_of

from matmorph.ir.core import Const
from matmorph.passes.methods.loftq.method import LoftQ
from matmorph.passes.methods.qlora.method import QLora
from matmorph.passes.methods.train_settings import ModesSpec
from matmorph.passes.methods.tt.method import TT, TTSpec
from matmorph.passes.methods.tt_lora.method import TTLora, TTLoraSpec
from matmorph.specs.ranks import Ranks
from matmorph.specs.schema import MethodUse

METHODS = {"tt": TT(), "tt_lora": TTLora(), "loftq": LoftQ(), "qlora": QLora()}


def ranks(rank: int | list[int] | dict[str, Any]) -> Ranks:
    """As in YAML: 4, [4, 8], {"energy": 0.9, "multiple_of": 4}."""
    if isinstance(rank, list):
        return Ranks("fixed", max(rank), each=tuple(rank))
    limits = dict(rank) if isinstance(rank, dict) else {"fixed": rank}
    beside = {key: limits.pop(key) for key in ("multiple_of", "min", "max") if key in limits}
    ((kind, value),) = limits.items()
    return Ranks(kind, value, **beside)


def _modes(settings: dict[str, Any]) -> dict[str, Any]:
    modes = settings.get("modes")
    return settings if modes is None else {**settings, "modes": ModesSpec(tuple(modes[0]), tuple(modes[1]))}


def tt(rank: Any = 3, **settings: Any) -> MethodUse:
    """`modes`: (output modes, input modes)."""
    return MethodUse("tt", TTSpec(rank=ranks(rank), **_modes(settings)))


def tt_lora(rank: Any = 3, **settings: Any) -> MethodUse:
    return MethodUse("tt_lora", TTLoraSpec(rank=ranks(rank), **_modes(settings)))


def cores_of(consts: Sequence[Const]) -> list[np.ndarray]:
    """The cores among the weights, in order, float64."""
    parts = parts_of(consts)
    return [parts[f"core_{k}"].astype(np.float64) for k in range(sum(name.startswith("core_") for name in parts))]


def matrix(cores: Sequence[np.ndarray]) -> np.ndarray:
    """W[(o_1 .. o_d), (i_1 .. i_d)] = G_1[o_1, i_1] ... G_d[o_d, i_d], one entry of the two index tuples after the other."""
    outs, ins = [core.shape[1] for core in cores], [core.shape[2] for core in cores]
    whole = np.empty((prod(outs), prod(ins)))
    for row, o in enumerate(np.ndindex(*outs)):
        for column, i in enumerate(np.ndindex(*ins)):
            product = np.eye(1)
            for core, a, b in zip(cores, o, i, strict=True):
                product = product @ core[:, a, b, :]
            whole[row, column] = product[0, 0]
    return whole


def contracted(x: np.ndarray, cores: Sequence[np.ndarray], inputs: int) -> np.ndarray:
    """TT-LoRA's forward (arXiv 2504.21190): x viewed as [rows, m_p, .., m_1]; every input core takes the last axis, then every output core
    adds one."""
    sizes = [core.shape[1] for core in cores[:inputs]]
    state = x.reshape(len(x), 1, *reversed(sizes))
    for core in cores[:inputs]:
        state = np.einsum("br...m,rmp->bp...", state, core)
    for core in cores[inputs:]:
        state = np.einsum("br...,rnp->bp...n", state, core)
    return state.reshape(len(x), -1)
