"""What the file of an optimizer is written against: operators of apply.onnx, the rule that it gives, and what several optimizers share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

LR = {"doc": "learning rate", "exclusive_minimum": 0}
BETAS = {"doc": "decay of the first and second moment", "minimum": 0, "exclusive_maximum": 1}
DECAY = {"doc": "decoupled weight decay, in units of the learning rate", "minimum": 0}


class UpdateOps(Protocol):
    """Writes nodes of apply.onnx. Values go by their names: the states of the optimizer as it calls them, "theta" and "step" among them.

    Every ONNX operator used must have a CUDA kernel. On the CPU each elementwise node is one pass over memory, so what is [] goes first.
    """

    def __call__(self, op: str, *inputs: str) -> str:
        """The name of the only result of an ONNX operator."""

    def number(self, value: float, double: bool = False) -> str:
        """A constant [], float32 or float64."""

    def single(self, value: str) -> str:
        """The value in float32."""

    def double(self, value: str) -> str:
        """The value in float64."""


@dataclass(frozen=True, slots=True)
class UpdateRule:
    """`step(ops, scaled gradient)`: the new states, and "step": what theta loses before decay, over learning rate and `factor` []."""

    step: Callable[[UpdateOps, str], dict[str, str]]
    factor: str | None = None


class AnyOptimizer(Protocol):
    """An optimizer: a frozen dataclass of its settings, `lr` and `weight_decay` among them; their metadata is that of a spec's keys.

    `DOC`: what it is, in the reference of the spec language. `STATES`: the vectors as long as theta that it keeps, zeros at first.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    DOC: ClassVar[str]
    STATES: ClassVar[tuple[str, ...]]

    @property
    def lr(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    def rule(self, b: UpdateOps) -> UpdateRule:
        """The update with these settings. Nodes on [] are written here, nodes on vectors by its `step`, in a branch of their own."""


def mixed(b: UpdateOps, old: str, new: str, beta: float) -> str:
    """beta * old + (1 - beta) * new, from the nearer end as torch.lerp does: a float32 beta would be 1e-5 of 1 - beta off
    (decision A15)."""
    if beta >= 0.5:
        return b("Sub", old, b("Mul", b("Sub", old, new), b.number(1 - beta)))
    return b("Sub", new, b("Mul", b("Sub", new, old), b.number(beta)))


def moments(b: UpdateOps, gradient: str, betas: tuple[float, float]) -> dict[str, str]:
    """m and v of the Adam family, without bias correction."""
    return {"m": mixed(b, "m", gradient, betas[0]), "v": mixed(b, "v", b("Mul", gradient, gradient), betas[1])}


def corrections(b: UpdateOps, betas: tuple[float, float]) -> tuple[str, str]:
    """1 - beta1 ** step and sqrt(1 - beta2 ** step), float64 []."""
    step, one = b.double("step"), b.number(1.0, double=True)
    first, second = (b("Sub", one, b("Pow", b.number(beta, double=True), step)) for beta in betas)
    return first, b("Sqrt", second)
