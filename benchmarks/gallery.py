"""What each library spec makes of MiniLM: size of its weights, Spearman on the STS benchmark (dev), time under ONNX Runtime over dense.

Every spec of the library is compiled (512 training sentences for calibration), written and run by ONNX Runtime on all dev pairs; then a
batch of 16 sentences runs in turn with the dense model, equal threads, medians. A spec that does not fit MiniLM says why. `--write` keeps
the figures for `matmorph specs list`; those of specs that were not run stay.

    python benchmarks/gallery.py [--specs NAME ...] [--data DIR] [--write] [--json]
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from _common import ROOT, data_folder, environment, finish, parser, session_options, tell
from sts import calibration, dev_pairs, score, torch_encoder

import matmorph as mm
from matmorph.cli.demo import TIMING_BATCH, TIMING_ROUNDS, medians
from matmorph.errors import MatmorphError
from matmorph.exporters.onnx.onnx_model import export_onnx
from matmorph.models.resolve import Model, calibration_sentences, minilm, tokenize
from matmorph.runtime import Session
from matmorph.specs.gallery import FILE, gallery, text_hash
from matmorph.specs.load import library_names, library_text
from matmorph.specs.schema import Export

LIBRARY = ROOT / "matmorph" / "specs" / "library"


def measured(name: str, model: Model, batches: Any, data: Any, dense: onnxruntime.InferenceSession, threads: int) -> dict[str, Any]:
    """One row; `reason` where the spec does not fit."""
    row: dict[str, Any] = {"spec": name, "bytes": None, "spearman": None, "time_over_dense": None, "reason": None}
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled = mm.compile(model.module, name, model.example_inputs, dynamic_shapes=model.dynamic_shapes, calibration=batches)
            saved = compiled.save(Path(folder) / "out")
        except MatmorphError as error:  # a loss that the model has no output for is met when the training graphs are written
            return {**row, "reason": re.sub(r"^rule [^:]+: (\S+: )?", "", error.message.split(";")[0])}
        session = Session(saved, "cpu", threads=threads)
        spearman = score(lambda feeds: session.run(feeds)["last_hidden_state"], data)
        feeds = tokenize(calibration_sentences()[:TIMING_BATCH])
        timed = Session(saved, ["CPUExecutionProvider"], session_options=session_options(threads))
        seconds = medians({"dense": lambda: dense.run(None, feeds), "spec": lambda: timed.run(feeds)}, TIMING_ROUNDS)
    size = compiled.report.totals.bytes[1]
    return {**row, "bytes": size, "spearman": round(spearman, 2), "time_over_dense": round(seconds["spec"] / seconds["dense"], 3)}


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--specs", nargs="+", choices=library_names(), default=list(library_names()), metavar="NAME")
    options_of.add_argument("--data", type=Path, help="folder that holds stsb/ (default: MATMORPH_DATA, else ../shared/data)")
    options_of.add_argument("--write", action="store_true", help=f"keep the figures in {LIBRARY.name}/{FILE}")
    options = options_of.parse_args(arguments)
    folder = data_folder(options.data, "stsb")
    torch.set_num_threads(options.threads)
    say = tell(options)
    data, samples = dev_pairs(folder, options.tiny)
    pairs = len(data[0])
    model, batches = minilm(), calibration(folder, samples)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.module.parameters())
    original = {"bytes": size, "spearman": round(score(torch_encoder(model.module), data), 2)}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as dense:
        keep = {"version": 1, "rules": [{"match": {"op": "matmul"}, "rewrite": "keep"}]}
        source = mm.compile(model.module, keep, model.example_inputs, dynamic_shapes=model.dynamic_shapes).source
        export_onnx(source, Path(dense), Export())
        session = onnxruntime.InferenceSession(
            str(Path(dense) / "model.onnx"), sess_options=session_options(options.threads), providers=["CPUExecutionProvider"]
        )
        for name in options.specs:
            rows.append({**measured(name, model, batches, data, session, options.threads), "sha256": text_hash(library_text(name))})
            say(f"{name}: {rows[-1]['reason'] or rows[-1]['spearman']}")
    if options.write:
        kept = [row for row in gallery()["rows"] if row["spec"] in library_names() and row["spec"] not in options.specs]
        every = sorted([*kept, *rows], key=lambda row: row["spec"])
        result = {"model": "minilm", "pairs": pairs, "dense": original, "environment": environment(options.threads), "rows": every}
        (LIBRARY / FILE).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    shown = [{key: value for key, value in row.items() if key != "sha256"} for row in rows]
    finish(options, shown, [f"{pairs} pairs; dense: {original['bytes'] / 1e6:.1f} MB, Spearman {original['spearman']}"])


if __name__ == "__main__":
    main()
