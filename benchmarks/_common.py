"""What the benchmarks share: where data lies, timing in turns, printing."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime

ROOT = Path(__file__).resolve().parent.parent


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="threads of torch and of ONNX Runtime alike (default: all cores)"
    )
    made.add_argument("--tiny", action="store_true", help="toy sizes: does the script run? Its figures mean nothing")
    made.add_argument("--json", action="store_true", help="print JSON only")
    return made


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Equal for all sessions of one comparison. Idle workers do not spin: those of one session would run on the cores that another one is
    being timed on, which doubled the time of small products here."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def data_folder(given: Path | None, name: str) -> Path:
    """`name` inside --data, else inside MATMORPH_DATA, else inside ../shared/data beside the repository.

    A folder that was named and is not there is an error (exit code 2); without a default folder the benchmark is skipped (0).
    """
    named = given or (Path(os.environ["MATMORPH_DATA"]) if "MATMORPH_DATA" in os.environ else None)
    folder = (named or ROOT.parent / "shared" / "data") / name
    if folder.is_dir():
        return folder
    print(f"no data: {folder} is not there; name its parent with --data or MATMORPH_DATA", file=sys.stderr)
    raise SystemExit(2 if named else 0)


def environment(threads: int) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    names = ("torch", "onnxruntime-gpu", "onnxruntime", "numpy")
    found = {name: _version(name) for name in names}
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 1),
        **{name: text for name, text in found.items() if text},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except Exception as error:
        return None if type(error).__name__ == "PackageNotFoundError" else f"unknown ({error})"


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with equal keys as aligned columns; floats with four significant digits."""
    cells = [{name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in row.items()} for row in rows]
    widths = {name: max(len(name), *(len(row[name]) for row in cells)) for name in cells[0]}
    print("  ".join(f"{name:>{width}}" for name, width in widths.items()))
    for row in cells:
        print("  ".join(f"{row[name]:>{width}}" for name, width in widths.items()))


def finish(options: argparse.Namespace, rows: Sequence[Mapping[str, Any]], notes: Sequence[str] = (), **more: Any) -> None:
    """Print the result, as JSON or as a table with its notes."""
    around = environment(options.threads)
    if options.json:
        print(json.dumps({"environment": around, "rows": list(rows), "notes": list(notes), **more}, indent=2))
        return
    print_rows(rows)
    for note in notes:
        print(note)
    print("  ".join(f"{name} {value}" for name, value in around.items()))


def tell(options: argparse.Namespace) -> Callable[[str], None]:
    """Progress lines on stderr, none with --json."""
    return lambda line: None if options.json else print(line, file=sys.stderr, flush=True)
