"""Losses against torch.nn.functional, labels that do not count, functions of one's own, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import pytest
import torch
from differentiating import distance, evaluated, feeds_of, parameters_of, torch_loss
from exporting import seeded
from torch import Tensor, nn
from torch.nn import functional

from matmorph.errors import InputError
from matmorph.ir.core import Graph
from matmorph.ir.tracing.trace import trace
from matmorph.ir.training import losses
from matmorph.ir.training.gradient import gradient_graph, loss_graph
from matmorph.ir.training.losses import Loss, label_inputs
from matmorph.ir.types import TensorType, symbol
from matmorph.ir.verify import verify
from matmorph.runtime.format.distillation import Distill

ROUNDING = 1e-12  # of float64 sums of at most a hundred terms of size 1
BATCH, SEQ = symbol("batch"), symbol("seq")


class Two(nn.Module):
    """Outputs `logits` [batch, seq, 5] and `pooled` [batch, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.pool = nn.Linear(6, 5), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.token(x), "pooled": self.pool(x.mean(1))}


@cache
def graph(dtype: torch.dtype = torch.float64) -> Graph:
    return trace(seeded(Two).to(dtype), {"x": x_of(3, 4).to(dtype)}, {"x": {0: "batch", 1: "seq"}})


def x_of(batch: int, seq: int) -> Tensor:
    return torch.randn(batch, seq, 6, generator=torch.Generator().manual_seed(batch * 10 + seq), dtype=torch.float64)


def classes(*shape: int, ignore: int = -100) -> Tensor:
    found = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(1))
    found.view(-1)[::3] = ignore
    return found


def answer(loss: Loss, labels: Mapping[str, Tensor], batch: int = 3, seq: int = 4) -> dict[str, Tensor]:
    """loss, count and gradient; the loss graph must agree with the gradient graph."""
    source = graph()
    consts = parameters_of(source)
    found, judged = gradient_graph(source, consts, loss), loss_graph(source, consts, loss)
    feeds = feeds_of(source, consts, [x_of(batch, seq)], labels)
    results, plain = evaluated(found, feeds), evaluated(judged, {name: feeds[name] for name in feeds if name != "loss_scale"})
    assert torch.equal(results["loss"], plain["loss"])
    assert torch.equal(results["count"], plain["count"])
    return results


def of_torch(loss: Loss, labels: Tensor, batch: int = 3, seq: int = 4) -> tuple[Tensor, Tensor]:
    module = seeded(Two).double()
    value = torch_loss(loss.name, module(x_of(batch, seq))[loss.output or "logits"], labels, loss.ignore_index)
    found = torch.autograd.grad(value, list(module.parameters()), allow_unused=True)
    pairs = zip(module.parameters(), found, strict=True)
    return value.detach(), torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in pairs])


def float_labels(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss", "labels", "count"),
    [
        (Loss("cross_entropy"), classes(3, 4), 8),
        (Loss("cross_entropy", "logits", ignore_index=2), classes(3, 4, ignore=2), None),
        (Loss("cross_entropy", "pooled"), classes(3) % 4, 3),
        (Loss("causal_lm"), classes(3, 4), 6),
        (Loss("mse", "logits"), float_labels(3, 4, 5), 60),
        (Loss("mse", "pooled"), float_labels(3, 4), 12),
        (Loss("cosine", "logits"), float_labels(3, 4, 5), 12),
        (Loss("cosine", "pooled"), float_labels(3, 4), 3),
    ],
)
def test_loss_and_gradient_are_those_of_torch(loss: Loss, labels: Tensor, count: int | None) -> None:
    results = answer(loss, {"labels": labels})
    value, gradient = of_torch(loss, labels)
    assert abs(results["loss"] - value) <= ROUNDING
    assert distance(results["grad"], gradient) <= ROUNDING
    assert results["count"].item() == (count if count is not None else int((labels != loss.ignore_index).sum()))
    assert {results[name].dim() for name in ("loss", "count")} == {0}


@pytest.mark.parametrize("name", ["cross_entropy", "causal_lm", "mse", "cosine", "distill"])
def test_graphs_of_a_loss_obey_the_laws(name: str) -> None:
    source = graph(torch.float32)
    verify(gradient_graph(source, parameters_of(source), Loss(name, distill=Distill(top=2))))
    verify(loss_graph(source, parameters_of(source), Loss(name, distill=Distill(top=2))))


@pytest.mark.parametrize("name", ["cross_entropy", "causal_lm"])
def test_nothing_to_judge_is_zero(name: str) -> None:
    results = answer(Loss(name), {"labels": torch.full((3, 4), -100)})
    assert results["loss"] == 0
    assert results["count"] == 0
    assert torch.count_nonzero(results["grad"]) == 0


def test_causal_lm_of_one_token_has_nothing_to_judge() -> None:
    results = answer(Loss("causal_lm"), {"labels": torch.tensor([[1], [2]])}, batch=2, seq=1)
    assert (results["loss"], results["count"], torch.count_nonzero(results["grad"])) == (0, 0, 0)


