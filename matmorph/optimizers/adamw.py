"""AdamW: settings, states and update rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from matmorph.optimizers.rule import BETAS, DECAY, LR, UpdateOps, UpdateRule, corrections, moments


@dataclass(frozen=True, slots=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2).

    m and v are bias-corrected; theta loses lr * weight_decay * theta, then lr * m / (sqrt(v) + eps).
    """

    DOC: ClassVar[str] = "Adam with decoupled weight decay"
    STATES: ClassVar[tuple[str, ...]] = ("m", "v")

    lr: float = field(metadata=LR)
    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata=BETAS)
    eps: float = field(default=1e-8, metadata={"doc": "added to the root of the second moment", "exclusive_minimum": 0})
    weight_decay: float = field(default=0.01, metadata=DECAY)

    def rule(self, b: UpdateOps) -> UpdateRule:
        """m^ / (sqrt(v^) + eps) = m / (sqrt(v) + eps * root) * (root / first)."""
        first, root = corrections(b, self.betas)
        eps = b.single(b("Mul", b.number(self.eps, double=True), root))
        factor = b.single(b("Div", root, first))

        def step(b: UpdateOps, gradient: str) -> dict[str, str]:
            made = moments(b, gradient, self.betas)
            ratio = b("Div", made["m"], b("Add", b("Sqrt", made["v"]), eps))
            return {**made, "step": ratio}

        return UpdateRule(step, factor)
