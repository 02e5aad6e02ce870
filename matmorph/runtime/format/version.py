"""Which matmorph this is, as every folder says that it writes."""

from __future__ import annotations

__version__ = "0.1.0"
