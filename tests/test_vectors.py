"""Check vectors: shapes, values, and who answers; torch itself is the oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from exporting import Mlp, mlp_graph, randn, seeded
from torch import nn

from matmorph.errors import InputError
from matmorph.exporters.vectors import check_vectors, widened
from matmorph.ir.core import Range
from matmorph.ir.evaluate import evaluate
from matmorph.ir.tracing.trace import trace


class Tokens(nn.Module):
    """ids [batch, seq], mask [batch, seq] to [batch, seq, 4]; positions end at 9."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(30, 4), nn.Embedding(9, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        steps = torch.arange(ids.shape[1], device=ids.device)
        hidden = self.table(ids) + self.positions(steps)
        return {"hidden": hidden * mask.unsqueeze(-1), "nothing": None, "count": mask.sum(-1)}


class Pairs(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, 2, 3).sum(1)


def shapes(found: Any) -> list[tuple[int, ...]]:
    return [next(iter(case.inputs.values())).shape for case in found.cases]


@pytest.fixture(scope="module")
def tokens() -> Any:
    ids, mask = torch.arange(10).reshape(2, 5) + 3, torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    axes = {0: "batch", 1: "seq"}
    return seeded(Tokens), trace(seeded(Tokens), (ids, mask), (axes, axes)), [ids, mask]


def test_three_shapes_the_examples_first_then_batch_one_then_larger() -> None:
    found = check_vectors(mlp_graph(), [randn(3, 5, 8)])
    assert shapes(found) == [(3, 5, 8), (1, 2, 8), (4, 8, 8)]
    assert found.notes == ()


def test_inputs_repeat_the_examples_values(tokens: Any) -> None:
    _, graph, examples = tokens
    found = check_vectors(graph, examples)
    assert set(found.cases[0].inputs) == {"ids", "mask"}
    first, small, large = (case.inputs["ids"] for case in found.cases)
    assert first.tolist() == examples[0].tolist()
    assert small.tolist() == examples[0][:1, :2].tolist()
    assert large.tolist() == [[*row, *row[:3]] for row in (first[0].tolist(), first[1].tolist(), first[0].tolist())]
    assert [case.inputs["mask"].shape for case in found.cases] == [case.inputs["ids"].shape for case in found.cases]


def test_outputs_are_torchs(tokens: Any) -> None:
    module, graph, examples = tokens
    for case in check_vectors(graph, examples).cases:
        expected = module(*(torch.from_numpy(value) for value in case.inputs.values()))
        assert set(case.outputs) == {"hidden", "count"}, "an output that is None has no value to compare"
        # The graph runs the same kernels on the same numbers.
        np.testing.assert_array_equal(case.outputs["hidden"], expected["hidden"].detach().numpy())
        np.testing.assert_array_equal(case.outputs["count"], expected["count"].numpy())
        assert case.outputs["count"].dtype == np.int64


def test_a_static_model_has_one_case() -> None:
    x = randn(3, 5, 8)
    found = check_vectors(trace(seeded(Mlp), (x,)), [x])
    assert shapes(found) == [(3, 5, 8)]


def test_ranges_are_kept() -> None:
    graph = replace(mlp_graph(), ranges={"batch": Range(2, 3), "seq": Range(4, 6)})
    assert shapes(check_vectors(graph, [randn(3, 5, 8)])) == [(3, 5, 8), (2, 4, 8), (3, 6, 8)]


def test_equal_shapes_are_one_case() -> None:
    graph = replace(mlp_graph(), ranges={"batch": Range(3, 3), "seq": Range(5, 5)})
    assert shapes(check_vectors(graph, [randn(3, 5, 8)])) == [(3, 5, 8)]


def test_a_shape_at_which_the_model_fails_is_noted(tokens: Any) -> None:
    """8 positions fit, 5 + 3 = 8 do; a longer example meets the end of the table."""
    _, graph, _ = tokens
    ids = torch.arange(16).reshape(2, 8)
    found = check_vectors(graph, [ids, torch.ones_like(ids)])
    assert shapes(found) == [(2, 8), (1, 4)]
    assert len(found.notes) == 1
    assert found.notes[0].startswith("not checked at batch = 3, seq = 11: the model itself fails there (")


