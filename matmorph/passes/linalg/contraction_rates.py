"""What matrix products cost: constants fitted to measured times of single nodes, with the machine and the versions they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Product:
    """`batch` products [rows, inner] @ [inner, columns]. `packed`: the right operand is a constant, laid out for the kernel at load."""

    batch: int
    rows: int
    inner: int
    columns: int
    packed: bool

    @property
    def elements(self) -> int:
        """Numbers read and written; the constant once."""
        left, right, result = self.rows * self.inner, self.inner * self.columns, self.rows * self.columns
        return (self.batch * left + right if self.packed else left + self.batch * right) + self.batch * result


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds. `node`: of one product node; `view`: of one reshape; `call`: of each product of a batch; `flop`: of one multiply-add;
    `element`: of one number read or written by a product, `moved`: by a permute."""

    source: str
    measured: bool
    node: float
    view: float
    call: float
    flop: float
    element: float
    moved: float

    def seconds(self, products: Sequence[Product], views: int, permuted: Sequence[int]) -> float:
        return sum(map(self._product, products)) + views * self.view + sum(self.node + size * self.moved for size in permuted)

    def _product(self, product: Product) -> float:
        lanes = -(-product.columns // 16) * 16
        work = product.batch * product.rows * product.inner * lanes
        return self.node + product.batch * self.call + max(work * self.flop, product.elements * self.element)


RATES: Mapping[str, Rates] = {
    "cpu": Rates("first guess", True, 3e-6, 1e-6, 1e-7, 2e-11, 2e-10, 1e-9),
    "cuda": Rates("estimate, not measured", False, 5e-6, 0.0, 2e-9, 1e-13, 1e-12, 4e-12),
}
