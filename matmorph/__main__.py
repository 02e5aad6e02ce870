"""`python -m matmorph` = the command `matmorph`."""

from __future__ import annotations

import sys
from typing import NoReturn


def run() -> NoReturn:
    """The command line, which can be interrupted while it loads too."""
    try:
        from matmorph.cli.main import main
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    main()


if __name__ == "__main__":
    run()