def test_the_example_itself_must_run(tokens: Any) -> None:
    _, graph, _ = tokens
    ids = torch.arange(20).reshape(2, 10)
    with pytest.raises((IndexError, RuntimeError)):
        check_vectors(graph, [ids, torch.ones_like(ids)])


def test_axes_that_are_a_multiple() -> None:
    """An exported program may demand 2*h rows; the symbol's own size follows from the shape. torch gives h the lower bound 2."""
    half = torch.export.Dim("h")
    program = torch.export.export(Pairs(), (randn(6, 3),), dynamic_shapes=({0: 2 * half},))
    found = check_vectors(trace(program, (randn(6, 3),)), [randn(6, 3)])
    assert shapes(found) == [(6, 3), (4, 3), (8, 3)]
    assert [case.outputs["output"].shape for case in found.cases] == [(3, 3), (2, 3), (4, 3)]


def test_meta_weights_cannot_answer() -> None:
    graph = trace(Mlp().to("meta"), {"x": randn(3, 5, 8)})
    with pytest.raises(InputError, match="meta device"):
        check_vectors(graph, [randn(3, 5, 8)])


# ---- half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_answers_in_float32(dtype: torch.dtype) -> None:
    module, x = seeded(Mlp).to(dtype), randn(3, 5, 8).to(dtype)
    graph = trace(module, (x,))
    case = check_vectors(graph, [x]).cases[0]
    exact = module.double()(x.double()).detach().numpy()  # the same stored weights, without rounding on the way
    assert case.outputs["output"].dtype == case.inputs["x"].dtype == np.float32
    # 24 products of numbers near 1, each rounded at 6e-8.
    np.testing.assert_allclose(case.outputs["output"], exact, atol=24 * 6e-8 * np.abs(exact).max())


def test_keep_answers_in_the_models_own_precision() -> None:
    module, x = seeded(Mlp).half(), randn(3, 5, 8).half()
    case = check_vectors(trace(module, (x,)), [x], "keep").cases[0]
    assert case.outputs["output"].dtype == np.float16
    np.testing.assert_array_equal(case.outputs["output"], module(x).detach().numpy())


def test_bfloat16_is_written_as_float32() -> None:
    module, x = seeded(Mlp).bfloat16(), randn(3, 5, 8).bfloat16()
    case = check_vectors(trace(module, (x,)), [x], "keep").cases[0]
    np.testing.assert_array_equal(case.outputs["output"], module(x).float().detach().numpy())


def test_casts_inside_are_widened_too() -> None:
    class Casts(nn.Module):
        def forward(self, x: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
            low = torch.zeros(3, dtype=torch.float16) + x.half()
            return torch.cond(flag.sum() > 0, lambda v: v.to(torch.bfloat16).float() + 1, lambda v: v.float() * 2, (low,))

    x = torch.tensor([1.0 + 2**-12, 3.0, 5.0])  # 2^-12 is below the 11 digits of float16
    graph = trace(Casts(), (x, torch.ones(1)))
    [plain] = evaluate(graph, [x, torch.ones(1)])
    [wide] = evaluate(widened(graph), [x, torch.ones(1)])
    assert plain.tolist() == [2.0, 4.0, 6.0]
    assert wide.tolist() == [2.0 + 2**-12, 4.0, 6.0]


def test_a_float32_graph_is_left_as_it_is() -> None:
    graph = mlp_graph()
    assert widened(graph) is graph


def test_what_is_made_out_of_nothing_is_widened_too() -> None:
    class Made(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            grid = torch.linspace(0, 1, 3) + torch.ones(3) / 3 + torch.full((3,), 0.1)
            return nn.functional.linear(x, torch.eye(3) + torch.zeros(3), grid) + torch.arange(3)

    x = torch.tensor([[1.0, 2.0, 3.0]])
    graph = trace(Made(), (x,))
    [wide] = evaluate(widened(graph, torch.float64), [x.double()])
    assert wide.dtype == torch.float64
    exact = np.array([1.0, 2.0, 3.0]) + np.linspace(0, 1, 3) + 1 / 3 + 0.1 + np.arange(3)
    assert np.abs(wide.numpy()[0] - exact).max() <= 1e-15 * 8  # float64 from its first operation on
    [plain] = evaluate(graph, [x])
    assert np.abs(plain.numpy()[0] - exact).max() > 1e-9
