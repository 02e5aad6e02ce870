"""Perplexity of a language model on WikiText-2, dense, by our specs and by ONNX Runtime's own 4-bit quantisers on the same weights.

The validation text is cut in two at the line nearest to its middle: calibration comes from the first half, figures from windows spread
evenly over the second one. Its words are joined (` @-@ `, spaces before punctuation) as is usual; --raw leaves the text as it is. `u4-32`
is uniform 4 bit in blocks of 32 with integer zero points and searched scales, `u4-32-float` the same with floats as zero points. ONNX
Runtime's quantisers get the block matmuls of our dense export in blocks of 32, table and head stay dense; its GPTQ runs the whole model for
each of its inputs, so it is only run where it is named, and so are the recipes of papers and of PEFT (`_recipes.py`). One model is in
memory at a time. `mb` are the bytes of the weights and the graph. A spec that trains by `loss: distill` is measured as compiled and,
with --heal N, after `matmorph heal` on N tokens of the first half, its last twentieth of which chooses the state. --made SPEC=DIR judges a
folder that was compiled (and healed) before, whose own spec.yaml must say what SPEC does, but for its name and what it trains by.

    python benchmarks/perplexity.py [--model MODEL] [--data DIR] [--specs SPEC ...] [--peers PEER ...] [--windows 16] [--window 512]
        [--samples 128] [--length 256] [--heal N] [--heal-window 256] [--made SPEC=DIR ...] [--raw] [--write]
        [--json]

With --write the rows of library specs go into the package (matmorph/specs/library/language.json), where `matmorph specs list --long` shows
them.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from _common import data_folder, environment, finish, parser, tell
from _recipes import RECIPES, block_linears
from onnx import numpy_helper

import matmorph as mm
from matmorph.errors import MatmorphError
from matmorph.folders.healing import HEALING
from matmorph.models.hf_folder import quiet_loading
from matmorph.models.resolve import Model, resolve
from matmorph.models.text_batches import SAMPLES, text_calibration
from matmorph.passes.methods import method_table
from matmorph.runtime import SessionError, perplexity
from matmorph.runtime.format.artifact import SPEC
from matmorph.runtime.format.distillation import DISTILL
from matmorph.runtime.format.training import TRAIN_MANIFEST
from matmorph.runtime.train_manifest import read_train_manifest
from matmorph.specs.gallery import LANGUAGE_FILE, language_gallery, text_hash
from matmorph.specs.load import library_names, library_text, load_spec
from matmorph.text.corpus import read_corpus
from matmorph.text.tokens import Tokens

BLOCK = 32
LIBRARY = Path(mm.__file__).parent / "specs" / "library"
DENSE: dict[str, Any] = {"version": 1, "name": "dense", "rules": [{"match": {"op": "matmul"}, "rewrite": "keep"}]}
_BLOCKS = {"role": ["attention.*", "mlp.*"]}
_U4: dict[str, Any] = {"quantizer": "uniform", "bits": 4, "block_size": BLOCK}
OWN: Mapping[str, dict[str, Any]] = {
    name: {"version": 1, "name": name, "rules": [{"match": _BLOCKS, "rewrite": {"quantize": {**_U4, **settings}}}]}
    for name, settings in (
        ("u4-32", {"zero_point": True, "scale": "search"}),
        ("u4-32-float", {"zero_point": "float", "scale": "absmax"}),
    )
}
"""Specs that are in no library, by name."""
HEAD = "lm_head"
HEALED = ", healed"
LEARNT, LOOKED = 0.95, 4096
"""Of the first half what healing learns from, and how many tokens of the rest choose the state."""
JOINS = (
    (r" @(.)@ ", r"\1"),
    (r'" ([^"\n]*) "', r'"\1"'),
    (r" ([,.;:!?%)\]])", r"\1"),
    (r"([(\[$]) ", r"\1"),
    (r" '(s|t|re|ve|m|d|ll)\b", r"'\1"),
)
"""Pattern and what it becomes: words that WikiText sets apart, joined."""


class Texts(NamedTuple):
    """Files of the two halves."""

    calibration: Path
    judged: Path


class Made(NamedTuple):
    """A folder, and seconds that making it took. `mb`: what the weights would take where the file holds them in another form. `healed`:
    tokens that it has learnt from since it was compiled."""

    folder: Path
    seconds: float
    mb: float | None = None
    healed: int = 0


# ---- the text


def halves(source: Path, place: Path, raw: bool) -> Texts:
    text = source.read_text(encoding="utf-8")
    middle = text.index("\n", len(text) // 2) + 1
    made = Texts(place / "calibration.txt", place / "judged.txt")
    for file, part in ((made.calibration, text[:middle]), (made.judged, text[middle:])):
        file.write_text(part if raw else joined(part), encoding="utf-8")
    return made


def joined(text: str) -> str:
    for pattern, form in JOINS:
        text = re.sub(pattern, form, text)
    return text


def spread_windows(ids: np.ndarray[Any, Any], window: int, count: int) -> np.ndarray[Any, Any]:
    """`count` windows at equal distances, one behind the other."""
    count = min(count, len(ids) // window)
    starts = [k * (len(ids) - window) // max(1, count - 1) for k in range(count)]
    return np.concatenate([ids[start : start + window] for start in starts])


# ---- ours


def ours(model: str, spec: Any, texts: Texts, place: Path, options: Any) -> Made:
    """Compiled without a cache, which changes no logits."""
    found = load(model, options.tiny, texts)
    batches = text_calibration(found, texts.calibration, options.length, options.samples)
    begun = time.perf_counter()
    given = {"calibration": batches, "hf_folder": found.hf_folder}
    folder = mm.compile(found.module, spec, found.example_inputs, found.dynamic_shapes, **given).save(place, force=True)
    return Made(folder, time.perf_counter() - begun)


def distils(folder: Path) -> bool:
    return (folder / TRAIN_MANIFEST).is_file() and read_train_manifest(folder).loss.name == DISTILL


def healed(made: Made, dense: Path, texts: Texts, place: Path, options: Any) -> Made:
    """By the command that a user would type. The teacher's answers are asked for once."""
    text = texts.calibration.read_text(encoding="utf-8")
    cut = text.index("\n", int(LEARNT * len(text))) + 1
    learnt, looked = place.with_name("learnt.txt"), place.with_name("looked.txt")
    learnt.write_text(text[:cut], encoding="utf-8")
    looked.write_text(text[cut:], encoding="utf-8")
    told: dict[str, Any] = {
        "text": learnt,
        "eval-text": looked,
        "eval-tokens": min(LOOKED, options.heal),
        "teacher": dense,
        "teacher-cache": place.with_name("teacher.safetensors"),
        "tokens": options.heal,
        "window": options.heal_window,
        "threads": options.threads,
        "out": place,
    }
    begun = time.perf_counter()
    words = [f"--{key}={value}" for key, value in told.items()]
    subprocess.run([sys.executable, "-m", "matmorph", "heal", str(made.folder), *words], check=True, stdout=subprocess.DEVNULL)
    return Made(place, made.seconds + time.perf_counter() - begun, healed=healed_on(place))


