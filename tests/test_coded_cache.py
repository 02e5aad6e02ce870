"""A key/value cache in int8 codes, `export.cache: int8`. Oracles: the definition in float64, and transformers without a cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cached_models import FAMILIES, HEAD, LAYERS, PAIRS, built, logits, padded, tokens
from mutating import Mutant, killer, mutated, real_code, unmutated
from test_cached_call import CUTS, KEEP, ran
from test_companions import cache, ports
from torch import Tensor, nn

import matmorph as mm
from matmorph.errors import ExportError, InputError, SpecError
from matmorph.exporters.attention_form import written_form
from matmorph.exporters.layouts.genai import genai_config
from matmorph.exporters.layouts.tree import LAYOUTS, write_tree
from matmorph.exporters.onnx.onnx_model import export_onnx
from matmorph.ir.cache import find_slots
from matmorph.ir.core import Graph
from matmorph.ir.text.printing import parse_graph, print_graph
from matmorph.ir.verify import verify
from matmorph.passes.attention.coded_cache import code_cache
from matmorph.runtime import Generator, InputMismatch, Session
from matmorph.runtime.check import check
from matmorph.runtime.difference import case_differences, code_difference
from matmorph.runtime.format.cases import Case
from matmorph.runtime.manifest import open_folder
from matmorph.specs.schema import Export

EXACT = 5e-6
"""Relative to the largest logit: a call without a past reads no codes. For the size see `test_cached_call.CLOSE`."""
ROUNDED = {"llama": 0.025, "gpt2": 0.012, "qwen3": 0.035, "gemma3": 0.015, "phi3": 0.05}
"""The same behind a past in codes: half a step is 1/254 of a token's largest number, and a key's error enters an exponent, in two layers.
At most four times what was met."""
CODES, SCALES = "past_key_values.0.key", "past_key_values.0.key.scales"
FAST = ("llama",)
NAMES = [*FAST, *(pytest.param(name, marks=pytest.mark.full) for name in FAMILIES if name not in FAST)]


def spec(**export: Any) -> dict[str, Any]:
    return {**KEEP, "export": {"target": ["cpu"], "cache": "int8", **export}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[nn.Module, mm.Compiled, Path]]:
    traced: dict[str, tuple[nn.Module, mm.Compiled]] = {}
    made: dict[tuple[str, str], tuple[nn.Module, mm.Compiled, Path]] = {}

    def get(name: str, form: str = "auto") -> tuple[nn.Module, mm.Compiled, Path]:
        if name not in traced:
            module = built(FAMILIES[name])
            traced[name] = module, mm.compile(module, spec(), {"input_ids": tokens(2, 16)}, cache=True)
        if (name, form) not in made:
            module, first = traced[name]
            compiled = type(first)(replace(first._job, spec=mm.load_spec(spec(attention=form))))
            made[name, form] = module, compiled, compiled.save(tmp_path_factory.mktemp(name) / form)
        return made[name, form]

    return get


# ---- what a code is

DRAWN = torch.randn(2, 3, 5, HEAD, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1.0, 50.0])[:, None, None]


def check_codes(m: Any) -> None:
    codes, scales = m["cache_ops.coded"](DRAWN)
    wide = DRAWN.double().numpy()
    step = np.abs(wide).max(-1, keepdims=True) / 127
    assert np.abs(scales.double().numpy() / step - 1).max() <= 2**-23  # one rounding of float32
    # Half a step, and the roundings of the scale, of its inverse and of the product.
    assert (np.abs(codes.double().numpy() * scales.double().numpy() - wide) <= step * (0.5 + 127 * 2**-22)).all()
    assert codes.dtype == torch.int8
    assert set(np.abs(codes.numpy()).max(-1).ravel()) == {127}


def check_what_is_appended(m: Any) -> None:
    """The past as numbers, what it was untouched, and the new ones behind it."""
    codes, scales = (part.clone() for part in m["cache_ops.coded"](DRAWN))
    new = DRAWN[:, :, :2].flip(-1) * 3
    before, all_codes, all_scales = m["cache_ops._append"](codes, scales, new, 2)
    assert torch.equal(before, codes.float() * scales)
    assert torch.equal(all_codes[:, :, :5], codes)
    assert torch.equal(all_scales[:, :, :5], scales)
    assert ((all_codes[:, :, 5:] * all_scales[:, :, 5:] - new).abs() <= all_scales[:, :, 5:] * 0.501).all()


def check_zeros_and_halves(m: Any) -> None:
    for kind in (torch.float16, torch.bfloat16, torch.float32):
        numbers = torch.tensor([[0.0, 0.0], [1e-5, -1.1e-5], [60000.0, -1.0]], dtype=kind)
        codes, scales = m["cache_ops.coded"](numbers)
        assert codes[0].tolist() == [0, 0]
        assert codes[2].tolist() == [127, 0]
        assert torch.isfinite(codes.to(kind) * scales).all()
        assert (scales > 0).all()  # 0 / 0 has no code


def check_one_attention(m: Any) -> None:
    """An error e of a score changes a softmax by a factor between exp(-2e) and exp(2e): |y - y'| <= (exp(2e) - 1) max |v| + s / 2, with e
    the sum of |q| times half a step of a key. In float64."""
    random = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 4, n, 16, generator=random, dtype=torch.float64) for n in (1, 40, 40))
    exact = torch.softmax(q @ k.mT / 4, -1) @ v
    kept = [m["cache_ops._append"](*m["cache_ops.coded"](x[:, :, :30]), x[:, :, 30:], 2)[0] for x in (k, v)]
    keys, values = (torch.cat([past, x[:, :, 30:]], 2) for past, x in zip(kept, (k, v), strict=True))
    found = torch.softmax(q @ keys.mT / 4, -1) @ values
    half = [x.abs().amax((-1, -2), keepdim=True) / 254 for x in (k, v)]
    wrong = q.abs().sum(-1, keepdim=True) / 4 * half[0]
    bound = (torch.exp(2 * wrong) - 1) * v.abs().amax((-1, -2), keepdim=True) + half[1]
    assert ((found - exact).abs() <= bound).all()
    assert (found - exact).abs().max() >= 1e-4  # else nothing was in codes


CHECKS: tuple[Callable[[Any], None], ...] = (check_codes, check_what_is_appended, check_zeros_and_halves, check_one_attention)
MUTANTS = {
    "one scale for all tokens": Mutant("cache_ops.coded", "x.abs().amax(-1, keepdim=True)", "x.abs().amax().expand(*x.shape[:-1], 1)"),
    "codes are cut, not rounded": Mutant(
        "cache_ops.coded", "(x * scales.float().reciprocal()).round()", "(x * scales.float().reciprocal()).trunc()"
    ),
    "no guard against a scale of zero": Mutant(
        "cache_ops.coded",
        "(x.abs().amax(-1, keepdim=True) / LEVELS).clamp(min=torch.finfo(x.dtype).tiny)",
        "x.abs().amax(-1, keepdim=True) / LEVELS",
    ),
    "256 levels": Mutant("cache_ops.coded", "x.abs().amax(-1, keepdim=True) / LEVELS", "x.abs().amax(-1, keepdim=True) / 128"),
    "new scales in front": Mutant("cache_ops._append", "torch.cat([scales, their], axis)", "torch.cat([their, scales], axis)"),
}


@pytest.mark.parametrize("one", CHECKS, ids=lambda one: one.__name__)
def test_codes(one: Callable[[Any], None]) -> None:
    one(real_code())


@pytest.mark.full
def test_the_checks_pass_on_the_code_as_it_is() -> None:
    assert killer(unmutated(MUTANTS.values()), CHECKS) is None


@pytest.mark.full
@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_mistake_is_seen(mutant: Mutant) -> None:
    assert killer(mutated(mutant), CHECKS), "no check noticed"


class Kept(nn.Module):
    """A cache of one slot, along axis 1 or 2, and a sum over it."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, past: Tensor, new: Tensor) -> dict[str, Tensor]:
        present = torch.cat([past, new], self.axis)
        return {"sum": present.sum(self.axis), "present": present}


