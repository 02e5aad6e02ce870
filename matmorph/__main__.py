"""`python -m matmorph` = the command `matmorph`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn


def run(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command line, which can be interrupted while it loads, and while it says how it ended, too."""
    try:
        from matmorph.cli.main import main

        main(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run()