def made_before(spec: str, folder: Path) -> Made:
    """ValueError for a folder of another spec."""
    wanted, found = (dict(load_spec(one, method_table()).resolved) for one in (spec, folder / SPEC))
    for told in (wanted, found):
        for key in ("name", "train"):
            told.pop(key, None)
    if wanted != found:
        raise ValueError(f"{folder} was compiled by another spec than {spec}")
    return Made(folder, float("nan"), healed=healed_on(folder))


def healed_on(folder: Path) -> int:
    """Tokens; 0 for what is as it was compiled."""
    file = folder / HEALING
    return int(json.loads(file.read_text())["tokens"]) if file.is_file() else 0


def load(model: str, tiny: bool, texts: Texts) -> Model:
    return tiny_model(texts) if tiny else resolve(model, cache=False)


def tiny_model(texts: Texts) -> Model:
    """A Llama of two layers that knows nothing, with a tokenizer of the text."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train([str(texts.calibration)], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = texts.calibration.parent / "tiny"
    with quiet_loading(transformers), torch.random.fork_rng():
        transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=300, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    made.save(str(folder / "tokenizer.json"))
    return resolve(str(folder), cache=False)


# ---- ONNX Runtime's


def peer(name: str, dense: Path, texts: Texts, place: Path, options: Any) -> Made:
    """A copy of the dense folder with another model.onnx; its manifest no longer says what the file's bytes are."""
    from onnxruntime.quantization import matmul_nbits_quantizer

    begun = time.perf_counter()
    place.mkdir()
    for file in dense.iterdir():
        if file.name in ("manifest.json", "config.json", "tokenizer.json"):
            shutil.copy(file, place)
    source = with_plain_weights(onnx.load(dense / "model.onnx"))
    apart = [node.name for node in source.graph.node if node.name.startswith(HEAD)]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.chdir(place):  # its GPTQ leaves a file where it runs
        config = PEERS[name](matmul_nbits_quantizer, texts, dense, options)
        quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(source, block_size=BLOCK, nodes_to_exclude=apart, algo_config=config)
        quantizer.process()
    model = quantizer.model.model
    onnx.save_model(model, place / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    found = sum(node.op_type == "MatMulNBits" for node in model.graph.node)
    if not found:
        raise RuntimeError(f"{name} quantised nothing")
    return Made(place, time.perf_counter() - begun)


def recipe(name: str, dense: Path, texts: Texts, place: Path, options: Any) -> Made:
    """The dense model with the weights that a recipe stands for."""
    found = load(options.model, options.tiny, texts)
    batches = text_calibration(found, texts.calibration, options.length, options.samples)
    whole = sum(file.stat().st_size for file in dense.glob("model.onnx*"))
    blocks = sum(4 * layer.weight.numel() for _, layer in block_linears(found.module, HEAD))
    begun = time.perf_counter()
    with torch.no_grad():
        taken = RECIPES[name](found.module, HEAD, batches)
    seconds = time.perf_counter() - begun
    folder = mm.compile(found.module, DENSE, found.example_inputs, found.dynamic_shapes, hf_folder=found.hf_folder).save(place, force=True)
    return Made(folder, seconds, (whole - blocks + taken) / 1e6)


def with_plain_weights(model: Any) -> Any:
    """Weights of the blocks as [in, out] beside their product, where the quantisers look for them."""
    stored = {one.name: one for one in model.graph.initializer}
    kept = []
    for node in model.graph.node:
        if node.op_type == "Transpose" and node.input[0] in stored and not node.name.startswith(HEAD):
            one = stored[node.input[0]]
            turned = np.ascontiguousarray(numpy_helper.to_array(one).T)
            one.CopyFrom(numpy_helper.from_array(turned, node.output[0]))
        else:
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model


def _gptq(module: Any, texts: Texts, dense: Path, options: Any) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    rows = read_corpus(texts.calibration, Tokens(dense / "tokenizer.json"), options.length * options.gptq_samples).ids
    samples = rows[: len(rows) // options.length * options.length].reshape(-1, 1, options.length)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows = iter([{"input_ids": row, "attention_mask": np.ones_like(row)} for row in samples])

        def get_next(self) -> Any:
            return next(self.rows, None)

        def __deepcopy__(self, memo: Any) -> Any:
            return Reader()

    return module.GPTQWeightOnlyQuantConfig(calibration_data_reader=Reader(), block_size=BLOCK, perchannel=False)


PEERS: Mapping[str, Callable[[Any, Texts, Path, Any], Any]] = {
    "ORT rtn": lambda module, *_: module.DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=False),
    "ORT hqq": lambda module, *_: module.HQQWeightOnlyQuantConfig(block_size=BLOCK),
    "ORT k_quant": lambda module, *_: module.KQuantWeightOnlyQuantConfig(),
    "ORT gptq": _gptq,
}
"""Names to the settings of a quantiser, from its module, the texts, the dense folder and the options."""


# ---- the table


def row(name: str, made: Made, ids: Any, dense: float | None, options: Any) -> dict[str, Any]:
    found = perplexity(made.folder, ids, window=options.window, providers="cpu", threads=options.threads, verify=False, log=lambda _: None)
    value = found.prediction.perplexity
    return {
        "model": f"{name}{HEALED}" if made.healed else name,
        "perplexity": value,
        "over_dense": value / dense if dense else 1.0,
        "mb": sum(file.stat().st_size for file in made.folder.glob("model.onnx*")) / 1e6 if made.mb is None else made.mb,
        "make_min": made.seconds / 60,
        "eval_min": found.seconds / 60,
        "healed": made.healed,
        "fault": "",
    }


def makers(options: Any, texts: Texts, scratch: Path) -> Iterator[tuple[str, Callable[[], Made]]]:
    for told in options.made:
        name, _, folder = told.partition("=")
        yield name, lambda name=name, folder=folder: made_before(name, Path(folder).absolute())  # type: ignore[misc]
    for number, name in enumerate(options.specs):
        spec = OWN.get(name, name)
        yield name, lambda spec=spec, number=number: ours(options.model, spec, texts, scratch / f"ours-{number}", options)  # type: ignore[misc]
    for number, name in enumerate(options.peers):
        make = recipe if name in RECIPES else peer
        yield name, lambda make=make, name=name, number=number: make(name, scratch / "dense", texts, scratch / f"peer-{number}", options)  # type: ignore[misc]


def stages(make: Callable[[], Made], dense: Path, texts: Texts, scratch: Path, options: Any) -> Iterator[Made]:
    """What is made, then healed where that is wanted; a folder that was made here goes when the next is asked for."""
    gc.collect()
    made = make()
    yield made
    if options.heal and distils(made.folder):
        after = healed(made, dense, texts, scratch / "healed", options)
        yield after
        shutil.rmtree(after.folder)
    if made.folder.is_relative_to(scratch):
        shutil.rmtree(made.folder)


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--model", default="smollm2", help="as on matmorph's command line (default: smollm2)")
    options_of.add_argument("--data", type=Path, help="folder that holds wikitext2/valid.txt (default: MATMORPH_DATA, else ../shared/data)")
    options_of.add_argument("--specs", nargs="*", default=[*OWN, "llm-u4"], help=f"library specs, files, or {', '.join(OWN)}")
    options_of.add_argument("--peers", nargs="*", choices=[*PEERS, *RECIPES], default=["ORT rtn", "ORT hqq", "ORT k_quant"])
    options_of.add_argument("--windows", type=int, default=16)
    options_of.add_argument("--window", type=int, default=512)
    options_of.add_argument("--samples", type=int, help="of calibration (default: 128, as far as there are)")
    options_of.add_argument("--length", type=int, default=256, help="tokens of a sample")
    options_of.add_argument("--gptq-samples", type=int, default=8, help="samples for ONNX Runtime's GPTQ")
    options_of.add_argument("--heal", type=int, default=0, metavar="N", help="tokens that specs with loss: distill learn from")
    options_of.add_argument("--heal-window", type=int, default=256)
    options_of.add_argument("--made", nargs="*", default=[], metavar="SPEC=DIR", help="folders that were compiled, and healed, before")
    options_of.add_argument("--write", action="store_true", help="keep the figures of library specs in the package")
    options_of.add_argument("--raw", action="store_true", help="leave the text as it is")
    options = options_of.parse_args(arguments)
    if options.write and (options.tiny or options.model != "smollm2"):
        options_of.error("--write keeps figures of smollm2 alone")
    if options.tiny:
        options.window, options.length, options.samples, options.windows, options.gptq_samples = 32, 32, 8, 4, 2
    source = data_folder(options.data, "wikitext2") / "valid.txt"
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)  # the peers' line for every node
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # HQQ's, of what it only reads
    say = tell(options)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        texts = halves(source, scratch, options.raw)
        say("dense")
        dense = ours(options.model, DENSE, texts, scratch / "dense", options)
        whole = read_corpus(texts.judged, Tokens(dense.folder / "tokenizer.json"))
        ids = spread_windows(whole.ids, options.window, options.windows)
        rows.append(row("dense", dense, ids, None, options))
        for name, make in makers(options, texts, scratch):
            say(f"{name} (dense {rows[0]['perplexity']:.3f})")
            try:
                for made in stages(make, dense.folder, texts, scratch, options):
                    rows.append(row(name, made, ids, rows[0]["perplexity"], options))
                    say(f"  {rows[-1]['over_dense']} x dense, {rows[-1]['mb']} MB, {rows[-1]['make_min']} min")
            except (MatmorphError, SessionError, ImportError, RuntimeError, AttributeError, ValueError) as error:
                line = next(iter(str(error).splitlines()), type(error).__name__)
                rows.append({**dict.fromkeys(rows[0], "-"), "model": name, "fault": f"{type(error).__name__}: {line:.100}"})
                say(f"  {rows[-1]['fault']}")
    count = len(ids) // options.window
    notes = [
        f"{count} windows of {options.window} tokens of the second half, all but the first token of each counted; words "
        + ("as they lie in the file" if options.raw else "joined"),
        f"calibration: samples of {options.length} tokens from the beginning of the first half",
        "ORT: blocks of 32, table and head dense; HQQ's zero points are floats, and hold weights of a GGUF file in Q4_1 as they are",
    ]
    if options.write:
        write(rows, count, options)
    finish(options, rows, notes)


