"""What this process holds of the machine's memory, and what is free."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def resident() -> int | None:
    """Bytes in memory now; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak() -> int | None:
    """The most bytes that it ever held; None where the system does not say."""
    if sys.platform == "win32":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def said(size: int) -> str:
    """1.6 GiB, 310 MiB."""
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.0f} MiB"
