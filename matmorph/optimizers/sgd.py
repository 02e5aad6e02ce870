"""SGD: settings, state and update rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from matmorph.optimizers.rule import DECAY, LR, UpdateOps, UpdateRule


@dataclass(frozen=True, slots=True)
class SGD:
    """Gradient descent with momentum, as torch.optim.SGD without dampening, but with decoupled weight decay.

    m = momentum * m + g; theta loses lr * weight_decay * theta, then lr * m (nesterov: lr * (g + momentum * m)).
    """

    DOC: ClassVar[str] = "gradient descent with momentum"
    STATES: ClassVar[tuple[str, ...]] = ("m",)

    lr: float = field(metadata=LR)
    momentum: float = field(default=0.0, metadata={"doc": "decay of the sum of gradients", "minimum": 0, "exclusive_maximum": 1})
    nesterov: bool = field(default=False, metadata={"doc": "step along the momentum of the next step"})
    weight_decay: float = field(default=0.0, metadata=DECAY)

    def __post_init__(self) -> None:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum > 0")

    def rule(self, b: UpdateOps) -> UpdateRule:
        """m = momentum * m + g."""
        momentum = b.number(self.momentum)

        def step(b: UpdateOps, gradient: str) -> dict[str, str]:
            m = b("Add", b("Mul", "m", momentum), gradient)
            return {"m": m, "step": b("Add", gradient, b("Mul", m, momentum)) if self.nesterov else m}

        return UpdateRule(step)
