"""The rules of all operators that have one."""

from __future__ import annotations

from matmorph.ir.training.adjoints.convolutions import CONVOLUTIONS
from matmorph.ir.training.adjoints.layout import LAYOUT
from matmorph.ir.training.adjoints.norms import NORMS
from matmorph.ir.training.adjoints.pointwise import POINTWISE
from matmorph.ir.training.adjoints.products import PRODUCTS
from matmorph.ir.training.adjoints.tape import Rules
from matmorph.ir.training.adjoints.traced import traced

ADJOINT_RULES = Rules({**POINTWISE, **LAYOUT, **PRODUCTS, **CONVOLUTIONS, **NORMS}, traced, frozenset(POINTWISE))
