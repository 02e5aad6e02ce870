"""What matrix products cost under ONNX Runtime, as a formula; each target has its own constants.

The form follows the kernel (MLAS): 16 columns at a time (a narrower product pays for 16), 12 rows at a time, the right operand copied into
panels unless it is a constant that was packed at load, and traffic that costs more where it does not fit the caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Tiers = tuple[tuple[int, float], ...]
"""(above this many elements, further seconds per element): caches that a tensor does not fit."""


@dataclass(frozen=True, slots=True)
class Product:
    """`batch` products [rows, inner] @ [inner, columns] of one node. `packed`: the constant is the right operand (then `batch` is 1), laid
    out for the kernel at load; else it is the left one, shared by the batch."""

    batch: int
    rows: int
    inner: int
    columns: int
    packed: bool

    @property
    def constant(self) -> int:
        """Elements of the constant."""
        return self.inner * (self.columns if self.packed else self.rows)

    @property
    def operand(self) -> int:
        """Elements of the operand that depends on x."""
        return self.batch * self.inner * (self.rows if self.packed else self.columns)

    @property
    def result(self) -> int:
        """Elements of the result."""
        return self.batch * self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds of a node; `source` says where they come from, `measured` whether they were measured there.

    `node`: of any node but a reshape; `view`: of a reshape; `call`: of each product of a batch; `work`: of a multiply-add, columns rounded
    up to `lanes`; `panel`: of loading one element of the right operand for one block of `block` rows; `copy`: of bringing one into panels
    first; `left`, `result`: of an element of the left operand, of the result; `moved`: of an element of a permute; `constants`, `values`:
    what further costs the elements of the constant, of operand and result, beyond certain sizes. `cache`: elements that stay near a core.
    """

    source: str
    measured: bool
    node: float
    view: float
    call: float
    work: float
    panel: float
    copy: float
    left: float
    result: float
    moved: float
    constants: Tiers
    values: Tiers
    cache: int = 2**18
    lanes: int = 16
    block: int = 12

    def seconds(self, products: Sequence[Product], views: int, permuted: Sequence[int]) -> float:
        """Of the nodes of one contraction. What a session's run costs before its first node is not in it: dense pays that as well."""
        moved = sum(self.node + size * self.moved for size in permuted)
        return sum(map(self.product, products)) + views * self.view + moved

    def product(self, item: Product) -> float:
        """Of one node."""
        # A vector on the right is no product of panels: the matrix is read once, without lanes.
        vector = item.columns == 1 and not item.packed
        columns = 1 if vector else -(-item.columns // self.lanes) * self.lanes
        right = item.batch * item.inner * columns
        copied = not (item.packed or vector or item.rows == 1)
        parts = (
            self.node,
            item.batch * self.call,
            right * item.rows * self.work,
            right * -(-item.rows // self.block) * self.panel * (not vector),
            right * self.copy * copied,
            item.batch * item.rows * item.inner * self.left,
            item.result * self.result,
            _beyond(item.constant, self.constants),
            _beyond(item.operand + item.result, self.values),
        )
        return sum(parts)


def _beyond(elements: int, tiers: Tiers) -> float:
    return elements * sum(cost for limit, cost in tiers if elements > limit)
