"""Time of a tensor-train product under ONNX Runtime over the dense MatMul, for every way to contract it, beside the planner's choice.

Every plan of the planner is built from the same cores, merged at load where it merges; beside them one Einsum node over x and all cores,
and the export of tensorly-torch's BlockTT layer where that package is installed. One process, equal threads, run in turn; each figure is a
median over rounds. The plan of a row is made for the row's number of tokens alone.

    python benchmarks/tensor_train_plans.py [--modes 8,8,16 16,16,16] [--ranks 4 8 16 64] [--tokens 1 16 256] [--rounds 9] [--plans]

`over_best` = planned / the fastest of all forms; it is 1 at best. `--plans` adds a row for every plan.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from string import ascii_letters
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from _common import finish, parser, session_options, tell
from onnx import TensorProto, helper, numpy_helper

from matmorph.cli.demo import medians
from matmorph.passes.linalg.contraction import TrainShape, contract, matrix_train
from matmorph.passes.linalg.contraction_cost import Planned, plan_contraction

TOO_SLOW = 10.0
"""A form that takes longer than this many times dense in a run is not timed further."""
Runs = dict[str, Callable[[], object]]


class Nodes:
    """A plan's steps as ONNX nodes over value names."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.sizes: list[onnx.TensorProto] = []

    def reshape(self, value: str, sizes: Sequence[int]) -> str:
        self.sizes.append(numpy_helper.from_array(np.array(sizes, dtype=np.int64), f"sizes_{len(self.sizes)}"))
        return self.node("Reshape", value, self.sizes[-1].name)

    def permute(self, value: str, axes: Sequence[int]) -> str:
        return self.node("Transpose", value, perm=list(axes))

    def matmul(self, left: str, right: str) -> str:
        return self.node("MatMul", left, right)

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [f"value_{len(self.nodes)}"], **attributes))
        return str(self.nodes[-1].output[0])


def session(nodes: Nodes, weights: Mapping[str, np.ndarray], train: TrainShape, threads: int) -> onnxruntime.InferenceSession:
    """x [n, in] to the result of the last node [n, out]."""
    ends = (("x", train.in_features), (str(nodes.nodes[-1].output[0]), train.out_features))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name, width in ends)
    held = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes.nodes, "plan", [x], [y], [*held, *nodes.sizes])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), session_options(threads), providers=["CPUExecutionProvider"])


def dense_session(train: TrainShape, threads: int) -> onnxruntime.InferenceSession:
    nodes = Nodes()
    nodes.matmul("x", "w")
    weight = np.random.default_rng(3).standard_normal((train.in_features, train.out_features), dtype=np.float32)
    return session(nodes, {"w": weight}, train, threads)


def einsum_session(train: TrainShape, cores: Mapping[str, np.ndarray], threads: int) -> onnxruntime.InferenceSession:
    """One node over x and all cores of a TT-matrix."""
    count = len(cores)
    outputs, inputs, ranks = ascii_letters[:count], ascii_letters[count : 2 * count], ascii_letters[2 * count : 3 * count + 1]
    terms = [f"Z{inputs}", *(f"{ranks[k]}{outputs[k]}{inputs[k]}{ranks[k + 1]}" for k in range(count))]
    nodes = Nodes()
    x = nodes.reshape("x", (-1, *train.inputs))
    y = nodes.node("Einsum", x, *cores, equation=f"{','.join(terms)}->Z{outputs}")
    nodes.reshape(y, (-1, train.out_features))
    return session(nodes, cores, train, threads)


