"""Adam-atan2: settings, states and update rule."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from matmorph.optimizers.rule import BETAS, DECAY, LR, UpdateOps, UpdateRule, corrections, moments

_ATAN = (0.9999999813, -0.3333278577, 0.1997408242, -0.1384849021, 0.07976291807)
"""atan(t) / t as a polynomial of t * t for |t| <= tan(pi / 8): Chebyshev nodes, relative error below 2e-8. ONNX Runtime's CUDA provider has
no kernel for Atan."""
_TINY = 2.0**-126  # the smallest normal float32


@dataclass(frozen=True, slots=True)
class AdamAtan2:
    """AdamW without eps (Everett et al. 2024): the step is lr * a * atan2(m, b * sqrt(v)), m and v bias-corrected.

    With a = 4 / pi and b = 1 a steady gradient moves a parameter by lr, as in Adam.
    """

    DOC: ClassVar[str] = "AdamW with an arc tangent in the place of eps"
    STATES: ClassVar[tuple[str, ...]] = ("m", "v")

    lr: float = field(metadata=LR)
    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata=BETAS)
    a: float = field(default=4 / math.pi, metadata={"doc": "factor of the arc tangent", "exclusive_minimum": 0})
    b: float = field(default=1.0, metadata={"doc": "factor of the root of the second moment", "exclusive_minimum": 0})
    weight_decay: float = field(default=0.01, metadata=DECAY)

    def rule(self, b: UpdateOps) -> UpdateRule:
        """a * atan2(m^, b * sqrt(v^)) = 4 a * atan(t'), with the half-angle formula applied twice:
        t = y / (x + hypot(x, y)) in [-1, 1], t' = t / (1 + sqrt(1 + t * t)) in [-tan(pi/8), tan(pi/8)].
        """
        first, root = corrections(b, self.betas)
        ratio = b("Div", b("Mul", b.number(self.b, double=True), first), root)
        square = b.single(b("Mul", ratio, ratio))
        one, least = b.number(1.0), b.number(_TINY)
        low = b.number(-1.0)
        coefficients = [b.number(value) for value in reversed(_ATAN)]

        def step(b: UpdateOps, gradient: str) -> dict[str, str]:
            made = moments(b, gradient, self.betas)
            x2 = b("Mul", made["v"], square)
            hypot = b("Sqrt", b("Add", b("Mul", made["m"], made["m"]), x2))
            below = b("Add", b("Add", b("Sqrt", x2), hypot), least)  # 0 / 0 is 0
            t = b("Clip", b("Div", made["m"], below), low, one)  # squares below 1e-38 are lost: then m alone decides
            t = b("Div", t, b("Add", one, b("Sqrt", b("Add", one, b("Mul", t, t)))))
            z = b("Mul", t, t)
            series = coefficients[0]
            for coefficient in coefficients[1:]:
                series = b("Add", b("Mul", series, z), coefficient)
            return {**made, "step": b("Mul", series, t)}

        return UpdateRule(step, b.number(4 * self.a))
