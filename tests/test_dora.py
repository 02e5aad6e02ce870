"""dora: eq. 5 of the paper, the gradient that its authors take, rows without a direction, parameters; mutants."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from mutating import Mutant, mutated, unmutated
from rewriting import LINEAR, graph_of, rewritten, rule_of, run, weights_of
from updating import Case, Llama2, Parts, judged, noticed, trainable

import matmorph as mm
from matmorph.errors import SpecError
from matmorph.ir.text.printing import print_graph
from matmorph.passes.methods.dora.method import Dora, DoraSpec
from matmorph.specs.schema import MethodUse


def formula(w: np.ndarray, b: np.ndarray | None, parts: Parts, scale: float) -> tuple[np.ndarray, np.ndarray | None]:
    """W' = m (W + s B A) / |W + s B A|, row by row."""
    turned = w + scale * parts["up"].T @ parts["down"].T
    return np.stack([m * row / np.linalg.norm(row) for m, row in zip(parts["magnitude"], turned, strict=True)]), b


DORA = Case({"rank": 3, "alpha": 6}, formula, scale=2.0, inside=True)
METHODS = {"dora": Dora()}


def dora(**settings: Any) -> MethodUse:
    return MethodUse("dora", DoraSpec(**settings))


def test_golden_text() -> None:
    result, _ = rewritten(graph_of(LINEAR), rule_of(dora(rank=3, alpha=6)), methods=METHODS)
    ours = '@":Net/fc:Linear" layer=0 rule="all" location="s.yaml:3"'
    made = 'rule="all" site="fc" method="dora"'
    assert print_graph(result) == (
        "graph device=cpu\n"
        "range batch 1..\n"
        'input %x: float32[batch, 12] "x"\n'
        'parameter %fc.weight: float32[10, 12] "fc.weight" trainable\n'
        f'parameter %fc.dora.down: float32[12, 3] "fc.dora.down" trainable {made} part="down"\n'
        f'parameter %fc.dora.up: float32[3, 10] "fc.dora.up" trainable {made} part="up"\n'
        f'parameter %fc.dora.magnitude: float32[10] "fc.dora.magnitude" trainable {made} part="magnitude"\n'
        'parameter %fc.bias: float32[10] "fc.bias" trainable\n'
        f"%matmul: float32[12, 10] = aten.matmul.default(%fc.dora.down, %fc.dora.up) {ours}\n"
        f"%t: float32[10, 12] = aten.t.default(%matmul) {ours}\n"
        f"%mul: float32[10, 12] = aten.mul.Scalar(%t, 2.0) {ours}\n"
        f"%add: float32[10, 12] = aten.add.Tensor(%fc.weight, %mul) {ours}\n"
        f"%mul_1: float32[10, 12] = aten.mul.Tensor(%add, %add) {ours}\n"
        f"%sum: float32[10, 1] = aten.sum.dim_IntList(%mul_1, [1], True) {ours}\n"
        f"%add_1: float32[10, 1] = aten.add.Scalar(%sum, 1e-30) {ours}\n"
        f"%sqrt: float32[10, 1] = aten.sqrt.default(%add_1) {ours}\n"
        f"%detach: float32[10, 1] = aten.detach.default(%sqrt) {ours}\n"
        f"%unsqueeze: float32[10, 1] = aten.unsqueeze.default(%fc.dora.magnitude, 1) {ours}\n"
        f"%div: float32[10, 1] = aten.div.Tensor(%unsqueeze, %detach) {ours}\n"
        f"%mul_2: float32[10, 12] = aten.mul.Tensor(%add, %div) {ours}\n"
        f"%linear: float32[batch, 10] = aten.linear.default(%x, %mul_2, %fc.bias) {ours}\n"
        '%relu: float32[batch, 10] = aten.relu.default(%linear) @":Net"\n'
        'output %relu "output"\n'
    )


def test_the_magnitude_starts_as_the_norms_of_the_rows() -> None:
    result, _ = rewritten(graph_of(LINEAR), rule_of(dora(rank=2)), methods=METHODS)
    parts = {const.path: const.load() for const in result.state}
    norms = np.linalg.norm(weights_of(LINEAR)["fc.weight"].double().numpy(), axis=1)
    np.testing.assert_allclose(parts["fc.dora.magnitude"].numpy(), norms, rtol=1e-7)  # rounded once to float32
    assert not parts["fc.dora.up"].any()


def test_a_row_of_zeros_stays_zero() -> None:
    weights = {**weights_of(LINEAR), "fc.weight": weights_of(LINEAR)["fc.weight"].clone()}
    weights["fc.weight"][4] = 0
    graph = graph_of(LINEAR, weights)
    result, _ = rewritten(graph, rule_of(dora(rank=2)), methods=METHODS)
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    assert float((run(result, x)[0] - run(graph, x)[0]).abs().max()) < 1e-5  # float32 results of size 10