def tltorch_session(train: TrainShape, tokens: int, threads: int) -> onnxruntime.InferenceSession | None:
    """torch.onnx.export of tensorly-torch's factorized linear layer; None where the package is missing. The export fixes the number of
    rows, whatever axes it is told to leave open."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from tltorch.factorized_layers import FactorizedLinear
    except ImportError:
        return None
    options = {"factorization": "blocktt", "rank": list(train.ranks), "implementation": "factorized"}
    layer = FactorizedLinear(train.inputs, train.outputs, bias=False, **options).eval()
    if [tuple(core.shape) for core in layer.weight.factors] != list(train.core_shapes):
        raise SystemExit(f"tensorly-torch makes other cores than {train.core_shapes}: its column would compare something else")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        program = torch.onnx.export(layer, (torch.zeros(tokens, train.in_features),), dynamo=True, verbose=False)
        logging.disable(logging.NOTSET)
    model = program.model_proto.SerializeToString()
    return onnxruntime.InferenceSession(model, session_options(threads), providers=["CPUExecutionProvider"])


def sessions(train: TrainShape, planned: Planned, threads: int) -> dict[str, onnxruntime.InferenceSession]:
    """All forms of one train. `matmul` is the dense product with W as it would be stored."""
    generator = np.random.default_rng(0)
    cores = {f"core_{k}": generator.standard_normal(shape, dtype=np.float32) for k, shape in enumerate(train.core_shapes)}
    made = {"matmul": dense_session(train, threads), "einsum": einsum_session(train, cores, threads)}
    for candidate in planned.candidates:
        nodes = Nodes()
        contract(candidate.plan, "x", list(cores), nodes)
        made[candidate.plan.name] = session(nodes, cores, train, threads)
    return made


def timed(made: Mapping[str, onnxruntime.InferenceSession], x: np.ndarray, rounds: int) -> dict[str, float]:
    """Seconds per form; infinite where the faster of the first two runs took more than `TOO_SLOW` times dense and a millisecond."""
    runs: Runs = {name: partial(each.run, None, {each.get_inputs()[0].name: x}) for name, each in made.items()}
    limit = TOO_SLOW * medians({"matmul": runs["matmul"]}, 3)["matmul"] + 1e-3
    kept = {name: run for name, run in runs.items() if _once(run) <= limit or _once(run) <= limit}
    return dict.fromkeys(runs, float("inf")) | medians(kept, rounds)


def _once(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(modes: Sequence[int], rank: int, tokens: Sequence[int], options: Any) -> list[dict[str, Any]]:
    inner = [rank] * (len(modes) - 1)
    train = matrix_train(modes, modes, (1, *inner, 1))
    made = sessions(train, plan_contraction(train, (1,)), options.threads)
    rows = []
    for count in tokens:
        x = np.random.default_rng(count).standard_normal((count, train.in_features), dtype=np.float32)
        other = tltorch_session(train, count, options.threads)
        seconds = timed(made | ({} if other is None else {"tltorch": other}), x, options.rounds)
        rows += _rows(train, rank, plan_contraction(train, (count,)), seconds, count, options.plans)
    return rows


def _rows(train: TrainShape, rank: int, planned: Planned, seconds: Mapping[str, float], tokens: int, every: bool) -> list[dict[str, Any]]:
    dense, mine = seconds["matmul"], seconds[planned.plan.name]
    others = {name: value for name, value in seconds.items() if name != "matmul"}
    best = min(others, key=lambda name: others[name])
    row = {"size": train.in_features, "rank": rank, "tokens": tokens, "dense_ms": 1e3 * dense}
    predicted = {candidate.plan.name: candidate for candidate in planned.candidates}
    main = {
        "form": planned.plan.name,
        "over_dense": mine / dense,
        "predicted": planned.ratios[0],
        "best": best,
        "best_over_dense": others[best] / dense,
        "over_best": mine / others[best],
        "einsum": seconds["einsum"] / dense,
        "tltorch": seconds["tltorch"] / dense if "tltorch" in seconds else None,
    }
    if not every:
        return [row | main]
    base = planned.dense[0].seconds
    shown = sorted(predicted, key=lambda name: seconds[name])
    plans = [
        {"form": name, "over_dense": seconds[name] / dense, "predicted": predicted[name].estimates[0].seconds / base} for name in shown
    ]
    return [row | main] + [row | dict.fromkeys(main, "") | plan for plan in plans]


def main(arguments: Sequence[str] | None = None) -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--modes", type=lambda text: tuple(map(int, text.split(","))), nargs="+", default=[(8, 8, 16), (16, 16, 16)])
    options_of.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16, 64])
    options_of.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256])
    options_of.add_argument("--rounds", type=int, default=9)
    options_of.add_argument("--plans", action="store_true", help="a row for every plan")
    options = options_of.parse_args(arguments)
    if options.tiny:
        options.modes, options.ranks, options.tokens, options.rounds = [(2, 3, 2)], [2], [1, 2], 2
    torch.set_num_threads(options.threads)
    say = tell(options)
    rows = []
    for modes in options.modes:
        for rank in options.ranks:
            say(f"{'x'.join(map(str, modes))}, rank {rank} ...")
            rows += measure(modes, rank, options.tokens, options)
    judged = [row for row in rows if row["best"]]
    worst = {name: max(row[name] for row in judged) for name in ("over_best", "over_dense")}
    notes = [f"worst of all rows: planned over the best form {worst['over_best']:.3g}, planned over dense {worst['over_dense']:.3g}"]
    notes += ["tensorly-torch is not installed: no tltorch column"] if judged[0]["tltorch"] is None else []
    notes.append(f"inf: more than {TOO_SLOW:g} x dense, not timed further; medians of runs in turn, ONNX Runtime on CPU")
    finish(options, rows, notes, worst=worst)


if __name__ == "__main__":
    main()