def kept_graph(axis: int) -> Graph:
    shape, axes = [2, 3, HEAD], {axis: {"name": "past", "min": 0}}
    examples = [torch.ones([n if k == axis else size for k, size in enumerate(shape)]) for n in (4, 2)]
    return mm.trace(Kept(axis), tuple(examples), (axes, {axis: "new"}))


def test_onnx_runtime_makes_the_same_codes(tmp_path: Path) -> None:
    """Bit by bit: all that is done is division, rounding and products of two numbers, which IEEE 754 defines."""
    graph = code_cache(kept_graph(1))
    verify(graph)
    assert print_graph(parse_graph(print_graph(graph))) == print_graph(graph)
    assert [(slot.input, slot.output, slot.past.tensor.dtype) for slot in find_slots(graph)] == [
        ("past", "present", "int8"),
        ("past.scales", "present.scales", "float32"),
    ]
    export_onnx(graph, tmp_path, Export(target=("cpu",)))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    codes, scales = real_code()["cache_ops.coded"](DRAWN[:, 0])
    new = DRAWN[:, 1, :2] * 3
    found = session.run(None, {"past": codes.numpy(), "past.scales": scales.numpy(), "new": new.numpy()})
    _, *expected = real_code()["cache_ops._append"](codes, scales, new, 1)
    for array, tensor in zip(found[1:], expected, strict=True):
        assert np.array_equal(array, tensor.numpy())


