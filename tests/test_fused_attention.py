"""Attention over the cache as one operator, of ONNX or of com.microsoft, in ONNX Runtime. Oracle: transformers without a cache."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from attention_models import DECODERS, PLACES
from cached_models import built, logits, padded, tokens
from test_cached_call import CUTS, KEEP, ran
from torch import nn

import matmorph as mm
from matmorph.errors import ExportError, SpecError
from matmorph.exporters.attention_form import written_form
from matmorph.ir.attention_ops import COMPACT
from matmorph.ir.evaluate import evaluate
from matmorph.ir.text.printing import parse_graph, print_graph
from matmorph.ir.verify import verify
from matmorph.ir.without_cache import positions_of
from matmorph.runtime import InputMismatch, Session
from matmorph.runtime.check import check
from matmorph.specs.schema import Export

CLOSE = 5e-6
"""Relative to the largest logit: sums in float32 in another order, 1.1e-6 at the most of five families with weights a quarter as large."""
FAST = ("llama",)
NAMES = [*FAST, *(pytest.param(name, marks=pytest.mark.full) for name in DECODERS if name not in FAST)]
HEAD = "attention of layer"
ONE_GQA = f"{HEAD}s 0, 1: fused, as one GroupQueryAttention"
SAID = {
    "llama": [f"{ONE_GQA}, rotation inside"],
    "gpt2": [ONE_GQA],
    "qwen3": [f"{ONE_GQA}, rotation inside"],
    "mistral": [f"{ONE_GQA}, window 8, rotation inside"],
    "phi3": [f"{ONE_GQA}, rotation inside"],
    "gemma3": [
        f"{HEAD} 0: fused, as one GroupQueryAttention, window 8, rotation inside",
        f"{HEAD} 1: fused, as one GroupQueryAttention, rotation inside",
    ],
    "gemma2": [
        f"{HEAD} 0: fused, as one GroupQueryAttention, window 8, scores capped at 5, rotation inside",
        f"{HEAD} 1: fused, as one GroupQueryAttention, scores capped at 5, rotation inside",
    ],
    "gpt_oss": [
        f"{HEAD} 0: fused, as one GroupQueryAttention, window 8, a sink per head, rotation inside",
        f"{HEAD} 1: fused, as one GroupQueryAttention, a sink per head, rotation inside",
    ],
}
KEPT = {
    "gemma2": f"{HEAD}s 0, 1: kept as it is, ONNX's Attention has no cap before its mask",
    "gpt_oss": f"{HEAD}s 0, 1: kept as it is, ONNX's Attention has no sink",
}


def spec(**export: Any) -> dict[str, Any]:
    return {**KEEP, "export": {"target": ["cpu"], **export}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[nn.Module, mm.Compiled, Path]]:
    """Module, compiled and folder of a decoder in a form: traced once."""
    made: dict[tuple[str, str], tuple[nn.Module, mm.Compiled, Path]] = {}
    traced: dict[str, tuple[nn.Module, mm.Compiled]] = {}

    def get(name: str, form: str) -> tuple[nn.Module, mm.Compiled, Path]:
        if name not in traced:
            module = built(DECODERS[name])
            traced[name] = module, mm.compile(module, spec(), {"input_ids": tokens(2, 16)}, cache=True)
        if (name, form) not in made:
            module, first = traced[name]
            compiled = of_spec(first, spec(attention=form))
            made[name, form] = module, compiled, compiled.save(tmp_path_factory.mktemp(name) / form)
        return made[name, form]

    return get


def of_spec(compiled: mm.Compiled, other: dict[str, Any]) -> mm.Compiled:
    """The same compiled model under another export."""
    return type(compiled)(replace(compiled._job, spec=mm.load_spec(other)))


def operators(folder: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node)


def close(found: np.ndarray, expected: np.ndarray, shown: np.ndarray) -> bool:
    return bool(np.abs(found - expected)[shown].max() <= CLOSE * np.abs(expected).max())


@pytest.mark.parametrize("name", NAMES)
def test_standard_answers_as_without_a_cache_whatever_is_padded(name: str, saved: Any) -> None:
    module, compiled, folder = saved(name, "standard")
    session, ids = Session(folder, providers=["cpu"]), tokens()
    for mask in (torch.ones_like(ids), padded(20, 6)):
        expected = logits(module, ids, mask).numpy()
        for cut in CUTS.values():
            assert close(ran(session.run, session.inputs, ids, mask, cut), expected, mask.numpy() != 0)
    manifest = json.loads((folder / "manifest.json").read_text())
    fused = name not in KEPT
    assert operators(folder)["Attention"] == (2 if fused else 0)
    assert manifest["opset"] == (23 if fused else 21)
    assert (manifest["cache"]["padding"], manifest["cache"]["share_buffer"]) == ("any", False)
    said = KEPT.get(name, f"{HEAD}s 0, 1: fused, as one Attention over past and new keys, its mask kept")
    assert [note for note in compiled.report.notes if note.startswith(HEAD)] == [said]


@pytest.mark.parametrize("name", NAMES)
def test_gqa_answers_as_without_a_cache(name: str, saved: Any) -> None:
    module, compiled, folder = saved(name, "gqa")
    session, ids = Session(folder, providers=["cpu"]), tokens(1)
    mask = torch.ones_like(ids)
    expected = logits(module, ids, mask).numpy()
    for cut in CUTS.values():
        assert close(ran(session.run, session.inputs, ids, mask, cut), expected, mask.numpy() != 0)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert operators(folder)["GroupQueryAttention"] == 2
    assert (manifest["cache"]["padding"], manifest["cache"]["share_buffer"]) == ("right", True)
    assert [note for note in compiled.report.notes if note.startswith(HEAD)] == SAID[name]
    assert check(folder, ["cpu"]).ok


@pytest.mark.parametrize("name", NAMES)
def test_gqa_takes_rows_that_are_padded_behind_their_tokens(name: str, saved: Any) -> None:
    """Each row against itself alone: the prompt as a batch, then one token of each row at a time."""
    module, _, folder = saved(name, "gqa")
    session, ids, lengths, prompt = Session(folder, providers=["cpu"]), tokens(2, 20), (12, 7), 12
    mask = (torch.arange(prompt) < torch.tensor(lengths)[:, None]).long()
    shapes = {entry.name: entry.shape for entry in session.inputs}
    past = {n: np.zeros((2, shape[1], 0, shape[3]), np.float32) for n, shape in shapes.items() if n.startswith("past")}
    given, alone = ids[:, :prompt], [logits(module, ids[k : k + 1], torch.ones(1, 20, dtype=torch.int64))[0] for k in range(2)]
    for step in range(8):
        feeds = {"input_ids": given, "attention_mask": mask, "position_ids": positions_of(mask)[:, -given.shape[1] :]}
        answer = session.run({**{n: t.numpy() for n, t in feeds.items() if n in shapes}, **past})
        for row, length in enumerate(lengths):
            found, at = answer["logits"][row], length + step
            rows = (slice(0, length), slice(0, length)) if step == 0 else (slice(0, 1), slice(at - 1, at))
            assert close(found[rows[0]], alone[row][rows[1]].numpy(), np.ones(rows[0].stop, bool))
        past = {n: answer[n.replace("past_key_values", "present")] for n in past}
        given = torch.stack([ids[row, length + step] for row, length in enumerate(lengths)])[:, None]
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)


def test_gqa_refuses_left_padding_and_a_batch_of_several_tokens_with_a_past(saved: Any) -> None:
    _, _, folder = saved("llama", "gqa")
    session, ids = Session(folder, providers=["cpu"]), tokens()
    with pytest.raises(InputMismatch, match="begins with padding"):
        ran(session.run, session.inputs, ids, padded(20, 6), [20])
    with pytest.raises(Exception, match="batch_size must be 1 when sequence_length > 1"):
        ran(session.run, session.inputs, ids, torch.ones_like(ids), [7, 13])


def test_past_and_present_may_be_one_buffer(saved: Any) -> None:
    """Bound to the same memory of all places, without any copy."""
    import onnxruntime as ort

    module, _, folder = saved("llama", "gqa")
    run = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    ids = tokens(1)
    buffers = {
        entry.name: ort.OrtValue.ortvalue_from_numpy(np.zeros((1, entry.shape[1], PLACES, entry.shape[3]), np.float32))
        for entry in run.get_inputs()
        if entry.name.startswith("past")
    }
    found, done = [], 0
    for length in (7, 1, 1, 11):
        binding = run.io_binding()
        feeds = {"input_ids": ids[:, done : done + length], "attention_mask": torch.ones(1, done + length, dtype=torch.int64)}
        feeds["position_ids"] = torch.arange(done, done + length)[None]
        for name, tensor in feeds.items():
            if name in {entry.name for entry in run.get_inputs()}:
                binding.bind_cpu_input(name, np.ascontiguousarray(tensor.numpy()))
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        binding.bind_output("logits")
        run.run_with_iobinding(binding)
        found.append(binding.get_outputs()[-1].numpy())
        done += length
    expected = logits(module, ids, torch.ones_like(ids)).numpy()
    assert close(np.concatenate(found, 1), expected, np.ones((1, 20), bool))


def test_the_operator_computes_what_the_graph_did_and_is_text(saved: Any) -> None:
    _, compiled, _ = saved("llama", "gqa")
    graph = compiled.graph
    fused = written_form(graph, Export(attention="gqa"), PLACES).graph
    verify(fused)
    assert [node.op for node in fused.nodes].count(COMPACT) == 2
    assert print_graph(parse_graph(print_graph(fused))) == print_graph(fused)
    random = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 7, dtype=torch.int64)
    past = [torch.randn(2, *map(int, v.tensor.shape[1:2]), 6, 16, generator=random) for v in graph.inputs if len(v.tensor.shape) == 4]
    given = [tokens(2, 1), mask, positions_of(mask)[:, -1:], *past]
    for before, after in zip(evaluate(graph, given), evaluate(fused, given), strict=True):
        assert (before - after).abs().max() <= CLOSE * before.abs().max()


def test_what_is_asked_for_is_written_or_refused(saved: Any, tmp_path: Path) -> None:
    _, compiled, plain = saved("llama", "plain")
    assert not {"Attention", "GroupQueryAttention"} & operators(plain).keys()
    export = Export(target=("cpu",))
    assert written_form(compiled.graph, export, PLACES).export.written_opset == 23
    assert written_form(compiled.graph, Export(opset=21), PLACES).notes == ()
    with pytest.raises(SpecError, match="attention: standard is an operator of opset 23, and opset is 21"):
        mm.load_spec(spec(attention="standard", opset=21))
    with pytest.raises(ExportError, match="no GroupQueryAttention for float32"):
        of_spec(compiled, spec(attention="gqa", target=["cuda", "cpu"])).save(tmp_path / "out")
    model = nn.Linear(4, 4)
    with pytest.raises(ExportError, match="the model keeps none"):
        mm.compile(model, spec(attention="gqa"), (torch.ones(2, 4),)).save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_known_places_the_rotation_stays_outside(saved: Any) -> None:
    _, compiled, _ = saved("llama", "gqa")
    found = written_form(compiled.graph, Export(attention="gqa"), None)
    assert found.fused.compact
    assert "outside, since the model does not say how many positions it has" in found.notes[0]


def test_plan_says_what_becomes_of_attention() -> None:
    module = built(DECODERS["llama"])
    report = mm.plan(module, spec(attention="gqa"), {"input_ids": tokens(2, 16)}, cache=True)
    assert SAID["llama"][0] in report.notes
