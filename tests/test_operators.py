"""Every operator that `torch.onnx.export` (default decompositions) exports, this exports too.

By name: what its registry or its table of decompositions knows is known here. By run, in the full grid: torch's own first sample of each
operator that has no translation for every overload, traced, lowered and run; what torch's exporter takes of it and we do not is in `LEFT`.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import sys
import types
import unittest
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch._decomp import decomposition_table
from torch.onnx._internal.exporter import _decomp, _registration
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from matmorph.errors import ExportError, InputError, TraceError
from matmorph.exporters.onnx.lowering import _Library
from matmorph.exporters.onnx.onnx_model import export_onnx
from matmorph.ir.tracing.trace import trace
from matmorph.specs.schema import Export

OPSET = 21

ROUNDING = 1e-3
"""Relative to max(1, |y|): float32 samples of up to a few hundred terms; digamma and the like lose four digits near their poles."""

RANDOM = frozenset("bernoulli cauchy exponential geometric log_normal normal uniform".split())
"""Operators that draw numbers into their operand: nothing to compare."""

_WRITES = "it writes new running statistics into its operands, as in training: a compiled copy would not answer the same twice"
LEFT = {
    "argwhere": "the shape of its result is a matter of its operand's values",
    "unique": "the shape of its result is a matter of its operand's values",
    "tensor_split": "its sizes are the values of a tensor: no shape of the result follows from those of the operands",
    "_batch_norm_with_update": _WRITES,
}
"""Operators that torch's exporter takes and we do not, with the reason."""


@pytest.fixture(scope="module")
def registry() -> _registration.ONNXRegistry:
    logging.disable(logging.WARNING)  # it says that torchvision is not installed
    try:
        return _registration.ONNXRegistry.from_torchlib(OPSET)
    finally:
        logging.disable(logging.NOTSET)


def test_every_translation_of_the_registry_is_known(registry: _registration.ONNXRegistry) -> None:
    library = _Library(OPSET, {})
    found = [metas[0].fx_target for metas in registry.functions.values()]
    assert len(found) > 450
    assert [str(target) for target in found if not library.knows(target)] == []


def test_every_decomposition_of_its_table_is_made(registry: _registration.ONNXRegistry) -> None:
    """By torch's own table, which `prepare` takes in full, or, for a composite, by its kernel."""
    library = _Library(OPSET, {})
    table = _decomp.create_onnx_friendly_decomposition_table(set(_decomp.get_onnx_implemented_overloads(registry)))
    assert len(table) > 1000
    left = [op for op in table if not (library.knows(op) or op in decomposition_table or _is_composite(op))]
    assert [str(op) for op in left] == []


def _is_composite(op: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd"))


BY_VALUE = """
aten._local_scalar_dense.default aten._unique.default aten._unique2.default aten.allclose.default aten.bincount.default aten.equal.default
aten.index.Tensor aten.nonzero.default aten.repeat_interleave.Tensor aten.unique_consecutive.default aten.unique_dim.default
"""
"""Of the registry: results whose shape is a matter of values (`index` with a boolean mask), or which are numbers that follow from values.
The trace refuses shapes of that kind, with the line of the model."""


def test_shapes_that_depend_on_values_are_all_that_the_trace_refuses(registry: _registration.ONNXRegistry) -> None:
    tags = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
    targets = [metas[0].fx_target for metas in registry.functions.values()]
    found = {str(target) for target in targets if tags.intersection(getattr(target, "tags", ()))}
    assert found == set(BY_VALUE.split())


# ---- by run


class Sample(nn.Module):
    """One call of an operator; its tensors are the inputs, the rest is fixed."""

    def __init__(self, op: Any, leaves: Sequence[Any], spec: TreeSpec) -> None:
        super().__init__()
        self.op, self.leaves, self.spec = op, tuple(leaves), spec
        self.places = tuple(place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.places, tensors, strict=True))
        args, kwargs = tree_unflatten([given.get(place, leaf) for place, leaf in enumerate(self.leaves)], self.spec)
        return tuple(leaf for leaf in tree_flatten(self.op(*args, **kwargs))[0] if isinstance(leaf, Tensor))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(self.leaves[place] for place in self.places)


