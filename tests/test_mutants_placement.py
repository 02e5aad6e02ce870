"""Mutants of how a node is looked up in a list of kernels: each finds one that ONNX Runtime would not, or misses one that it finds."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from mutating import Mutant, killer, mutated, unmutated
from onnx import TensorProto, helper

LIST = """ai.onnx F
 1 T S -> T
 9 T S -> T
 13 T S... -> S T
 own 1-9 T=float32
 own 13+ S=int64 T=float16
 own 13+ S=float32 T=float32
"""


def lookups(m: Any) -> None:
    found = m.read_kernels(LIST, "own")
    for opset, inputs, outputs, wanted in (
        (12, ["float32", "int8"], ["float32"], None),
        (12, ["float64", "int8"], ["float64"], "for T float64"),
        (13, ["float16", "float32"], [], "for S float32, T float16"),
        (13, ["float16", None, "float32"], [], None),
        (13, ["float16", "int64", "float32"], ["float32", "float16"], None),
        (20, ["float32", "float32"], [], None),
    ):
        assert found.lacks("", "F", opset, inputs, outputs) == wanted
    newer = m.read_kernels(LIST.replace(" own 1-9", " 17 T S -> T\n own 1-9"), "own")
    assert newer.lacks("", "F", 17, ["float32", "float32"], []) == "for version 17 of it"


def model(nodes: list[onnx.NodeProto], names: list[str], weights: tuple[str, ...] = ()) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in names]
    outputs = [helper.make_value_info(node.output[0], onnx.TypeProto()) for node in nodes[-1:]]
    constants = [helper.make_tensor(name, TensorProto.FLOAT, [2], [1, 2]) for name in weights]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def graphs(m: Any) -> None:
    def names(made: onnx.ModelProto) -> list[str]:
        return [one.node for one in m.placement(made, m.CUDA, "g").handed]

    fixed = helper.make_node("Atan", ["w"], ["v"], "fixed")
    add = helper.make_node("Add", ["v", "x"], ["y"], "add")
    assert names(model([fixed, add], ["x"], ("w",))) == []
    assert names(model([fixed, add], ["x", "w"], ("w",))) == ["fixed"]
    shape = helper.make_node("Shape", ["x"], ["s"], "shape")
    whole = helper.make_node("BitwiseAnd", ["s", "s"], ["t"], "whole")
    assert names(model([shape, whole], ["x"])) == []
    cast = helper.make_node("Cast", ["x"], ["i"], "cast", to=TensorProto.INT64)
    of_values = helper.make_node("BitwiseAnd", ["i", "s"], ["t"], "of values")
    assert names(model([shape, cast, of_values], ["x"])) == ["of values"]


CHECKS = (lookups, graphs)
MUTANTS = {
    "newer versions fit": Mutant("Registered.covers", "self.first == since", "self.first <= since"),
    "a range is its first version": Mutant("Registered.covers", "self.first <= since <= self.last", "self.first == since"),
    "one type is enough": Mutant("Registered.takes", "all", "any"),
    "the last value of a name counts": Mutant("Signature.types", "found.setdefault(name, dtype)", "found.update({name: dtype})"),
    "the newest version is meant": Mutant("Operator.at", "one.since <= opset", "True"),
    "any provider's kernel": Mutant("read_kernels", "of == provider", "True"),
    "an input with a default is constant": Mutant(
        "_looked_up",
        "{tensor.name for tensor in inferred.graph.initializer} - {info.name for info in inferred.graph.input}",
        "{tensor.name for tensor in inferred.graph.initializer}",
    ),
    "whole numbers are sizes": Mutant(
        "_Walk._look_up", "all(not name or name in scope.sizes or name in scope.constants for name in node.input)", "True"
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_killed(name: str) -> None:
    assert killer(mutated(MUTANTS[name]), CHECKS) is not None


def test_the_code_itself_passes() -> None:
    assert killer(unmutated(MUTANTS.values()), CHECKS) is None
