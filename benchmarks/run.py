"""Every benchmark of this repository against its peers, one after the other; results as JSON and as a page of the documentation.

Each script runs in a process of its own (within it the competitors run in turn, with equal threads); what it prints with `--json` is kept
as it is. `--only` picks scripts; `--tiny` runs toy sizes to see that all work, and writes nothing unless `--out` is given. A script that
fails keeps its last lines in the result, and the exit code is 1. Peers that are not installed leave their rows out (extra `bench`).

    python benchmarks/run.py [--only NAME ...] [--out DIR] [--page FILE] [--date YYYY-MM-DD] [--threads N] [--timeout SECONDS]
"""

from __future__ import annotations

import argparse
import ast
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from _common import ROOT, environment, parser

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
PEERS = ("peft", "bitsandbytes", "tensorly", "tensorly-torch", "onnxsim", "transformers")
NOT_RUN = ("run", "gallery", "product_rates", "artefact_hashes", "scale")
"""This script; those whose results are constants of the package, written on purpose (`gallery` by --write); what measures nothing; and
what takes tens of GB of disk (`scale`)."""
REMARKS: Mapping[str, str] = {
    "loftq": "PEFT refuses to run LoftQ on a CPU; its own function runs here with the one line that names the device exchanged.",
    "tensor_train": "tensorly's randomized solver comes nearest in time; its error is slightly larger.",
    "tensor_train_plans": "`inf`: more than 10 x dense, not timed further. tltorch's layer is exported as it is, an Einsum.",
    "train_step": "onnxsim's own training loop does not take this BERT; the note gives its words.",
    "ort_quantizers": "Dynamic int8 of ONNX Runtime is the fastest on this CPU; it computes in 8 bits too, per column and without blocks.",
}


def scripts() -> list[str]:
    """Names of the benchmarks, sorted."""
    return sorted(path.stem for path in HERE.glob("[a-z]*.py") if path.stem not in NOT_RUN)


def about(name: str) -> str:
    """The first sentence of a script's docstring."""
    text = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def run_one(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a script printed; "error" with its last lines where it did not come to an end."""
    command = [sys.executable, str(HERE / f"{name}.py"), "--json", "--threads", str(options.threads), *(["--tiny"] if options.tiny else [])]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {options.timeout} s", "seconds": options.timeout}
    seconds = round(time.perf_counter() - start, 1)
    if done.returncode != 0:
        return {"error": "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:]), "seconds": seconds}
    if not done.stdout.strip():
        return {"skipped": done.stderr.strip() or "printed nothing", "seconds": seconds}
    return {**json.loads(done.stdout), "seconds": seconds}


def peers() -> dict[str, str]:
    """Versions of the peers that are installed."""
    found = {}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def cell(value: Any) -> str:
    """A value in a Markdown table: floats with four significant digits, nothing that ends a cell."""
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows as a Markdown table; a row without some column leaves it empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    numeric = {name: all(isinstance(row.get(name), int | float | None) for row in rows) for name in names}
    lines = ["| " + " | ".join(names) + " |", "| " + " | ".join("---:" if numeric[name] else "---" for name in names) + " |"]
    return lines + ["| " + " | ".join(cell(row.get(name)) for name in names) + " |" for row in rows]


def section(name: str, result: Mapping[str, Any]) -> list[str]:
    lines = [f"## {name}", "", about(name), ""]
    if "error" in result:
        return [*lines, "This benchmark did not come to an end:", "", "```text", result["error"], "```", ""]
    if "skipped" in result:
        return [*lines, f"Not run: {result['skipped']}.", ""]
    lines += [*table(result["rows"]), ""]
    lines += [f"* {note}" for note in (*result["notes"], *([REMARKS[name]] if name in REMARKS else []))]
    around = result["environment"]
    return [*lines, f"* threads {around['threads']}, load average at the end {around['load']}; took {result['seconds']:.0f} s", ""]


def page(report: Mapping[str, Any]) -> str:
    """The documentation page: every row as it was measured."""
    around = ", ".join(f"{name} {value}" for name, value in report["environment"].items() if name not in ("load", "threads"))
    installed = ", ".join(f"{name} {value}" for name, value in report["peers"].items())
    lines = [
        "# Benchmarks",
        "",
        f"Measured on {report['date']} by `python benchmarks/run.py`; written by that script, no row by hand. Competitors run in turn in",
        "one process with equal threads, figures are medians; `_s` are seconds, `_ms` milliseconds, `over_x` and `_x` ratios to x (below 1",
        "is faster or smaller). A busy machine shows as a load average above the number of threads.",
        "",
        f"* Machine and versions: {around}",
        f"* Peers: {installed}",
    ]
    missing = [name for name in scripts() if name not in report["results"]]
    lines += [f"* Not measured in this run: {', '.join(missing)}", ""] if missing else [""]
    for name, result in report["results"].items():
        lines += section(name, result)
    return "\n".join(lines).rstrip() + "\n"


def outcome(result: Mapping[str, Any]) -> str:
    """A few words for the terminal."""
    return result.get("error") or result.get("skipped") or f"{len(result['rows'])} rows"


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--only", nargs="+", choices=scripts(), default=scripts(), metavar="NAME", help=", ".join(scripts()))
    made.add_argument("--out", type=Path, help=f"folder of the JSON file (default: {RESULTS.relative_to(ROOT)})")
    made.add_argument("--page", type=Path, help=f"the Markdown page (default: {PAGE.relative_to(ROOT)})")
    made.add_argument(
        "--date", default=datetime.datetime.now(tz=datetime.UTC).date().isoformat(), help="names the results (default: today)"
    )
    made.add_argument("--timeout", type=float, default=3600, help="seconds that one script may take")
    return made.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = options_of(arguments)
    out, write_page = options.out or RESULTS, options.page or PAGE
    target = out / f"{options.date}.json"
    earlier = json.loads(target.read_text(encoding="utf-8"))["results"] if target.is_file() else {}
    results: dict[str, Any] = dict(earlier)
    keep = not options.tiny or options.out is not None
    for name in options.only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results[name] = run_one(name, options)
        report = {
            "date": options.date,
            "environment": environment(options.threads),
            "peers": peers(),
            "results": {name: results[name] for name in sorted(results)},
        }
        if keep:  # after every script: a run that is cut short keeps what it has
            out.mkdir(parents=True, exist_ok=True)
            target.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if keep and (not options.tiny or options.page is not None):
        write_page.write_text(page(report), encoding="utf-8")
    for name in options.only:
        print(f"{name}: {outcome(results[name])} ({results[name]['seconds']} s)")
    if any("error" in results[name] for name in options.only):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