def test_first_label_of_causal_lm_does_not_count() -> None:
    labels = classes(3, 4)
    other = labels.clone()
    other[:, 0] = 4
    first, second = (answer(Loss("causal_lm"), {"labels": given}) for given in (labels, other))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_cosine_of_nothing_has_a_finite_gradient() -> None:
    results = answer(Loss("cosine", "pooled"), {"labels": torch.zeros(3, 4, dtype=torch.float64)})
    assert results["loss"] == 1
    assert torch.isfinite(results["grad"]).all()


def weighted(outputs: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A weighted mean over two outputs at once."""
    terms = (outputs["pooled"] - labels["targets"]) ** 2 + outputs["logits"].mean((1, 2)).unsqueeze(-1)
    return (terms * labels["weights"].unsqueeze(-1)).sum() / labels["weights"].sum(), labels["weights"].sum()


WEIGHTED = {"targets": TensorType("float64", (BATCH, 4)), "weights": TensorType("float64", (BATCH,))}


def test_a_function_is_a_loss() -> None:
    labels = {"targets": float_labels(3, 4), "weights": torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)}
    results = answer(Loss("function", function=weighted, labels=WEIGHTED), labels)
    module = seeded(Two).double()
    value, count = weighted(module(x_of(3, 4)), labels)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(module.parameters()))])
    assert abs(results["loss"] - value.detach()) <= ROUNDING
    assert results["count"] == count == 3.5
    assert distance(results["grad"], gradient) <= ROUNDING


def test_a_function_without_a_count_counts_as_one() -> None:
    loss = Loss(
        "function", function=lambda outputs, labels: functional.l1_loss(outputs["pooled"], labels["y"]), labels={"y": WEIGHTED["targets"]}
    )
    labels = float_labels(2, 4)
    results = answer(loss, {"y": labels}, batch=2, seq=5)
    assert results["count"] == 1
    expected = functional.l1_loss(seeded(Two).double()(x_of(2, 5))["pooled"], labels)
    assert abs(results["loss"] - expected.detach()) <= ROUNDING


def test_label_inputs_follow_the_output() -> None:
    source = graph(torch.float32)
    assert label_inputs(Loss("causal_lm"), source) == (("labels", TensorType("int64", (BATCH, SEQ))),)
    assert label_inputs(Loss("cross_entropy", "pooled"), source) == (("labels", TensorType("int64", (BATCH,))),)
    assert label_inputs(Loss("mse", "pooled"), source) == (("labels", TensorType("float32", (BATCH, 4))),)
    assert label_inputs(Loss("function", function=weighted, labels=WEIGHTED), source) == tuple(WEIGHTED.items())


def test_loss_of_half_precision_is_computed_in_float32() -> None:
    source = graph(torch.float16)
    found = gradient_graph(source, parameters_of(source), Loss("cross_entropy"))
    assert {str(value.type) for value in found.outputs[:2]} == {"float32[]"}
    assert str(label_inputs(Loss("mse", "pooled"), source)[0][1]) == "float32[batch, 4]"


# the distillation loss

TAUGHT = Distill(top=2, temperature=2.0, next_token=0.25)


def teacher_answers(batch: int, seq: int, settings: Distill, words: int = 5) -> tuple[Tensor, dict[str, Tensor]]:
    """A teacher's logits, and what the loss is given of them, by the definition."""
    logits = 3 * torch.randn(batch, seq, words, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    shares = torch.softmax(logits / settings.temperature, -1)
    ids = shares.argsort(-1, descending=True)[..., : settings.top]
    named = shares.gather(-1, ids)
    return logits, {"teacher_ids": ids, "teacher_logs": torch.cat([named, 1 - named.sum(-1, keepdim=True)], -1).log()}


def distilled(student: Tensor, labels: Mapping[str, Tensor], settings: Distill) -> Tensor:
    """The loss place by place and word by word, as it is defined."""
    total, counted = student.new_zeros(()), 0
    for row in range(student.shape[0]):
        for place in range(student.shape[1] - 1):
            wanted = int(labels["labels"][row, place + 1])
            if wanted == -100:
                continue
            q = torch.softmax(student[row, place] / settings.temperature, -1)
            ids = [int(word) for word in labels["teacher_ids"][row, place]]
            p = labels["teacher_logs"][row, place].exp()
            rest = sum(q[word] for word in range(len(q)) if word not in ids)
            kl = sum(p[k] * (p[k] / q[word]).log() for k, word in enumerate(ids)) + p[-1] * (p[-1] / rest).log()
            cross = -torch.log_softmax(student[row, place], -1)[wanted]
            total = total + (1 - settings.next_token) * settings.temperature**2 * kl + settings.next_token * cross
            counted += 1
    return total / counted


@pytest.mark.parametrize("settings", [Distill(top=2), Distill(top=4), TAUGHT], ids=["plain", "all but one", "warm and mixed"])
def test_distillation_and_its_gradient_are_by_the_definition(settings: Distill) -> None:
    labels = {"labels": classes(3, 4), **teacher_answers(3, 4, settings)[1]}
    results = answer(Loss("distill", distill=settings), labels)
    module = seeded(Two).double()
    value = distilled(module(x_of(3, 4))["logits"], labels, settings)
    found = torch.autograd.grad(value, list(module.parameters()), allow_unused=True)
    pairs = zip(module.parameters(), found, strict=True)
    gradient = torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in pairs])
    assert abs(results["loss"] - value.detach()) <= ROUNDING
    assert distance(results["grad"], gradient) <= ROUNDING
    assert results["count"] == 6