def test_tokens_along_the_last_axis_are_refused_by_name() -> None:
    with pytest.raises(ExportError, match="past has its tokens along its last axis"):
        code_cache(kept_graph(2))


def test_a_graph_without_a_cache_stays() -> None:
    graph = mm.trace(nn.Linear(4, 4), (torch.ones(2, 4),))
    assert code_cache(graph) is graph


# ---- a decoder with it


def far(found: np.ndarray, expected: np.ndarray, mask: Tensor) -> float:
    return float(np.abs(found - expected)[mask.numpy() != 0].max() / np.abs(expected).max())


@pytest.mark.parametrize("name", NAMES)
def test_prompts_in_pieces_answer_nearly_as_without_a_cache(name: str, saved: Any) -> None:
    module, compiled, folder = saved(name)
    session, ids = Session(folder, providers=["cpu"]), tokens()
    for mask in (torch.ones_like(ids), padded(20, 6)):
        expected = logits(module, ids, mask).numpy()
        errors = {cut: far(ran(session.run, session.inputs, ids, mask, pieces), expected, mask) for cut, pieces in CUTS.items()}
        assert errors.pop("whole") <= EXACT
        assert all(1e-4 < error < ROUNDED[name] for error in errors.values()), errors
    parity = compiled.report.parity
    assert parity is not None
    assert parity.tolerance == 1e-4  # that of any file in float32: codes that come in are read to the bit
    assert check(folder, ["cpu"]).ok


@pytest.mark.full
def test_every_form_of_attention_reads_the_same_codes(saved: Any) -> None:
    ids, mask = tokens(), padded(20, 6)
    forms = {form: saved("llama", form)[2] for form in ("plain", "auto")}
    count = {
        form: [node.op_type for node in onnx.load(folder / "model.onnx").graph.node].count("Attention") for form, folder in forms.items()
    }
    assert count == {"plain": 0, "auto": LAYERS}
    sessions = [Session(folder, providers=["cpu"]) for folder in forms.values()]
    plain, standard = (ran(session.run, session.inputs, ids, mask, [7, 13]) for session in sessions)
    assert far(standard, plain, mask) <= EXACT


