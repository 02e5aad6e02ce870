"""The law of `inspect`: every parameter of two or more axes that a product reads is there, as a site or with the reason why not."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, PARAMETERS, product_parameters
from torch import nn

import matmorph as mm
from matmorph.report.model import Report
from matmorph.report.table import make_console, print_inspect


def accounted(report: Report) -> set[str]:
    return {name for row in report.sites if row.form != "embedding" for name in row.weights}


def check(report: Report, module: nn.Module, more: tuple[str, ...] = ()) -> None:
    """Neither more nor less, but for buffers and vectors that a weight is computed from."""
    wanted = {*product_parameters(module), *more}
    large = {name for name, parameter in module.named_parameters() if parameter.dim() > 1}
    assert accounted(report) & (large | wanted) == wanted
    listed = [row for row in report.sites if row.form in ("conv", "recurrent", "product")]
    assert all(row.reason for row in listed)
    assert len({row.path for row in report.sites}) == len(report.sites)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_matrix_is_accounted_for(name: str) -> None:
    build, example = FAMILIES[name]
    torch.manual_seed(0)
    module = build().eval()
    inner = getattr(getattr(module, "_orig_mod", module), "module", module)
    axes = None if name == "odd" else ({0: "batch"},)  # multi_dot chooses its order by the sizes
    check(mm.inspect_model(module, (example(),), axes), inner, PARAMETERS.get(name, ()))


def test_reasons() -> None:
    """What `inspect` says of what no method takes."""
    torch.manual_seed(0)
    build, example = FAMILIES["odd"]
    found = {row.path: row.reason for row in mm.inspect_model(build().eval(), (example(),)).sites}
    chain = "linalg_multi_dot multiplies it in a form that is not read as rows times a matrix"
    assert found == {
        "bilinear": "bilinear multiplies it in a form that is not read as rows times a matrix",
        "spread": "the kernel of a transposed convolution (2 pixels) spreads its input",
        "first": chain,
        "second": chain,
        "outer": "einsum multiplies it in a form that is not read as rows times a matrix",
    }


def test_what_a_terminal_shows(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    build, example = FAMILIES["convnext"]
    print_inspect(make_console(), mm.inspect_model(build().eval(), (example(),)))
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no method")]
    assert told == [
        f"no method takes 1 of form conv: {reason}"
        for reason in (
            "a kernel of 4 x 4 pixels is multiplied at every place that it slides to",
            "a convolution in 8 groups multiplies each group of channels by a part of its kernel (3 x 3 pixels)",
        )
    ]


def test_a_rule_for_matmuls_leaves_out_what_is_listed() -> None:
    torch.manual_seed(0)
    build, example = FAMILIES["convnext"]
    rule = {"match": {"op": "matmul"}, "expect": 2, "rewrite": {"low_rank": {"rank": 2}}}
    kernels = {"match": {"op": "conv"}, "expect": 2, "rewrite": {"low_rank": {"rank": 2}}}
    rows = mm.plan(build().eval(), {"version": 1, "rules": [rule, kernels]}, (example(),)).sites
    assert [(row.path, row.status) for row in rows] == [
        ("patches", "rejected"),
        ("depth", "rejected"),
        ("a", "rewritten"),
        ("b", "rewritten"),
    ]
    assert rows[0].reason == "a kernel of 4 x 4 pixels is multiplied at every place that it slides to"
    assert rows[1].reason == "a convolution in 8 groups multiplies each group of channels by a part of its kernel (3 x 3 pixels)"


TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
WINDOWED = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
PICTURES = {
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "ConvNext": {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1]},
    "Swin": WINDOWED,
    "Swinv2": WINDOWED,
    "Dinov2": {**TINY, "image_size": 32, "patch_size": 8},
    "MobileNetV2": {"depth_multiplier": 0.25, "image_size": 64},
    "Segformer": {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 8},
}
TEXTS = {"Bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40}, "Falcon": {**TINY, "vocab_size": 40, "alibi": False}}
LARGE = ("MobileNetV2", "ResNet", "Segformer")


@pytest.mark.full
@pytest.mark.parametrize("family", [*PICTURES, *TEXTS])
def test_every_matrix_of_hugging_faces_families(family: str) -> None:
    """Tiny models with random weights, families that the zoo has not."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**PICTURES, **TEXTS}[family])
    module = getattr(transformers, f"{family}Model")(config).eval()
    generator = torch.Generator().manual_seed(1)
    side = 64 if family in LARGE else 32
    picture, tokens = torch.randn(2, 3, side, side, generator=generator), torch.randint(0, 40, (2, 5), generator=generator)
    report = mm.inspect_model(module, {"pixel_values": picture} if family in PICTURES else {"input_ids": tokens})
    assert product_parameters(module) - accounted(report) == set()