def test_distillation_from_all_but_one_word_is_the_whole_divergence() -> None:
    """With one word in the rest nothing is summed up: KL(teacher || student) of the whole vocabulary."""
    settings = Distill(top=4)
    logits, given = teacher_answers(3, 4, settings)
    results = answer(Loss("distill", distill=settings), {"labels": torch.zeros(3, 4, dtype=torch.int64), **given})
    student = torch.log_softmax(seeded(Two).double()(x_of(3, 4))["logits"], -1)[:, :-1]
    kl = functional.kl_div(student, torch.log_softmax(logits, -1)[:, :-1], log_target=True, reduction="sum") / 9
    assert abs(results["loss"] - kl.detach()) <= ROUNDING


def test_a_student_like_its_teacher_has_nothing_to_learn() -> None:
    settings = Distill(top=3)
    logits = seeded(Two).double()(x_of(3, 4))["logits"].detach()
    ids = logits.argsort(-1, descending=True)[..., :3]
    named = torch.softmax(logits, -1).gather(-1, ids)
    given = {"teacher_ids": ids, "teacher_logs": torch.cat([named, 1 - named.sum(-1, keepdim=True)], -1).log()}
    results = answer(Loss("distill", distill=settings), {"labels": torch.zeros(3, 4, dtype=torch.int64), **given})
    assert abs(results["loss"]) <= ROUNDING
    assert results["grad"].abs().max() <= ROUNDING


def test_a_student_far_from_its_teacher_has_a_finite_gradient() -> None:
    """Its share of the rest is below what float32 holds, the teacher's is nearly one."""
    far = Loss("distill", distill=Distill(top=2))
    source = graph(torch.float32)
    consts = parameters_of(source)
    logs = torch.tensor([1e-4, 1e-4, 0.9998]).log().expand(3, 4, 3).contiguous()
    labels = {"labels": torch.zeros(3, 4, dtype=torch.int64), "teacher_ids": torch.tensor([0, 1]).expand(3, 4, 2), "teacher_logs": logs}
    feeds = feeds_of(source, consts, [1e4 * x_of(3, 4).float()], labels)
    results = evaluated(gradient_graph(source, consts, far), feeds)
    assert torch.isfinite(results["loss"])
    assert torch.isfinite(results["grad"]).all()


def fails(outputs: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> Tensor:
    raise ValueError("no such thing")


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            Loss("cross_entropi"),
            "there is no loss cross_entropi; there are cross_entropy, causal_lm, mse, cosine, distill; did you mean cross_entropy?",
        ),
        (Loss("mse", "pooledd"), "the model has no output pooledd; its outputs are logits, pooled; did you mean pooled?"),
        (Loss("causal_lm", "pooled"), r"causal_lm needs logits \[batch, seq, vocabulary\]; output pooled is float64\[batch, 4\]"),
        (Loss("mse", labels=WEIGHTED), "the labels of mse follow from its output"),
        (Loss("distill", "pooled"), r"distill needs logits \[batch, seq, vocabulary\]; output pooled is float64\[batch, 4\]"),
        (Loss("distill", distill=Distill(top=5)), r"distill.top is 5 and the model has 5 words: at least one must be left"),
        (Loss("function"), "a loss of the name function needs one"),
        (Loss("function", function=fails), "the loss function cannot be traced: no such thing"),
        (Loss("function", function=lambda outputs, labels: outputs["pooled"]), "a loss function gives a scalar tensor"),
        (Loss("function", function=weighted, labels={"x": WEIGHTED["targets"]}), "the model has an input x of its own"),
    ],
)
def test_refusals(loss: Loss, message: str) -> None:
    source = graph()
    with pytest.raises(InputError, match=message):
        gradient_graph(source, parameters_of(source), loss)


def test_output_must_be_named_where_several_would_do() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> dict[str, Tensor]:
            return {"a": x * w, "b": (x * 2).long()}

    source = trace(Both(), {"x": torch.ones(2, 3), "w": torch.ones(3)})
    with pytest.raises(InputError, match="the loss needs to know which output it looks at: one of a, b"):
        label_inputs(Loss("mse"), source)
    with pytest.raises(InputError, match=r"mse needs a floating-point output; output b is int64\[2, 3\]"):
        label_inputs(Loss("mse", "b"), source)


def test_a_missing_count_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant that forgets 1 / count."""
    monkeypatch.setattr(losses, "_ratio", lambda b, total, count: total)
    labels = classes(3, 4)
    results = answer(Loss("cross_entropy"), {"labels": labels})
    assert abs(results["loss"] - of_torch(Loss("cross_entropy"), labels)[0]) > 1