@pytest.mark.full
@pytest.mark.parametrize(("precision", "kind", "size"), [("fp16", "float16", 2), ("bf16", "float32", 4)])
def test_half_precision(precision: str, kind: str, size: int, saved: Any, tmp_path: Path) -> None:
    """Scales have the type that a cache of numbers would have; CUDA hands back no node; codes become numbers of that type in one step."""
    _, first, _ = saved("llama")
    target = ["cuda"] if precision == "bf16" else ["cuda", "cpu"]
    compiled = type(first)(replace(first._job, spec=mm.load_spec(spec(precision=precision, target=target, attention="plain"))))
    folder = compiled.save(tmp_path / "out")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["cache"]["bytes_per_token"] == LAYERS * 2 * PAIRS * (HEAD + size)
    assert {port["name"]: port["dtype"] for port in manifest["inputs"]}[SCALES] == kind
    (placed,) = compiled.report.placements
    assert placed.handed == ()
    pasts = {port["name"] for port in manifest["inputs"] if port["dtype"] == "int8"}
    nodes = onnx.load(folder / "model.onnx", load_external_data=False).graph.node
    casts = [node.attribute[0].i for node in nodes if node.op_type == "Cast" and node.input[0] in pasts]
    assert casts == [onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))] * len(pasts)


def test_bytes_of_a_token(saved: Any) -> None:
    """By the definition: a byte per number and four per scale, keys and values of each head and layer."""
    _, compiled, folder = saved("llama")
    expected = LAYERS * 2 * PAIRS * (HEAD + 4)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["cache"]["bytes_per_token"] == expected
    assert compiled.report.totals.cache == (LAYERS * 2 * PAIRS * HEAD * 4, expected)
    kinds = {port["name"]: port["dtype"] for port in manifest["inputs"]}
    assert (kinds[CODES], kinds[SCALES]) == ("int8", "float32")
    scales = {slot["past"]: slot.get("scales") for slot in manifest["cache"]["slots"]}
    assert (scales[CODES], scales[SCALES], len(scales)) == (SCALES, None, 4 * LAYERS)
    assert (manifest["cache"]["padding"], manifest["cache"]["share_buffer"]) == ("any", False)


def test_the_generator_carries_codes_and_scales(saved: Any) -> None:
    """Greedy tokens of rows of different length, against one session call per token."""
    _, _, folder = saved("llama")
    generator, session = Generator(folder, ["cpu"], threads=1), Session(folder, providers=["cpu"])
    prompts = [tokens(1, 5)[0].tolist(), tokens(1, 9, seed=1)[0].tolist()]
    found = generator.generate(prompts, max_new_tokens=6, eos=[], pad=0)
    for row, prompt in enumerate(prompts):
        ids, cut = torch.tensor([prompt]), [len(prompt)]
        for step in range(6):
            last = ran(session.run, session.inputs, ids, torch.ones_like(ids), cut)[0, -1]
            assert np.diff(np.sort(last)[-2:]) > 1e-3, "a near tie: choose another prompt"
            assert found[row, step] == last.argmax()
            ids, cut = torch.cat([ids, torch.tensor([[int(last.argmax())]])], 1), [*cut, 1]


def test_the_compiled_module_and_its_graph_keep_a_float_cache(saved: Any) -> None:
    """Codes are of the file: training graphs and the torch module are made of a graph that never had them."""
    _, compiled, _ = saved("llama")
    assert {slot.past.tensor.dtype for slot in find_slots(compiled.graph)} == {"float32"}
    form = written_form(compiled.graph, Export(cache="int8"), None)
    assert [len(find_slots(graph)) for graph in (form.graph, form.traced)] == [4 * LAYERS] * 2
    assert compiled.graph.used_state() == form.graph.used_state()


# ---- what cannot be


