"""The rules of all operators that have one."""

from __future__ import annotations

from matmorph.ir.adjoints.convolutions import CONVOLUTIONS
from matmorph.ir.adjoints.layout import LAYOUT
from matmorph.ir.adjoints.norms import NORMS
from matmorph.ir.adjoints.pointwise import POINTWISE
from matmorph.ir.adjoints.products import PRODUCTS
from matmorph.ir.adjoints.tape import Rules
from matmorph.ir.adjoints.traced import traced

RULES = Rules({**POINTWISE, **LAYOUT, **PRODUCTS, **CONVOLUTIONS, **NORMS}, traced, frozenset(POINTWISE))