def write(rows: Sequence[Mapping[str, Any]], windows: int, options: Any) -> None:
    """The rows of library specs in the place of earlier ones; only figures of one setting lie in a file."""
    named = {row["model"]: row for row in rows if not row["fault"]}
    found = [
        {**told(row, named.get(f"{name}{HEALED}"), options), "spec": name, "sha256": text_hash(library_text(name))}
        for name, row in named.items()
        if name in library_names()
    ]
    setting = {
        "model": options.model,
        "windows": windows,
        "window": options.window,
        "length": options.length,
        "dense": figures(rows[0]),
    }
    old = language_gallery()
    same = all(old.get(key) == value for key, value in setting.items())
    kept = [row for row in old["rows"] if same and row["spec"] in library_names() and row["spec"] not in {one["spec"] for one in found}]
    every = sorted([*kept, *found], key=lambda row: str(row["spec"]))
    (LIBRARY / LANGUAGE_FILE).write_text(
        json.dumps({**setting, "environment": environment(options.threads), "rows": every}, indent=1) + "\n"
    )


def told(row: Mapping[str, Any], healed: Mapping[str, Any] | None, options: Any) -> dict[str, Any]:
    """Of a spec: healed where it was, with what it was before."""
    last = healed or row
    before = {} if healed is None else {"healed_on": healed["healed"], "unhealed": round(row["over_dense"], 4)}
    return {**figures(last), "over_dense": round(last["over_dense"], 4), "samples": options.samples or SAMPLES, **before}


def figures(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"bytes": round(1e6 * row["mb"]), "perplexity": round(row["perplexity"], 3)}


if __name__ == "__main__":
    main()
