"""Minutes and peak resident memory of a compile of a Llama-shaped folder of random bfloat16 weights, under a limit of memory.

The folder is written shard by shard, a few MB in memory at a time, and compiled by the command line in a process of its own, which ends as
soon as more of it is resident than the limit (looked at every 20 ms, pages of files counted). The peak is the kernel's own. Both folders go
in the end.

    python benchmarks/scale.py --make 100m | 1b | 7b [--spec quantize-u4] [--limit GiB] [--layers N] [--place DIR]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import finish, parser, tell

SIZES: Mapping[str, tuple[dict[str, int], float]] = {
    "tiny": ({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}, 4.0),
    "100m": ({"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}, 1.5),
    "1b": ({"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}, 1.5),
    "7b": ({}, 4.0),  # the defaults of the class are Llama-2-7B's sizes
}
"""Settings of a LlamaConfig, and the limit in GiB."""
HEADS = {"tiny": 2, "1b": 4}
"""Key/value heads, where they are fewer."""
SHARD, CHUNK = 5 << 30, 1 << 21
"""Bytes of a file, numbers drawn at a time."""


def write_folder(folder: Path, size: str, layers: int | None) -> int:
    """The number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = dict(SIZES[size][0])
    if size in HEADS:
        settings["num_key_value_heads"] = HEADS[size]
    if layers is not None:
        settings["num_hidden_layers"] = layers
    config = LlamaConfig(**settings, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        filled += 2 * math.prod(shape)
        if filled > SHARD:
            shards.append({})
            filled = 2 * math.prod(shape)
        shards[-1][name] = shape
    generator = torch.Generator().manual_seed(0)
    names = [f"model-{k + 1:05}-of-{len(shards):05}.safetensors" for k in range(len(shards))]
    for name, tensors in zip(names, shards, strict=True):
        _write_shard(folder / name, tensors, generator)
    where = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config.save_pretrained(folder)
    return sum(map(math.prod, shapes.values()))


def _write_shard(path: Path, tensors: Mapping[str, tuple[int, ...]], generator: torch.Generator) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + 2 * math.prod(shape)]}
        end += 2 * math.prod(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in tensors.values():
            for start in range(0, math.prod(shape), CHUNK):
                count = min(CHUNK, math.prod(shape) - start)
                numbers = 0.02 * torch.randn(count, generator=generator) if len(shape) > 1 else torch.ones(count)
                file.write(numbers.bfloat16().view(torch.int16).numpy().data)


def compiled(folder: Path, spec: str, out: Path, limit: float, threads: int) -> tuple[float, float]:
    """(seconds, peak resident GiB) of `matmorph compile`. SystemExit where it fails, or goes over the limit."""
    command = [sys.executable, "-m", "matmorph", "compile", str(folder), "--spec", spec, "--out", str(out), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TMPDIR": str(out.parent)}
    start = time.perf_counter()
    with (out.parent / "log").open("w+") as log, subprocess.Popen(command, stdout=log, stderr=log, env=environment) as process:
        while True:
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                break
            if _resident(process.pid) > limit * 2**30:
                process.kill()
                raise SystemExit(f"more than {limit} GiB are resident after {time.perf_counter() - start:.0f} s")
            time.sleep(0.02)
        log.seek(0)
        if process.returncode != 0:
            raise SystemExit(f"compile failed:\n{log.read()[-4000:]}")
    return time.perf_counter() - start, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def _resident(pid: int) -> int:
    """Bytes; 0 where the system does not say so of another process."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def measure(options: argparse.Namespace, place: Path) -> dict[str, Any]:
    say, size = tell(options), "tiny" if options.tiny else options.make
    limit = SIZES[size][1] if options.limit is None else options.limit
    model, out = place / "model", place / "out"
    model.mkdir()
    start = time.perf_counter()
    parameters = write_folder(model, size, options.layers)
    say(f"{parameters:,} parameters written in {time.perf_counter() - start:.0f} s")
    seconds, peak = compiled(model, options.spec, out, limit, options.threads)
    written = sum(path.stat().st_size for path in out.iterdir())
    if peak > limit:
        raise SystemExit(f"{peak:.2f} GiB were resident, more than {limit}")
    return {
        "model": size,
        "spec": options.spec,
        "parameters": parameters,
        "model_gib": 2 * parameters / 2**30,
        "limit_gib": limit,
        "peak_gib": peak,
        "minutes": seconds / 60,
        "written_gib": written / 2**30,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--make", choices=[name for name in SIZES if name != "tiny"], default="100m", help="the shape")
    options_of.add_argument("--spec", default="quantize-u4")
    options_of.add_argument("--limit", type=float, metavar="GIB", help="resident memory, pages of files counted")
    options_of.add_argument("--layers", type=int, help="so many of the shape's layers")
    options_of.add_argument("--place", type=Path, help="where the folders are made, which go in the end (default: the temporary folder)")
    options = options_of.parse_args(arguments)
    place = Path(tempfile.mkdtemp(prefix="matmorph-scale-", dir=options.place))
    try:
        row = measure(options, place)
    finally:
        shutil.rmtree(place)
    finish(options, [row], ["peak_gib: of the compiling process, imports and pages of files included; minutes: with the checks"])


if __name__ == "__main__":
    main()