def test_a_cache_of_another_type_is_refused(saved: Any) -> None:
    _, _, folder = saved("llama")
    session, ids = Session(folder, providers=["cpu"]), tokens(1, 3)
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((1, 8), np.int64), "position_ids": np.arange(5, 8)[None]}
    shapes = {port.name: [1, PAIRS, 5, port.shape[-1]] for port in session.inputs if port.name.startswith("past")}
    good = {name: np.zeros(shape, np.float32 if name.endswith("scales") else np.int8) for name, shape in shapes.items()}
    assert session.run({**feeds, **good})["logits"].shape == (1, 3, 67)
    with pytest.raises(InputMismatch, match=rf"{CODES}.*int8.*float32"):
        session.run({**feeds, **good, CODES: good[CODES].astype(np.float32)})
    with pytest.raises(InputMismatch, match=rf"{SCALES}"):
        session.run({**feeds, **{name: array for name, array in good.items() if name != SCALES}})


def test_what_is_asked_for_is_written_or_refused(saved: Any, tmp_path: Path) -> None:
    _, compiled, folder = saved("llama")
    with pytest.raises(ExportError, match=r"export\.cache int8 is of a key/value cache, and the model keeps none"):
        mm.compile(nn.Linear(4, 4), spec(), (torch.ones(2, 4),)).save(tmp_path / "out")
    with pytest.raises(ExportError, match=r"GroupQueryAttention \(export.attention gqa\) takes one for all tokens"):
        written_form(compiled.graph, Export(cache="int8", attention="gqa"), 64)
    with pytest.raises(SpecError, match="did you mean int8"):
        mm.load_spec(spec(cache="int9"))
    manifest, stored = open_folder(folder)
    for layout in LAYOUTS.values():
        with pytest.raises(InputError, match=f"layout {layout.name} is for a runtime that feeds keys and values alone"):
            write_tree(stored, layout, tmp_path / "tree", cache=manifest.cache)
    assert list(tmp_path.iterdir()) == []


def test_genai_gets_no_configuration_and_a_reason() -> None:
    plain = cache()
    coded = replace(plain, slots=(replace(plain.slots[0], scales="past_key_values.0.key.scales"), *plain.slots[1:]))
    config = {"model_type": "llama", "eos_token_id": 2, "max_position_embeddings": 64}
    found = genai_config(config, {}, coded, *ports(coded))
    assert found.data is None
    assert found.notes == ("no genai_config.json: it would not feed the scales of a cache in codes (past_key_values.0.key.scales)",)


def test_codes_may_be_one_step_apart() -> None:
    expected = np.array([[3, -127, 0]], np.int8)
    assert code_difference(expected + np.array([[1, 0, -1]], np.int8), expected) == 0
    assert code_difference(expected + np.array([[0, 3, 0]], np.int8), expected) == pytest.approx(2 / 127)
    assert code_difference(expected + np.array([[0, 3, 0]], np.int8), expected, np.array([[True, False, True]])) == 0
    assert code_difference(expected.astype(np.int16), expected) == float("inf")
    assert code_difference(expected[:, :2], expected) == float("inf")
    far_apart = code_difference(np.array([-127], np.int8), np.array([127], np.int8))
    assert far_apart == pytest.approx(253 / 127)


def test_a_case_measures_codes_as_codes_and_the_rest_as_numbers() -> None:
    """One step in each output; the one that nobody answered is off without end."""
    plain = cache()
    slot = replace(plain.slots[0], scales="scales")
    case = Case({}, {name: np.array([1, 2], np.int8) for name in (slot.present, "ids", "logits")})
    answers = {name: case.outputs[name] + np.int8(1) for name in (slot.present, "ids")}
    found = dict(case_differences(replace(plain, slots=(slot,)), case, answers))
    assert found == {slot.present: 0.0, "ids": float("inf"), "logits": float("inf")}
    assert dict(case_differences(None, case, answers))[slot.present] == float("inf")
