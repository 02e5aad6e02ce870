"""One training step under ONNX Runtime (grad.onnx and apply.onnx through the Trainer) beside torch's, on a BERT of MiniLM's size.

Batches of 16 x 128 tokens, AdamW, no dropout, equal threads. LoRA of rank 8 on queries and values runs beside PEFT's, eager and under
torch.compile, and onnxsim's training loop where that takes the model; other methods run beside the compiled module under torch's autograd.
`head`: logits from the first token, as in BERT, or from the mean over all of them. The competitors of a row step in turn, with a pause
between them; memory is the peak of a process of its own, and what of it came after the imports.

    python benchmarks/train_step.py [--methods lora tt_lora loftq] [--heads first mean] [--peers compile onnxsim] [--threads N] [--json]
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from _common import finish, parser, tell
from _train_model import SIZES, TINY, Classifier, Step, torch_step
from torch import Tensor, nn

import matmorph as mm
from matmorph.runtime import Trainer

ATTENTION = {"role": ["attention.q", "attention.v"]}
RULES: Mapping[str, dict[str, Any]] = {
    "lora": {"match": ATTENTION, "rewrite": {"lora": {"rank": 8, "alpha": 16}}},
    "tt_lora": {"match": ATTENTION, "rewrite": {"tt_lora": {"rank": 8, "alpha": 16}}},
    "loftq": {
        "match": {"role": ["attention.*", "mlp.*"]},
        "rewrite": {"loftq": {"quantizer": "uniform", "bits": 4, "block_size": 32, "rank": 8, "iterations": 1}},
    },
}
PAUSE = 0.3  # seconds, for the workers of one competitor to leave the cores before the next one starts

WORKER = """
import sys, numpy as np
kind, folder, threads, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
sys.path.insert(0, sys.argv[5])
batch = dict(np.load(folder + "/batch.npz"))
if kind == "ort":
    from matmorph.runtime import Trainer
else:
    import torch, peft, _train_model
def status(word):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(word))
before = status("VmRSS")
if kind == "ort":
    trainer = Trainer(folder + "/train", threads=threads, log=lambda line: None)
    step = lambda: trainer.step(batch)
else:
    step = _train_model.torch_step(torch.load(folder + "/peer.pt", weights_only=False), batch, threads, kind == "compile")
for _ in range(steps):
    step()
print(status("VmHWM"), status("VmHWM") - before)
"""


def peft_module(model: nn.Module) -> nn.Module:
    peft = importlib.import_module("peft")
    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["query", "value"])
    module: nn.Module = peft.get_peft_model(deepcopy(model), config)
    return module


def own_module(compiled: mm.Compiled, names: Sequence[str]) -> nn.Module:
    """The compiled module, trained by torch."""
    module = deepcopy(compiled.module)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in names)
    return module


def onnxsim_reason(module: nn.Module, batch: Mapping[str, Any]) -> str:
    """How far onnxsim's own training loop gets with a module and its batch: "runs", or why not."""
    try:
        onnxsim = importlib.import_module("onnxsim")
    except ImportError:
        return "not installed"

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, ids: Tensor, mask: Tensor, classes: Tensor) -> Tensor:
            logits = self.inner(input_ids=ids, attention_mask=mask)["logits"]
            return -((logits - logits.exp().sum(-1, keepdim=True).log()) * classes).mean()

    labels = torch.as_tensor(batch["labels"])
    feeds = (torch.as_tensor(batch["input_ids"]), torch.as_tensor(batch["attention_mask"]), torch.eye(2)[labels])
    names = [f"inner.{name}" for name, parameter in module.named_parameters() if parameter.requires_grad]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where the exporter's progress does not get between the figures
            loop = onnxsim.compile_torch_training_loop(WithLoss().eval(), feeds, params=names)
            loop(dict(zip(("ids", "mask", "classes"), feeds, strict=True)), lr=1e-4)
    except Exception as error:  # whatever it is, it is the result
        return f"{version('onnxsim')} ends with {type(error).__name__}: {str(error).splitlines()[0][:160]}"
    return f"{version('onnxsim')} runs"


