"""Greedy tokens that the runtimes of other people write with a compiled folder. Each is optional: a test without it skips, and says how it
is had.

optimum-onnx wants an older transformers than the package's, so that it runs in an environment of its own (`make llm` makes it), and
transformers.js under Node.js, in a folder where it was installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
OPTIMUM = Path(os.environ.get("MATMORPH_OPTIMUM", ROOT / ".venv-optimum" / "bin" / "python"))
JS = os.environ.get("MATMORPH_TRANSFORMERS_JS")

_OPTIMUM = """
import json, sys, warnings
import torch
from optimum.onnxruntime import ORTModelForCausalLM

folder, prompts, new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = ORTModelForCausalLM.from_pretrained(folder, provider="CPUExecutionProvider", use_io_binding=False)
width = max(map(len, prompts))
ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
found = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
print(json.dumps(found[:, width:].tolist()))
"""
_JS = """
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';
const place = createRequire(process.argv[1] + '/').resolve('@huggingface/transformers');
const { AutoModelForCausalLM, Tensor, env } = await import(pathToFileURL(place));
const [home, folder, prompt, count] = [process.argv[2], process.argv[3], JSON.parse(process.argv[4]), +process.argv[5]];
env.allowRemoteModels = false;
env.localModelPath = home;
const model = await AutoModelForCausalLM.from_pretrained(folder, { device: 'cpu' });
const row = (v) => new Tensor('int64', BigInt64Array.from(v.map(BigInt)), [1, v.length]);
const given = { input_ids: row(prompt), attention_mask: row(prompt.map(() => 1)) };
const found = await model.generate({ ...given, max_new_tokens: count, do_sample: false });
console.log(JSON.stringify(Array.from(found.data, Number).slice(prompt.length)));
"""


def of_genai(folder: Path, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    """New tokens of each prompt; the end token, where there is one, is not among them. Prompts of one length."""
    return next(of_genai_adapters(folder, prompts, new, [None]))


def of_genai_adapters(
    folder: Path, prompts: Sequence[Sequence[int]], new: int, adapters: Sequence[Path | None]
) -> Iterator[list[list[int]]]:
    """The same for each adapter in turn, on one loaded model; None = the base."""
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed (make llm)")
    model = og.Model(str(folder))
    known = og.Adapters(model)
    for number, adapter in enumerate(adapters):
        if adapter is not None:
            known.load(str(adapter), str(number))
    for number, adapter in enumerate(adapters):
        yield _written_by_genai(og, model, prompts, new, None if adapter is None else (known, str(number)))


def _written_by_genai(og: Any, model: Any, prompts: Sequence[Sequence[int]], new: int, active: tuple[Any, str] | None) -> list[list[int]]:
    params = og.GeneratorParams(model)
    length = len(prompts[0])
    params.set_search_options(max_length=length + new, do_sample=False, batch_size=len(prompts))
    generator = og.Generator(model, params)
    if active is not None:
        generator.set_active_adapter(*active)
    generator.append_tokens(list(prompts[0]) if len(prompts) == 1 else [list(row) for row in prompts])
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(token) for token in generator.get_sequence(row)][length:] for row in range(len(prompts))]


def of_optimum(folder: Path, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    """New tokens of each prompt, which are padded on the left."""
    if not OPTIMUM.is_file():
        pytest.skip("optimum-onnx has no environment (make llm)")
    return [list(row) for row in _said([OPTIMUM, "-c", _OPTIMUM, folder, json.dumps([list(row) for row in prompts]), str(new)])]


def of_transformers_js(tree: Path, prompt: Sequence[int], new: int) -> list[int]:
    """New tokens of a prompt; `tree`: what `matmorph layout --for transformers.js` wrote."""
    node = shutil.which("node")
    if node is None or JS is None:
        pytest.skip("needs node, and MATMORPH_TRANSFORMERS_JS = a folder in which npm installed @huggingface/transformers")
    words = ["--input-type=module", "-e", _JS, "--", JS, tree.parent, tree.name, json.dumps(list(prompt)), str(new)]
    return list(_said([node, *words]))


def _said(words: Sequence[str | Path]) -> list:
    """What a program prints last, as JSON. It sees no path of ours."""
    surroundings = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=surroundings, cwd=sys.prefix)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])