def infos() -> list[Any]:
    """torch's descriptions of operators, but for those of which every overload has a translation of its own."""
    stand_in = types.ModuleType("expecttest")  # torch's test utilities import it, for what is not used here
    stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
    sys.modules.setdefault("expecttest", stand_in)
    from torch.testing._internal.common_methods_invocations import op_db

    library = _Library(OPSET, {})

    def is_translated(info: Any) -> bool:
        packet = getattr(torch.ops.aten, info.aten_name, None)
        return packet is not None and all(library.knows(getattr(packet, name)) for name in packet.overloads() if "out" not in name)

    return [info for info in op_db if info.name not in RANDOM and not is_translated(info)]


def samples() -> Iterator[tuple[str, Sample]]:
    for info in infos():
        name = f"{info.name}.{info.variant_test_name}" if info.variant_test_name else info.name
        with contextlib.suppress(Exception), quiet():  # some need a library or a device that is not here
            sample = first_sample(info)
            if sample is not None:
                sample(*sample.tensors)
                yield name, sample


def first_sample(info: Any) -> Sample | None:
    samples = iter(info.sample_inputs("cpu", torch.float32, requires_grad=False))
    try:
        for sample in samples:
            found = Sample(info.op, *tree_flatten(((sample.input, *sample.args), sample.kwargs)))
            if found.tensors and all(tensor.numel() and tensor.layout == torch.strided for tensor in found.tensors):
                return found
        return None
    finally:  # now, with those inside of it, and not when they are collected, which may be in the middle of a trace
        if isinstance(samples, types.GeneratorType):
            samples.close()
        gc.collect()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def agrees(path: Path, names: Sequence[str | None], sample: Sample) -> bool:
    """Whether ONNX Runtime answers as torch does. A file that it does not load does not agree."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        given = {name: tensor.numpy() for name, tensor in zip(names, sample.tensors, strict=True)}
        results = session.run(None, {entry.name: given[entry.name] for entry in session.get_inputs()})
    except Exception:
        return False
    expected = [wanted.float() if wanted.dtype == torch.bfloat16 else wanted for wanted in sample(*sample.tensors)]  # numpy has none
    return all(
        got.shape == tuple(wanted.shape) and np.allclose(got, wanted.numpy(), rtol=ROUNDING, atol=ROUNDING, equal_nan=True)
        for got, wanted in zip(results, expected, strict=True)
    )


def exported(sample: Sample, folder: Path) -> bool:
    """By us; what we do not take is an error that a user may see."""
    try:
        info = export_onnx(trace(sample, sample.tensors), folder, Export(opset=OPSET))
    except (ExportError, InputError, TraceError):
        return False
    return agrees(folder / "model.onnx", [entry.name for entry in info.inputs], sample)


def exported_by_torch(sample: Sample, folder: Path) -> bool:
    try:
        with quiet():
            program = torch.onnx.export(sample, sample.tensors, dynamo=True, optimize=False, verbose=False, opset_version=OPSET)
            assert program is not None
            program.save(folder / "torch.onnx")
    except Exception:
        return False
    return agrees(folder / "torch.onnx", [value.name for value in program.model.graph.inputs], sample)


WRITTEN_IN_PLACE = {
    "nanmean": lambda x: torch.ops.aten.nanmean.default(x, [1]),
    "pool": lambda x: nn.functional.adaptive_avg_pool1d(x.mT, 1),
    "classes": lambda x: nn.functional.one_hot((x > 0).long(), 3),
    "many results": lambda x: torch.ops.aten.var_mean.default(x),
}


@pytest.mark.parametrize("name", WRITTEN_IN_PLACE)
def test_decompositions_that_write_check_or_have_many_results(name: str, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert exported(Sample(WRITTEN_IN_PLACE[name], *tree_flatten(((x,), {}))), tmp_path)


def test_a_formula_that_fails_names_its_operator(tmp_path: Path) -> None:
    x, part = torch.zeros(3, 3), torch.ones(3)
    with pytest.raises(ExportError, match=r"operator aten.diagonal_scatter.default has no ONNX translation"):
        export_onnx(trace(Sample(torch.diagonal_scatter, *tree_flatten(((x, part), {}))), (x, part)), tmp_path, Export())


@pytest.mark.full
def test_what_torch_exports_we_export(tmp_path: Path) -> None:
    seen, failing = 0, []
    for name, sample in samples():
        seen += 1
        if not exported(sample, tmp_path) and exported_by_torch(sample, tmp_path):
            failing.append(name)
    assert seen > 300, "torch has described its operators in another way"
    assert sorted(failing) == sorted(LEFT)


@pytest.mark.parametrize(
    ("function", "name"),
    [(lambda x: torch.stft(x, 10, window=torch.ones(10), return_complex=True), "output_0"), (lambda x: torch.fft.fft(x), "output_0")],
    ids=["stft", "fft"],
)
def test_complex_results_are_refused_with_what_to_return_instead(function: Any, name: str, tmp_path: Path) -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    sample = Sample(function, *tree_flatten(((x,), {})))
    with pytest.raises(ExportError, match=f"{name} is complex64, and ONNX Runtime takes and gives real numbers"):
        export_onnx(trace(sample, (x,)), tmp_path, Export())
    real = Sample(lambda x: torch.view_as_real(function(x)), *tree_flatten(((x,), {})))
    assert exported(real, tmp_path)


SECOND_NAMES = {
    "divide": lambda x: torch.ops.aten.divide.Tensor(x, (x > 0).long().sum() + 1),
    "true_divide": lambda x: torch.ops.aten.true_divide.Tensor(x, (x > 0).long().sum() + 1),
    "multiply": lambda x: torch.ops.aten.multiply.Tensor(x, (x > 0).long()),
    "subtract": lambda x: torch.ops.aten.subtract.Tensor(x, (x > 0).long(), alpha=2),
    "greater": lambda x: torch.ops.aten.greater.Tensor(x, (x > 0).long()).float(),
    "not_equal": lambda x: torch.ops.aten.not_equal.Scalar(x, 0).float(),
}


@pytest.mark.parametrize("name", SECOND_NAMES)
def test_second_names_of_operators_and_mixed_types(name: str, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert exported(Sample(SECOND_NAMES[name], *tree_flatten(((x,), {}))), tmp_path)


BAGS = {
    "bags of three": ((torch.tensor([[0, 5, 2], [3, 3, 1]]),), {}),
    "offsets, one empty": ((torch.tensor([4, 1, 2, 2, 5]), torch.tensor([0, 2, 2])), {}),
    "with the end": ((torch.tensor([4, 1, 2, 2, 5]), torch.tensor([0, 3, 5])), {"include_last_offset": True}),
    "padding": ((torch.tensor([4, 1, 2, 2, 5]), torch.tensor([0, 2])), {"padding_idx": 2}),
}


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("name", BAGS)
def test_bags_of_embeddings(name: str, mode: str, tmp_path: Path) -> None:
    (ids, *offsets), settings = BAGS[name]
    table = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    wanted = nn.functional.embedding_bag

    def bags(table: torch.Tensor, ids: torch.Tensor, *offsets: torch.Tensor) -> torch.Tensor:
        return wanted(ids, table, *offsets, mode=mode, **settings)

    assert exported(Sample(bags, *tree_flatten(((table, ids, *offsets), {}))), tmp_path)


def test_weighted_bags_of_embeddings(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    table, each, ids = torch.randn(6, 3, generator=draw), torch.randn(2, 3, generator=draw), torch.tensor([[0, 5, 2], [3, 3, 1]])

    def bags(table: torch.Tensor, ids: torch.Tensor, each: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding_bag(ids, table, mode="sum", per_sample_weights=each)

    assert exported(Sample(bags, *tree_flatten(((table, ids, each), {}))), tmp_path)