def in_turn(steps: Mapping[str, Step], repeats: int, pause: float) -> dict[str, float]:
    """Median milliseconds of each competitor; two steps before are not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 2):
        for name, step in steps.items():
            time.sleep(pause)
            start = time.perf_counter()
            step()
            if turn > 1:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in times.items()}


def peaks(kind: str, folder: Path, threads: int) -> tuple[float, float]:
    """(peak, growth after the imports) in MB of a process that takes three steps."""
    command = [sys.executable, "-c", WORKER, kind, str(folder), str(threads), "3", str(Path(__file__).resolve().parent)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return int(found[-2]) / 1e6, int(found[-1]) / 1e6


def measured(method: str, head: str, options: Any, folder: Path, notes: list[str]) -> dict[str, Any]:
    import numpy as np

    torch.manual_seed(0)  # noqa: TID251  (transformers draws from the global generator)
    sizes = TINY if options.tiny else SIZES
    batch, seq = (2, 8) if options.tiny else (16, 128)
    model = Classifier(head, sizes).eval()
    rng = np.random.default_rng(0)
    data = {"input_ids": rng.integers(0, sizes["vocab_size"], (batch, seq)), "labels": rng.integers(0, 2, batch)}
    data["attention_mask"] = (np.arange(seq) < rng.integers(seq // 2, seq + 1, (batch, 1))).astype(np.int64)
    np.savez(folder / "batch.npz", **data)
    axes = {0: "batch", 1: "seq"}
    example = {name: torch.as_tensor(data[name][:2]) for name in ("input_ids", "attention_mask")}
    rule = {"name": "trained", **RULES[method]}
    compiled = mm.compile(model, {"version": 1, "name": method, "rules": [rule]}, example, dynamic_shapes=dict.fromkeys(example, axes))
    compiled.export_training(folder / "train", loss="cross_entropy", optimizer=mm.AdamW(lr=1e-4, weight_decay=0.01))
    trainer = Trainer(folder / "train", threads=options.threads, log=lambda line: None)
    peer = peft_module(model) if method == "lora" else own_module(compiled, list(trainer.parameters()))
    torch.save(peer, folder / "peer.pt")
    steps: dict[str, Step] = {"ort": lambda: trainer.step(data), "eager": torch_step(deepcopy(peer), data, options.threads)}
    if "compile" in options.peers and method == "lora":
        steps["compile"] = torch_step(deepcopy(peer), data, options.threads, True)
    times = in_turn(steps, 2 if options.tiny else options.repeats, 0.0 if options.tiny else PAUSE)
    row: dict[str, Any] = {"method": method, "head": head, "peer": "peft" if method == "lora" else "module"}
    row |= {f"{name}_ms": times.get(name) for name in ("ort", "eager", "compile")}
    row["ratio"] = times["ort"] / times["eager"]
    for kind in ("ort", "eager", *(["compile"] if "compile" in steps else [])):
        row[f"{kind}_peak_mb"], row[f"{kind}_growth_mb"] = peaks(kind, folder, options.threads)
    if "onnxsim" in options.peers and method == "lora":
        notes.append(f"onnxsim, {head} token: {onnxsim_reason(peer, data)}")
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--methods", nargs="+", default=list(RULES), choices=list(RULES))
    options_of.add_argument("--heads", nargs="+", default=["first", "mean"], choices=["first", "mean"])
    options_of.add_argument("--peers", nargs="*", default=["compile", "onnxsim"], choices=["compile", "onnxsim"])
    options_of.add_argument("--repeats", type=int, default=9)
    options = options_of.parse_args(arguments)
    for name in ("transformers", "peft"):
        if importlib.util.find_spec(name) is None:
            raise SystemExit(f"{name} is not installed; it comes with the bench extra")
    say = tell(options)
    rows: list[dict[str, Any]] = []
    notes = [
        "ratio: ort over eager; peak: largest resident memory of a process of its own; growth: what of it came after the imports",
        f"peft {version('peft')}, transformers {version('transformers')}",
    ]
    for method in options.methods:
        for head in options.heads if method == "lora" else options.heads[:1]:
            say(f"{method}, {head} token ...")
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measured(method, head, options, Path(folder), notes))
    columns = dict.fromkeys(name for row in rows for name in row)
    finish(options, [{name: row.get(name) for name in columns} for row in rows], notes)


if __name__ == "__main__":
    main()