@pytest.mark.parametrize("through", [False, True])
def test_the_gradient_takes_the_norm_as_its_authors_do(through: bool) -> None:
    """Eq. 11: |V| is a constant of the gradient, but where `norm_gradient` asks for the whole. float64, torch's autograd of the formula."""
    net = torch.nn.Sequential(torch.nn.Linear(12, 10)).double()
    rule = {"match": {"op": "matmul"}, "rewrite": {"dora": {"rank": 3, "norm_gradient": through}}}
    x = torch.randn(7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = mm.compile(net, {"version": 1, "rules": [rule]}, (x,))
    g = torch.Generator().manual_seed(1)
    shapes = {name: parameter.shape for name, parameter in found.module.named_parameters() if "dora" in name}
    values = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    module = found.load_trained(values).module
    module(x).square().sum().backward()
    ours = {name: parameter.grad for name, parameter in module.named_parameters() if "dora" in name}
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    turned = net[0].weight.detach() + (leaves["0.dora.down"] @ leaves["0.dora.up"]).T
    norm = turned.norm(dim=1, keepdim=True)
    new = leaves["0.dora.magnitude"][:, None] * turned / (norm if through else norm.detach())
    (x @ new.T + net[0].bias.detach()).square().sum().backward()
    for name, leaf in leaves.items():
        assert float((ours[name] - leaf.grad).abs().max() / leaf.grad.abs().max()) < 1e-12, name


def test_settings_that_cannot_be() -> None:
    for settings, message in (
        ({"rank": 2, "rslora": True}, r"rslora scales alpha by sqrt\(rank\): give alpha"),
        ({"rnak": 2}, "did you mean rank"),
        ({"rank": 0}, "rank"),
    ):
        with pytest.raises(SpecError, match=message):
            mm.load_spec({"version": 1, "rules": [{"match": {"op": "matmul"}, "rewrite": {"dora": settings}}]})
    with pytest.raises(SpecError, match=r"fc: rank 11 is above min\(in, out\) = 10"):
        rewritten(graph_of(LINEAR), rule_of(dora(rank=11)), methods=METHODS)


def test_parameters_of_the_paper() -> None:
    """LLaMA-2-7B, queries, keys, values, up and down (table 1): LoRA of rank 32 is 0.83 % of the model and itself, DoRA 0.84 %, of half the
    rank 0.43 %."""
    modules, model = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"), 6_738_415_616
    lora = trainable(Llama2, {"lora": {"rank": 32}}, *modules)
    whole, half = (trainable(Llama2, {"dora": {"rank": rank, "alpha": 2 * rank}}, *modules) for rank in (32, 16))
    assert whole - lora == 32 * (4 * 4096 + 11008)  # a number per output
    assert [round(100 * count / (model + count), 2) for count in (lora, whole, half)] == [0.83, 0.84, 0.43]


MUTANTS = {
    "scale dropped from the graph": Mutant(
        "Dora.weight", "times(b, product, scale)", "product"
    ),
    "scale dropped from the merge": Mutant("Dora.merge", "float(parts.get('scale', 1.0))", "1.0"),
    "norms of columns": Mutant("Dora.weight", "[1]", "[0]"),
    "norms of columns in the merge": Mutant("Dora.merge", "turned.square().sum(1, keepdim=True)", "turned.square().sum(0, keepdim=True)"),
    "norm of the old weight": Mutant("Dora.merge", "turned.square()", "widened(parts['base']).square()"),
    "squares without a root": Mutant("Dora.weight", "b('aten.sqrt.default', b('aten.add.Scalar', squares, TINY))", "squares"),
    "length not divided": Mutant(
        "Dora.weight", "b('aten.div.Tensor', b('aten.unsqueeze.default', parts['magnitude'], 1), fixed)",
        "b('aten.unsqueeze.default', parts['magnitude'], 1)",
    ),
    "magnitude starts at one": Mutant("dora._norms", "torch.linalg.vector_norm(weight().double(), dim=1)", "torch.ones(shape)"),
    "up drawn instead of zero": Mutant("Dora.parts", "constant(0)", "constant(1)"),
    "bias lost": Mutant("InsideUpdate.build", "self.bias(site, b.bias(), consts, spec, b)", "None"),
    "dense kept beside": Mutant("InsideUpdate.build", "holds_dense=True", "holds_dense=False"),
}  # fmt: skip


def test_the_checks_pass_on_the_real_code() -> None:
    with unmutated(MUTANTS.values()) as m:
        assert all(judged(m, "Dora", DORA))


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(name: str) -> None:
    with mutated(MUTANTS[name]) as m:
        assert noticed(m, "Dora", DORA), name
